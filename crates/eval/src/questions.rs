use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use cluster_tree::ClusterPath;
use corpus::Tokenizer;
use generate::{Continuation, Model, Options, Prompt, generate, score};
use memory_bank::BlockStore;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Frequency buckets of questions.
pub const N_BUCKETS: usize = 5;

/// The phrasing of a question in words that the corpus uses.
pub const TRAIN: &str = "train";

/// The phrasing of a question in words that it does not.
const HELD_OUT: &str = "held_out";

/// A closed-book question: a text to complete.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Question {
    /// The text before the answer, without a trailing space.
    pub prompt: String,
    /// What follows, before the next full stop.
    pub answer: String,
    /// What is asked about the entity.
    pub relation: String,
    /// Frequency bucket of the entity, 1 is the rarest.
    pub bucket: usize,
    /// Whether the corpus uses the prompt's wording: "train" or "held_out".
    pub phrasing: String,
    /// The answer among others, for choice scoring.
    pub choices: Vec<String>,
}

/// Whether a question was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Greedy completion up to the full stop is the answer to the letter.
    pub exact: bool,
    /// The answer is the likeliest of the choices.
    pub chosen: bool,
}

/// How questions are asked.
#[derive(Clone, Copy, Debug)]
pub struct AskOptions {
    /// Questions a batch.
    pub batch: usize,
    /// Tokens an answer may have.
    pub max_new_tokens: usize,
    /// Whether choices are scored too.
    pub score_choices: bool,
}

/// Reads a jsonl of questions.
///
/// # Errors
/// Names the line that is not a question, or the file that is empty or cannot be read.
pub fn read_questions(path: &Path) -> Result<Vec<Question>> {
    let file_error = |problem: String| Error::File { path: path.into(), problem };
    let file = File::open(path).map_err(|e| file_error(e.to_string()))?;
    let mut questions: Vec<Question> = vec![];
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line_error = |problem: String| Error::Question { path: path.into(), line: i + 1, problem };
        let line = line.map_err(|e| line_error(e.to_string()))?;
        let question: Question = serde_json::from_str(&line).map_err(|e| line_error(e.to_string()))?;
        if !question.choices.contains(&question.answer) {
            return Err(line_error(format!("choices lack the answer {:?}", question.answer)));
        }
        if !(1..=N_BUCKETS).contains(&question.bucket) {
            return Err(line_error(format!("bucket is {}, expected 1 to {N_BUCKETS}", question.bucket)));
        }
        if ![TRAIN, HELD_OUT].contains(&question.phrasing.as_str()) {
            let found = &question.phrasing;
            return Err(line_error(format!("phrasing is {found:?}, expected {TRAIN:?} or {HELD_OUT:?}")));
        }
        questions.push(question);
    }
    match questions.is_empty() {
        true => Err(file_error("holds no question".into())),
        false => Ok(questions),
    }
}

/// Asks every question with the memory at its path (none: the plain anchor).
///
/// # Errors
/// When memory cannot be fetched, or a prompt is longer than the anchor's positions.
pub fn ask<S: BlockStore>(
    model: &Model<S>,
    tokenizer: &Tokenizer,
    (questions, paths): (&[Question], &[Option<ClusterPath>]),
    options: AskOptions,
) -> Result<Vec<Answer>> {
    if questions.len() != paths.len() {
        return Err(Error::Paths { questions: questions.len(), paths: paths.len() });
    }
    // Questions that share blocks are asked together.
    let mut order: Vec<usize> = (0..questions.len()).collect();
    order.sort_by(|&a, &b| paths[a].cmp(&paths[b]));
    let mut answers = vec![Answer::default(); questions.len()];
    for batch in order.chunks(options.batch) {
        let prompt = |&i: &usize| -> Result<Prompt> {
            Ok(Prompt { tokens: tokenizer.encode(&questions[i].prompt)?, path: paths[i].clone() })
        };
        let prompts = batch.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        let stop = vec![".".to_string(), "\n".to_string()];
        let sampling = Options { max_new_tokens: options.max_new_tokens, stop, ..Options::default() };
        let completions = generate(model, tokenizer, &prompts, &sampling)?;
        for (&i, completion) in batch.iter().zip(completions) {
            answers[i].exact = completion.text.trim() == questions[i].answer;
        }
        if options.score_choices {
            choose(model, tokenizer, (questions, batch, &prompts), &mut answers)?;
        }
    }
    Ok(answers)
}

/// Scores every choice of a batch of questions, the full stop after it included.
fn choose<S: BlockStore>(
    model: &Model<S>,
    tokenizer: &Tokenizer,
    (questions, batch, prompts): (&[Question], &[usize], &[Prompt]),
    answers: &mut [Answer],
) -> Result<()> {
    let mut continuations = vec![];
    for (&i, prompt) in batch.iter().zip(prompts) {
        let of_choice = |choice| tokenizer.encode(&format!("{} {choice}.", questions[i].prompt));
        let wholes = questions[i].choices.iter().map(of_choice).collect::<corpus::Result<Vec<_>>>()?;
        // Some tokenizers divide a choice by itself otherwise than behind its prompt.
        let common = |whole: &Vec<u32>| whole.iter().zip(&prompt.tokens).take_while(|(a, b)| a == b).count();
        let n_common = wholes.iter().map(common).min().unwrap_or(0);
        for whole in &wholes {
            let (before, tokens) = whole.split_at(n_common);
            continuations.push(Continuation {
                context: [&[tokenizer.begin()], before].concat(),
                tokens: tokens.to_vec(),
                path: prompt.path.clone(),
            });
        }
    }
    let mut scores = score(model, &continuations)?.into_iter();
    for &i in batch {
        let question = &questions[i];
        let scores: Vec<f64> = scores.by_ref().take(question.choices.len()).collect();
        let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a)));
        answers[i].chosen = best.is_some_and(|best| question.choices[best] == question.answer);
    }
    Ok(())
}
