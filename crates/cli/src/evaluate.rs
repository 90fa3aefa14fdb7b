//! `anchorage eval`: one run, and the controls it is compared with, under every kind of memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cluster_tree::{ClusterPath, ClusterTree};
use corpus::Corpus;
use eval::{
    Agreement, Answer, AskOptions, HeldOut, MemoryMode, N_BUCKETS, Question, Sample, TRAIN, ask, held_out,
};
use generate::{Options, Prompt};

use crate::config::EvalSection;
use crate::run::Run;

/// The kinds of memory, in the order of every table.
pub(crate) const MEMORIES: [&str; 5] = ["none", "generic", "always_on", "fetched", "random"];

/// What is measured of one kind of memory. The raw values are kept, so that several seeds can be
/// taken together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    pub(crate) held_out: HeldOut,
    pub(crate) answers: Vec<Answer>,
    pub(crate) parameters: u64,
    /// Targets that the measured weights were trained on, the initial anchor's included.
    pub(crate) tokens: u64,
    /// What is not plain from the kind of memory alone.
    pub(crate) note: &'static str,
    /// Continuations of the sample questions.
    pub(crate) samples: Vec<String>,
}

/// All that one evaluation measured.
pub(crate) struct Evaluation {
    pub(crate) questions: Vec<Question>,
    pub(crate) memories: BTreeMap<&'static str, Measured>,
    pub(crate) routed: Vec<ClusterPath>,
    /// Share of training windows whose document has their cluster's commonest label, by level; none
    /// without labels.
    pub(crate) purity: Vec<f64>,
    /// Whether choices were scored.
    pub(crate) choices: bool,
    pub(crate) seconds: f64,
    pub(crate) tokens_per_s: f64,
    pub(crate) seed: u64,
}

/// Measures a run as its section `[eval]` says.
pub(crate) fn evaluate(run: &Run) -> Result<Evaluation> {
    let began = Instant::now();
    let section = &run.config.eval;
    let corpus = run.corpus()?;
    let questions = match &section.questions {
        Some(path) => select(eval::read_questions(path)?, section.questions_per_bucket),
        None => vec![],
    };
    let retriever = run.retriever()?;
    let prompts: Vec<&str> = questions.iter().map(|question| question.prompt.as_str()).collect();
    let routed = if prompts.is_empty() { vec![] } else { retriever.paths(&prompts)? };
    let leaves = used_leaves(&run.tree)?;
    let asked = Asked { questions: &questions, routed: &routed, leaves: &leaves, corpus: &corpus, section };
    let mut memories = BTreeMap::new();
    match &section.none {
        Some(dir) => {
            let none = control(run, "none", dir)?;
            memories.insert("none", asked.measure(&none, MemoryMode::None)?);
        }
        None => {
            let mut measured = asked.measure(run, MemoryMode::None)?;
            if run.bank.is_some() {
                measured.note = "this run's anchor with its memory taken away";
            }
            memories.insert("none", measured);
        }
    }
    if let Some(dir) = &section.always_on {
        let always_on = control(run, "always_on", dir)?;
        memories.insert("always_on", asked.measure(&always_on, MemoryMode::Generic)?);
    }
    if run.is_always_on() {
        memories.insert("always_on", asked.measure(run, MemoryMode::Generic)?);
    } else if run.bank.is_some() {
        memories.insert("generic", asked.measure(run, MemoryMode::Generic)?);
        memories.insert("fetched", asked.measure(run, MemoryMode::Fetched)?);
        // A tree of one leaf has no other one to draw.
        if leaves.len() > 1 {
            memories.insert("random", asked.measure(run, MemoryMode::Random)?);
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let (tokens_per_s, seed) = (training_rate(&run.dir)?, run.config.train.seed);
    let purity = purity(&corpus)?;
    let choices = section.choices;
    Ok(Evaluation { questions, memories, routed, purity, choices, seconds, tokens_per_s, seed })
}

/// Opens a run that [eval] names. It must be of the same corpus (or it may have trained on what is held out
/// here) and be what it is named for.
fn control(run: &Run, key: &str, dir: &Path) -> Result<Run> {
    let control = Run::open(dir).with_context(|| format!("eval.{key}"))?;
    run.fingerprint
        .compare(&control.fingerprint)
        .with_context(|| format!("eval.{key}: {} is of another corpus", dir.display()))?;
    let (expected, is_so) = match key {
        "none" => ("train.phase = \"anchor\"", control.bank.is_none()),
        _ => ("train.assign = \"always_on\" in a phase with memory", control.is_always_on()),
    };
    if !is_so {
        let train::TrainConfig { phase, assign, .. } = &control.config.train;
        bail!("eval.{key}: {}: expected {expected}, found {phase:?}, {assign:?}", dir.display());
    }
    Ok(control)
}

/// The paths of all leaves that hold documents.
fn used_leaves(tree: &ClusterTree) -> Result<Vec<ClusterPath>> {
    let counts = tree.counts(tree.n_levels() - 1);
    let used = (0u32..).zip(counts).filter(|(_, n)| **n > 0);
    Ok(used.map(|(leaf, _)| tree.path_of_leaf(leaf)).collect::<cluster_tree::Result<_>>()?)
}

/// Scored tokens a second over the run's last training process, validation and checkpoints included.
pub(crate) fn training_rate(dir: &Path) -> Result<f64> {
    let path = dir.join("metrics.jsonl");
    // A run that was merged of jobs has none.
    let lines = if path.exists() { train::read_metrics(&path)? } else { vec![] };
    // The clock begins anew with each process.
    let first = (1..lines.len()).rev().find(|&i| lines[i].seconds < lines[i - 1].seconds).unwrap_or(0);
    Ok(match &lines[first..] {
        [first, .., last] => {
            (last.tokens_seen - first.tokens_seen) as f64 / (last.seconds - first.seconds).max(1e-9)
        }
        lines => lines.last().map_or(0.0, |line| line.tokens_per_s),
    })
}

/// Share of the training windows whose document's label is the commonest of their cluster, by level.
fn purity(corpus: &Corpus) -> Result<Vec<f64>> {
    let mut agreement = Agreement::new(corpus.branching());
    for window in corpus.train_windows() {
        let (leaf, document) = window?;
        if let Some(label) = corpus.label(document)? {
            agreement.add(leaf, label);
        }
    }
    Ok(match agreement.is_empty() {
        true => vec![],
        false => (0..agreement.n_levels()).map(|level| agreement.purity(level)).collect(),
    })
}

/// At most `n` questions a bucket and wording, spread evenly over the file; 0 is all.
fn select(questions: Vec<Question>, n: usize) -> Vec<Question> {
    if n == 0 {
        return questions;
    }
    let mut groups: BTreeMap<(usize, String), Vec<Question>> = BTreeMap::new();
    for question in questions {
        groups.entry((question.bucket, question.phrasing.clone())).or_default().push(question);
    }
    let spread = |questions: Vec<Question>| {
        let len = questions.len();
        let take = n.min(len);
        let chosen: Vec<usize> = (0..take).map(|i| i * len / take).collect();
        questions
            .into_iter()
            .enumerate()
            .filter(move |(i, _)| chosen.binary_search(i).is_ok())
            .map(|(_, q)| q)
    };
    groups.into_values().flat_map(spread).collect()
}

/// Indices of the questions whose continuations the report shows: the middle one of each bucket, in the
/// wording of the corpus.
pub(crate) fn samples(questions: &[Question]) -> impl Iterator<Item = usize> + '_ {
    (1..=N_BUCKETS).filter_map(|bucket| {
        let asked = |i: &usize| questions[*i].bucket == bucket && questions[*i].phrasing == TRAIN;
        let asked: Vec<usize> = (0..questions.len()).filter(asked).collect();
        asked.get(asked.len() / 2).copied()
    })
}

/// What every memory is asked.
struct Asked<'a> {
    questions: &'a [Question],
    routed: &'a [ClusterPath],
    /// Those that a random path is drawn from.
    leaves: &'a [ClusterPath],
    corpus: &'a Corpus,
    section: &'a EvalSection,
}

