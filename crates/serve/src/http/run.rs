//! From a checked request to sequences that run: tokens, memory, submission; and their events.

use std::sync::Arc;

use cluster_tree::ClusterPath;
use futures::future::try_join_all;
use generate::engine::{Event, Finish, Generation, Reason, Request, Token, TokenScore};

use super::access::Caller;
use super::app::{App, Served};
use super::error::{Answer, ApiError};
use super::request::{Completion, Prompt, check_length};
use crate::memory::{Ask, Memory, Selected};

/// A prompt with its memory.
pub(super) struct Prepared {
    /// As the engine takes it: the end-of-text token first.
    pub(super) tokens: Vec<u32>,
    /// Tokens before those of the caller: 1 when the end-of-text token is ours.
    pub(super) n_added: usize,
    /// Its text.
    pub(super) text: String,
    pub(super) selected: Selected,
}

/// One completion under way.
pub(super) struct Sequence {
    /// Its place in the answer.
    pub(super) index: usize,
    pub(super) prompt: Arc<Prepared>,
    generation: Generation,
    /// After how many generated tokens memory was asked for anew, and its path.
    pub(super) rerouted: Vec<(usize, Option<ClusterPath>)>,
    /// What is asked for when it is.
    ask: Ask,
    /// The memory that it has now; its bank is held as long.
    _selected: Option<Selected>,
}

/// One completion, done.
pub(super) struct Done {
    pub(super) index: usize,
    pub(super) prompt: Arc<Prepared>,
    pub(super) prompt_scores: Vec<TokenScore>,
    pub(super) tokens: Vec<Token>,
    /// Of all tokens.
    pub(super) text: String,
    pub(super) finish: Finish,
    pub(super) rerouted: Vec<(usize, Option<ClusterPath>)>,
}

/// A prompt as tokens and text.
struct Tokenised {
    tokens: Vec<u32>,
    n_added: usize,
    text: String,
}

/// The prompts of a request, with the end-of-text token before each that does not begin with it.
async fn tokenise(app: &App, prompts: Vec<Prompt>) -> Answer<Vec<Tokenised>> {
    let of_app = app.clone();
    let work = tokio::task::spawn_blocking(move || {
        let served = of_app.served();
        prompts.into_iter().map(|prompt| tokenised(served, prompt)).collect::<Answer<Vec<_>>>()
    });
    work.await.map_err(ApiError::internal)?
}

fn tokenised(served: &Served, prompt: Prompt) -> Answer<Tokenised> {
    let tokenizer = &served.tokenizer;
    let wrong = |error: corpus::Error| ApiError::field("prompt", error);
    let is_chat = matches!(prompt, Prompt::Chat(_));
    let (ids, text) = match prompt {
        Prompt::Text(text) | Prompt::Chat(text) => {
            // Tokens of a text take some hundred times its memory: one that must be too long is not divided.
            let least = tokenizer.longest().map_or(0, |longest| text.len() / longest.max(1));
            check_length(least, "at least ", &served.bounds)?;
            let ids = if is_chat { tokenizer.encode_marked(&text) } else { tokenizer.encode(&text) };
            (ids.map_err(wrong)?, text)
        }
        Prompt::Ids(ids) => {
            let text = tokenizer.decode(&ids).map_err(wrong)?;
            (ids, text)
        }
    };
    check_length(ids.len(), "", &served.bounds)?;
    let begins = |first: &u32| {
        // Where no token begins all texts, a turn's own token begins a chat.
        *first == tokenizer.begin() || is_chat && tokenizer.bos().is_none() && tokenizer.is_special(*first)
    };
    let n_added = usize::from(!ids.first().is_some_and(begins));
    let tokens = match n_added {
        0 => ids,
        _ => std::iter::once(tokenizer.begin()).chain(ids).collect(),
    };
    Ok(Tokenised { tokens, n_added, text })
}

/// Tokens and memory of all prompts of a request; each is routed once.
pub(super) async fn prepare(
    app: &App,
    asked: &mut Completion,
    caller: &Caller,
) -> Answer<Vec<Arc<Prepared>>> {
    let tokenised = tokenise(app, std::mem::take(&mut asked.prompts)).await?;
    let mut texts = asked.memory_texts.take().unwrap_or_default().into_iter();
    let prepared = tokenised.into_iter().map(|Tokenised { tokens, n_added, text }| {
        let begin = app.served().tokenizer.begin();
        let begins = n_added == 0 && tokens.first() == Some(&begin);
        let routed = texts.next().unwrap_or_else(|| routed_text(app, &tokens, begins, &text));
        let ask = ask(asked, caller, routed);
        async move {
            let selected = select(app, ask).await?;
            Ok(Arc::new(Prepared { tokens, n_added, text, selected }))
        }
    });
    try_join_all(prepared).await
}

