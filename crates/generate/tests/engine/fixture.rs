//! A small anchor of random weights with a bank, and an engine over both.

use std::sync::{Arc, LazyLock};

use anchor::{
    Anchor, AnchorConfig, Decoder, DecoderOptions, Input, KvPages, PackedBlock, PathMemory, Scores, Segment,
};
use candle_core::{DType, Device};
use cluster_tree::ClusterPath;
use corpus::Tokenizer;
use generate::Model;
use generate::engine::{
    Engine, EngineOptions, Event, Finish, Generation, Reason, Request, Reroute, Sampling, Token, TokenScore,
};
use memory_bank::{BlockStore, Blocking, Encoded, LocalBank, Step};

#[path = "../../../../tests/fixtures/bank.rs"]
mod bank;

pub(crate) use bank::leaf;

const SENTENCES: [&str; 4] = [
    "The boat lies at the quay.",
    "A gull sits on the mast.",
    "Rope and chain hold the boat.",
    "naïve 東京 🦀",
];

pub(crate) struct Fixture {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) anchor: Anchor,
    pub(crate) bank: Blocking<LocalBank>,
    pub(crate) decoder: Arc<Decoder>,
    pub(crate) blocks: Vec<Arc<PackedBlock>>,
}

/// Everything an answer says, without its times.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) prompt: Option<Vec<TokenScore>>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) scores: Vec<TokenScore>,
    /// The texts of the tokens and of the end.
    pub(crate) pieces: Vec<String>,
    /// The tokens at each reroute.
    pub(crate) reroutes: Vec<usize>,
    pub(crate) reason: Option<Reason>,
    pub(crate) stop: Option<String>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        self.pieces.concat()
    }

    /// The bits of all log probabilities.
    pub(crate) fn bits(&self) -> Vec<u32> {
        let scores = self.prompt.iter().flatten().chain(&self.scores);
        let each = |score: &TokenScore| {
            let top = score.top.iter().flat_map(|(token, logprob)| [*token, logprob.to_bits()]);
            score.logprob.map(f32::to_bits).into_iter().chain(top).collect::<Vec<_>>()
        };
        scores.flat_map(each).collect()
    }
}

/// The fixture of all tests. It never goes away, as its bank has a runtime, which async code cannot drop.
pub(crate) fn fixture() -> &'static Fixture {
    static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| outside(Fixture::new));
    &FIXTURE
}

/// Does what blocks outside of the runtime of the test.
pub(crate) fn outside<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(f).join().unwrap())
}

impl Fixture {
    fn new() -> Self {
        let texts = SENTENCES.iter().map(|text| Ok(text.to_string()));
        let tokenizer = Arc::new(Tokenizer::train(texts, 290, 1 << 20).unwrap());
        let config = AnchorConfig {
            vocab_size: tokenizer.vocab_size(),
            d_model: 16,
            n_layers: 2,
            n_heads: 2,
            head_width: 8,
            ffn_width: 32,
            tied_embeddings: false,
            max_seq_len: 256,
            rope_base: 10_000.0,
            norm_eps: 1e-5,
            form: anchor::Form::default(),
        };
        let anchor = Anchor::new(config, 5, (&Device::Cpu, DType::F32)).unwrap().freeze();
        let bank = bank::bank(16, [8, 4], 0.3);
        let decoder = Arc::new(Decoder::new(&anchor, DecoderOptions::default()).unwrap());
        let paths: Vec<_> = (0..4).map(leaf).chain([ClusterPath::generic(2).unwrap()]).collect();
        let spec = bank.store().spec().clone();
        let fetched = bank.fetch(Step(1), &anchor::unique_ids(&paths, &spec)).unwrap();
        let pack = |block: memory_bank::Block| {
            Arc::new(PackedBlock::pack(block.id, &Encoded::F32(block.values.to_vec()), &spec).unwrap())
        };
        let blocks = fetched.into_iter().map(pack).collect();
        Self { tokenizer, anchor, bank, decoder, blocks }
    }