impl Asked<'_> {
    fn measure(&self, run: &Run, mode: MemoryMode) -> Result<Measured> {
        let model = run.model();
        let n = match self.section.sequences {
            0 => self.corpus.n_validation(),
            n => n.min(self.corpus.n_validation()),
        };
        let held_out =
            held_out(&model, self.corpus, mode, &Sample::whole(n, self.section.batch), self.leaves)?;
        let path = |(i, own): (usize, &ClusterPath)| mode.path(own, (i as u64, self.leaves));
        let paths = self.routed.iter().enumerate().map(path).collect::<eval::Result<Vec<_>>>()?;
        let options = AskOptions {
            batch: self.section.batch,
            max_new_tokens: self.section.max_answer_tokens,
            score_choices: self.section.choices,
        };
        let answers = ask(&model, &run.tokenizer, (self.questions, &paths), options)?;
        let memory = match (mode, &run.bank) {
            (MemoryMode::None, _) | (_, None) => 0,
            (_, Some(bank)) => memory_bank::BlockStore::spec(bank.store().as_ref()).fetch_len(),
        };
        let parameters = run.anchor.config().n_parameters() + memory;
        let tokens = run.state.tokens_before + run.state.tokens_seen;
        let samples = self.samples(run, &paths)?;
        Ok(Measured { held_out, answers, parameters, tokens, samples, note: "" })
    }

    /// Continues the sample questions past their answer.
    fn samples(&self, run: &Run, paths: &[Option<ClusterPath>]) -> Result<Vec<String>> {
        let prompt = |i: usize| -> Result<Prompt> {
            Ok(Prompt { tokens: run.tokenizer.encode(&self.questions[i].prompt)?, path: paths[i].clone() })
        };
        let prompts = samples(self.questions).map(prompt).collect::<Result<Vec<_>>>()?;
        let options = Options { max_new_tokens: 16, ..Options::default() };
        let completions = generate::generate(&run.model(), &run.tokenizer, &prompts, &options)?;
        Ok(completions.into_iter().map(|completion| completion.text).collect())
    }
}