/// The text of a prompt without the token that it begins with.
fn routed_text(app: &App, tokens: &[u32], begins: bool, text: &str) -> String {
    match begins {
        // What could be decoded with it can be without.
        true => app.served().tokenizer.decode(&tokens[1..]).unwrap_or_default(),
        false => text.to_owned(),
    }
}

/// What is asked for a text. One of white space has no path: it gets the generic memory.
fn ask(asked: &Completion, caller: &Caller, text: String) -> Ask {
    let memory = match &asked.memory {
        Memory::Auto if text.trim().is_empty() => Memory::Generic,
        memory => memory.clone(),
    };
    Ask { bank: asked.bank.clone(), text, memory, blocked: Arc::clone(&caller.blocked) }
}

async fn select(app: &App, ask: Ask) -> Answer<Selected> {
    let Some(retrieval) = &app.served().retrieval else {
        return match ask.bank {
            None => Ok(Selected::default()),
            Some(_) => Err(ApiError::field("bank", "this run has no memory, expected no bank")),
        };
    };
    let selected = retrieval.select(ask).await?;
    app.served().metrics.selected(&selected);
    Ok(selected)
}

/// Puts all sequences of a request into the engine's queue, or none.
pub(super) fn submit(
    app: &App,
    asked: &Completion,
    caller: &Caller,
    prompts: &[Arc<Prepared>],
) -> Answer<Vec<Sequence>> {
    let served = app.served();
    let prompts = prompts.iter().flat_map(|prompt| (0..asked.n).map(move |choice| (prompt, choice)));
    let begin = |(index, (prompt, choice)): (usize, (&Arc<Prepared>, usize))| {
        let mut sampling = asked.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(choice as u64);
        let n_prompt = prompt.tokens.len();
        let request = Request {
            prompt: prompt.tokens.clone(),
            memory: prompt.selected.memory.clone(),
            sampling,
            max_new_tokens: asked.new_tokens(n_prompt, served.bounds.positions),
            stop: asked.stop.clone(),
            logprobs: asked.logprobs,
            prompt_logprobs: asked.logprobs.filter(|_| asked.echo),
            reroute: asked.reroute.filter(|_| served.retrieval.is_some()),
            ignore_eot: asked.ignore_eos,
        };
        let generation = served.engine.submit(request)?;
        let ask = ask(asked, caller, String::new());
        let (prompt, rerouted) = (Arc::clone(prompt), vec![]);
        Ok(Sequence { index, prompt, generation, rerouted, ask, _selected: None })
    };
    prompts.enumerate().map(begin).collect()
}

impl Sequence {
    /// The next event that is none of a reroute, which is answered here. Ends with [`Event::Done`]; an error is the
    /// end too.
    pub(super) async fn next(&mut self, app: &App) -> Answer<Event> {
        loop {
            match self.generation.next().await {
                Some(Event::Reroute { tokens }) => self.reroute(app, &tokens).await?,
                Some(Event::Done(Finish { reason: Reason::Failed(message), .. })) => {
                    return Err(ApiError::internal(message));
                }
                Some(event) => return Ok(event),
                None => return Err(ApiError::internal("the engine has stopped")),
            }
        }
    }

    async fn reroute(&mut self, app: &App, tokens: &[u32]) -> Answer<()> {
        let text =
            app.served().tokenizer.decode(&tokens[1.min(tokens.len())..]).map_err(ApiError::internal)?;
        let memory = if text.trim().is_empty() { Memory::Generic } else { Memory::Auto };
        let selected = select(app, Ask { text, memory, ..self.ask.clone() }).await?;
        self.rerouted.push((tokens.len().saturating_sub(self.prompt.tokens.len()), selected.path.clone()));
        self.generation.set_memory(selected.memory.clone());
        self._selected = Some(selected);
        Ok(())
    }

    /// All events until the end.
    pub(super) async fn finish(mut self, app: &App) -> Answer<Done> {
        let (mut prompt_scores, mut tokens, mut text) = (vec![], vec![], String::new());
        loop {
            match self.next(app).await? {
                Event::Prompt(scores) => prompt_scores = scores,
                Event::Token(token) => {
                    text += &token.text;
                    tokens.push(token);
                }
                Event::Done(finish) => {
                    text += &finish.text;
                    let Self { index, prompt, rerouted, .. } = self;
                    return Ok(Done { index, prompt, prompt_scores, tokens, text, finish, rerouted });
                }
                Event::Reroute { .. } => {}
            }
        }
    }
}