    pub(crate) fn model(&self) -> Model<'_, LocalBank> {
        Model { anchor: &self.anchor, bank: Some(&self.bank), step: Step(1) }
    }

    pub(crate) fn engine(&self, options: EngineOptions) -> Engine {
        Engine::start(self.decoder.clone(), self.tokenizer.clone(), options).unwrap()
    }

    pub(crate) fn memory(&self, path: &ClusterPath) -> PathMemory {
        let block = |id| self.blocks.iter().find(|block| block.id() == id).unwrap().clone();
        PathMemory::new(path.ids().map(block).collect())
    }

    /// A likeliest continuation of 12 tokens.
    pub(crate) fn request(&self, text: &str, path: Option<ClusterPath>) -> Request {
        let mut prompt = vec![self.tokenizer.eot()];
        prompt.extend(self.tokenizer.encode(text).unwrap());
        Request {
            prompt,
            memory: path.map(|path| self.memory(&path)).unwrap_or_default(),
            sampling: Sampling::default(),
            max_new_tokens: 12,
            stop: vec![],
            logprobs: None,
            prompt_logprobs: None,
            reroute: None,
            ignore_eot: false,
        }
    }

    /// Scores of the token after each of `tokens`, computed by the anchor.
    pub(crate) fn logits(&self, tokens: &[u32], path: Option<ClusterPath>) -> Vec<Vec<f32>> {
        let starts = vec![0; tokens.len()];
        let input = Input { tokens, starts: &starts, batch: 1, len: tokens.len() };
        let memory = outside(|| self.model().memory(&[path]).unwrap());
        let hidden = self.anchor.hidden(input, &memory, None).unwrap();
        self.anchor.logits(&hidden).unwrap().squeeze(0).unwrap().to_vec2().unwrap()
    }

    /// The likeliest continuation, one token a step and alone, with the memory of the next of `paths` at each
    /// reroute: its tokens, and how many there were at each.
    pub(crate) fn by_hand(&self, request: &Request, paths: &[ClusterPath]) -> (Vec<u32>, Vec<usize>) {
        let mut pages: KvPages = self.decoder.pages(256);
        let mut cache = pages.reserve(256).unwrap();
        let (mut memory, mut paths) = (request.memory.clone(), paths.iter());
        let (mut tokens, mut reroutes, mut since) = (request.prompt.clone(), vec![], 0);
        let n_prompt = tokens.len();
        while tokens.len() < n_prompt + request.max_new_tokens {
            let mut last = vec![];
            for position in cache.len()..tokens.len() {
                let tokens = &tokens[position..=position];
                let segment = Segment { tokens, cache: &mut cache, memory: &memory, scores: Scores::Last };
                last = self.decoder.step(&mut pages, &mut [segment]).unwrap().row(0).to_vec();
            }
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]).then(b.cmp(&a))).unwrap();
            tokens.push(best as u32);
            since += 1;
            if best as u32 == self.tokenizer.eot() || tokens.len() == n_prompt + request.max_new_tokens {
                break;
            }
            let sum: f64 = last.iter().map(|&x| f64::from(x).exp()).sum();
            let p = last.iter().map(|&x| f64::from(x).exp() / sum);
            let entropy = -p.map(|p| p * p.ln()).sum::<f64>();
            let asks = match request.reroute.unwrap() {
                Reroute::EveryTokens(n) => since == n,
                Reroute::Entropy { nats, min_tokens } => entropy >= nats && since >= min_tokens,
            };
            if asks {
                since = 0;
                reroutes.push(tokens.len());
                memory = self.memory(paths.next().unwrap());
            }
        }
        (tokens.split_off(n_prompt), reroutes)
    }
}

/// Submits a request and reads all of its answer.
pub(crate) async fn ask(engine: &Engine, request: Request) -> Answer {
    read(engine.submit(request).unwrap(), &|_| panic!("a reroute nobody asked for")).await.0
}

/// Reads all of an answer; reroutes are answered with the memory for their tokens.
pub(crate) async fn read(
    mut generation: Generation,
    memory: &(dyn Fn(&[u32]) -> PathMemory + Sync),
) -> (Answer, Finish) {
    let mut answer = Answer::default();
    while let Some(event) = generation.next().await {
        match event {
            Event::Prompt(scores) => {
                assert!(answer.tokens.is_empty() && answer.prompt.is_none(), "the prompt comes first");
                answer.prompt = Some(scores);
            }
            Event::Token(Token { id, text, score }) => {
                assert_eq!(id, score.token);
                answer.tokens.push(id);
                answer.scores.push(score);
                answer.pieces.push(text);
            }
            Event::Reroute { tokens } => {
                assert!(tokens.ends_with(&answer.tokens));
                answer.reroutes.push(tokens.len());
                generation.set_memory(memory(&tokens));
            }
            Event::Done(finish) => {
                assert!(finish.n_generated >= answer.tokens.len());
                answer.pieces.push(finish.text.clone());
                (answer.reason, answer.stop) = (Some(finish.reason.clone()), finish.stop.clone());
                assert!(generation.next().await.is_none(), "the end is the end");
                return (answer, finish);
            }
        }
    }
    panic!("an answer without an end: {answer:?}");
}
