//! `anchorage eval`: one run, and the controls it is compared with, under every kind of memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use cluster_tree::ClusterPath;
use corpus::Corpus;
use eval::{Answer, AskOptions, HeldOut, MemoryMode, Question, Rate, ask, bootstrap_mean, held_out};
use generate::{Options, Prompt};
use serde::{Deserialize, Serialize};

use crate::config::EvalSection;
use crate::run::Run;

/// The wording that the corpus uses, as questions name it.
pub(crate) const TRAIN: &str = "train";

/// Frequency buckets of questions.
pub(crate) const N_BUCKETS: usize = 5;

/// The kinds of memory, in the order of every table.
pub(crate) const MEMORIES: [&str; 5] = ["none", "generic", "always_on", "fetched", "random"];

/// What is measured of one kind of memory. The raw values are kept, so that several seeds can be
/// taken together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    pub(crate) held_out: HeldOut,
    pub(crate) answers: Vec<Answer>,
    pub(crate) parameters: u64,
    /// Continuations of the sample questions.
    pub(crate) samples: Vec<String>,
}

/// All that one evaluation measured.
pub(crate) struct Evaluation {
    pub(crate) questions: Vec<Question>,
    pub(crate) memories: BTreeMap<&'static str, Measured>,
    pub(crate) routed: Vec<ClusterPath>,
    /// Share of documents that have their cluster's commonest label, by level; none without labels.
    pub(crate) purity: Vec<f64>,
    /// Whether choices were scored.
    pub(crate) choices: bool,
    pub(crate) seconds: f64,
    pub(crate) tokens_per_s: f64,
    pub(crate) seed: u64,
}

/// The last line of `eval --json` and `quickstart --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) loss: BTreeMap<String, Option<f64>>,
    pub(crate) perplexity: BTreeMap<String, Option<f64>>,
    /// By bucket, rarest first; questions in the wording of the corpus.
    pub(crate) exact_match: BTreeMap<String, Vec<Option<f64>>>,
    pub(crate) exact_match_low: BTreeMap<String, Vec<Option<f64>>>,
    pub(crate) exact_match_high: BTreeMap<String, Vec<Option<f64>>>,
    /// The same in a wording that the corpus never uses.
    pub(crate) exact_match_held_out: BTreeMap<String, Vec<Option<f64>>>,
    /// Whether the answer is the likeliest of the choices, questions in the wording of the corpus.
    pub(crate) choice: BTreeMap<String, Vec<Option<f64>>>,
    pub(crate) exact_match_by_relation: BTreeMap<String, BTreeMap<String, f64>>,
    pub(crate) perplexity_by_label: BTreeMap<String, BTreeMap<String, f64>>,
    pub(crate) purity_by_level: Vec<f64>,
    pub(crate) seconds: f64,
    pub(crate) peak_rss_mb: u64,
    pub(crate) tokens_per_s: f64,
    pub(crate) seeds: Vec<u64>,
}

/// Measures the run in `dir` as its section `[eval]` says.
pub(crate) fn evaluate(dir: &Path) -> Result<Evaluation> {
    let began = Instant::now();
    let run = Run::open(dir)?;
    let section = &run.config.eval;
    let corpus = run.corpus()?;
    let questions = match &section.questions {
        Some(path) => select(eval::read_questions(path)?, section.questions_per_bucket),
        None => vec![],
    };
    let router = run.router()?;
    let prompts: Vec<&str> = questions.iter().map(|question| question.prompt.as_str()).collect();
    let routed = if prompts.is_empty() { vec![] } else { router.paths(&prompts)? };
    let asked = Asked { questions: &questions, routed: &routed, corpus: &corpus, section };
    let mut memories = BTreeMap::new();
    let control = |dir: &Path| Run::open(dir).with_context(|| "a control of [eval]".to_string());
    match &section.none {
        Some(dir) => memories.insert("none", asked.measure(&control(dir)?, MemoryMode::None)?),
        None => memories.insert("none", asked.measure(&run, MemoryMode::None)?),
    };
    if let Some(dir) = &section.always_on {
        memories.insert("always_on", asked.measure(&control(dir)?, MemoryMode::Generic)?);
    }
    if run.is_always_on() {
        memories.insert("always_on", asked.measure(&run, MemoryMode::Generic)?);
    } else if run.bank.is_some() {
        for (name, mode) in [
            ("generic", MemoryMode::Generic),
            ("fetched", MemoryMode::Fetched),
            ("random", MemoryMode::Random),
        ] {
            memories.insert(name, asked.measure(&run, mode)?);
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let (tokens_per_s, seed) = (training_rate(dir)?, run.config.train.seed);
    let purity = purity(&corpus)?;
    let choices = section.choices;
    Ok(Evaluation { questions, memories, routed, purity, choices, seconds, tokens_per_s, seed })
}

/// Scored tokens a second over the run's last training process.
fn training_rate(dir: &Path) -> Result<f64> {
    let lines = train::read_metrics(&dir.join("metrics.jsonl"))?;
    let rates: Vec<f64> = lines.iter().map(|line| line.tokens_per_s).filter(|rate| *rate > 0.0).collect();
    Ok(rates.iter().sum::<f64>() / rates.len().max(1) as f64)
}

/// Share of the training documents' pieces whose label is the commonest of their cluster, by level.
fn purity(corpus: &Corpus) -> Result<Vec<f64>> {
    let n_levels = corpus.branching().len();
    let mut counts: Vec<BTreeMap<(u32, String), u64>> = vec![BTreeMap::new(); n_levels];
    for index in 0..corpus.n_sequences() {
        let sequence = corpus.sequence(0, index)?;
        for &document in &sequence.documents {
            let Some(label) = corpus.label(document)? else { continue };
            for (level, counts) in counts.iter_mut().enumerate() {
                *counts.entry((sequence.path.index(level), label.to_string())).or_default() += 1;
            }
        }
    }
    let share = |counts: BTreeMap<(u32, String), u64>| {
        let mut largest: BTreeMap<u32, u64> = BTreeMap::new();
        for ((cluster, _), n) in &counts {
            let largest = largest.entry(*cluster).or_default();
            *largest = (*largest).max(*n);
        }
        largest.values().sum::<u64>() as f64 / counts.values().sum::<u64>() as f64
    };
    Ok(counts.into_iter().filter(|counts| !counts.is_empty()).map(share).collect())
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
        let held_out = held_out(&model, self.corpus, mode, (n, self.section.batch))?;
        let leaves: Vec<ClusterPath> = {
            let mut leaves = self.routed.to_vec();
            leaves.sort();
            leaves.dedup();
            leaves
        };
        let path = |(i, own): (usize, &ClusterPath)| mode.path(own, (i as u64, &leaves));
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
        let samples = self.samples(run, &paths)?;
        Ok(Measured { held_out, answers, parameters, samples })
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

/// Mean and interval of a property of the answers to questions that `keep` admits, over evaluations.
pub(crate) fn rate(
    evaluations: &[Evaluation],
    memory: &str,
    keep: impl Fn(&Question) -> bool,
    property: impl Fn(&Answer) -> bool,
) -> Option<Rate> {
    let mut values = vec![];
    for evaluation in evaluations {
        let measured = evaluation.memories.get(memory)?;
        for (question, answer) in evaluation.questions.iter().zip(&measured.answers) {
            if keep(question) {
                values.push(f64::from(u8::from(property(answer))));
            }
        }
    }
    bootstrap_mean(&values)
}

/// Mean and interval of the held-out loss, resampled by sequence, over evaluations.
pub(crate) fn loss(evaluations: &[Evaluation], memory: &str) -> Option<Rate> {
    let mut sequences: Vec<&eval::TokenSum> = vec![];
    let (mut nats, mut tokens) = (0.0, 0);
    for evaluation in evaluations {
        let held_out = &evaluation.memories.get(memory)?.held_out;
        sequences.extend(held_out.sequences.iter().filter(|s| s.tokens > 0));
        nats += held_out.total.nats;
        tokens += held_out.total.tokens;
    }
    if tokens == 0 {
        return None;
    }
    // The loss is a ratio of sums; a sequence's part of it is its sum over the mean length.
    let mean_len = tokens as f64 / sequences.len() as f64;
    let parts: Vec<f64> = sequences.iter().map(|s| s.nats / mean_len).collect();
    bootstrap_mean(&parts).map(|rate| Rate { mean: nats / tokens as f64, ..rate })
}

/// A kind of recall.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recall {
    /// Greedy completion to the letter, questions in the wording of the corpus.
    Exact,
    /// The same in a wording that the corpus never uses.
    ExactHeldOut,
    /// The likeliest of the choices, in the wording of the corpus.
    Chosen,
}

/// Recall by frequency bucket, rarest first.
pub(crate) fn recall(evaluations: &[Evaluation], memory: &str, what: Recall) -> Vec<Option<Rate>> {
    let held_out = what == Recall::ExactHeldOut;
    let property = |answer: &Answer| if what == Recall::Chosen { answer.chosen } else { answer.exact };
    let bucket = |b: usize| {
        rate(evaluations, memory, |q| q.bucket == b && (q.phrasing == TRAIN) != held_out, property)
    };
    match what == Recall::Chosen && evaluations.iter().any(|evaluation| !evaluation.choices) {
        true => vec![None; N_BUCKETS],
        false => (1..=N_BUCKETS).map(bucket).collect(),
    }
}

/// The figures of one or more evaluations (seeds) taken together.
pub(crate) fn summarise(evaluations: &[Evaluation]) -> Summary {
    let by_memory = |value: &dyn Fn(&str) -> Option<f64>| -> BTreeMap<String, Option<f64>> {
        MEMORIES.iter().map(|memory| (memory.to_string(), value(memory))).collect()
    };
    let all = |what: Recall, of: &dyn Fn(Rate) -> f64| -> BTreeMap<String, Vec<Option<f64>>> {
        let row = |memory: &str| recall(evaluations, memory, what).into_iter().map(|r| r.map(of)).collect();
        MEMORIES.iter().map(|memory| (memory.to_string(), row(memory))).collect()
    };
    let grouped = |key: &dyn Fn(&Question) -> String| -> BTreeMap<String, BTreeMap<String, f64>> {
        let mut groups: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        let keys: std::collections::BTreeSet<String> =
            evaluations.iter().flat_map(|e| e.questions.iter().map(key)).collect();
        for memory in MEMORIES {
            for group in &keys {
                let keep = |q: &Question| q.phrasing == TRAIN && key(q) == *group;
                if let Some(rate) = rate(evaluations, memory, keep, |a| a.exact) {
                    groups.entry(memory.into()).or_default().insert(group.clone(), rate.mean);
                }
            }
        }
        groups
    };
    Summary {
        loss: by_memory(&|memory| loss(evaluations, memory).map(|rate| rate.mean)),
        perplexity: by_memory(&|memory| loss(evaluations, memory).map(|rate| rate.mean.exp())),
        exact_match: all(Recall::Exact, &|rate| rate.mean),
        exact_match_low: all(Recall::Exact, &|rate| rate.low),
        exact_match_high: all(Recall::Exact, &|rate| rate.high),
        exact_match_held_out: all(Recall::ExactHeldOut, &|rate| rate.mean),
        choice: all(Recall::Chosen, &|rate| rate.mean),
        exact_match_by_relation: grouped(&|question| question.relation.clone()),
        perplexity_by_label: labels(evaluations),
        purity_by_level: evaluations.first().map_or(vec![], |e| e.purity.clone()),
        seconds: evaluations.iter().map(|e| e.seconds).sum(),
        peak_rss_mb: peak_rss_mb(),
        tokens_per_s: evaluations.iter().map(|e| e.tokens_per_s).sum::<f64>() / evaluations.len() as f64,
        seeds: evaluations.iter().map(|e| e.seed).collect(),
    }
}

/// Perplexity by label of the held-out documents, first evaluation.
fn labels(evaluations: &[Evaluation]) -> BTreeMap<String, BTreeMap<String, f64>> {
    let Some(first) = evaluations.first() else { return BTreeMap::new() };
    let perplexities = |measured: &Measured| {
        measured.held_out.by_label.iter().map(|(label, sum)| (label.clone(), sum.perplexity())).collect()
    };
    first.memories.iter().map(|(memory, measured)| (memory.to_string(), perplexities(measured))).collect()
}

/// Most memory this process ever held, MiB; 0 where the kernel does not tell.
pub(crate) fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

/// The table of memories that ends every evaluation.
pub(crate) fn table(evaluations: &[Evaluation]) -> String {
    let mut text = format!("{:<10} {:>7} {:>10} {:>10}", "memory", "loss", "perplexity", "parameters");
    let has_questions = evaluations.iter().any(|e| !e.questions.is_empty());
    if has_questions {
        text += "   exact match, rarest bucket first";
    }
    text.push('\n');
    for memory in MEMORIES {
        let Some(loss) = loss(evaluations, memory) else { continue };
        let parameters = evaluations[0].memories[memory].parameters;
        text += &format!("{memory:<10} {:>7.4} {:>10.2} {parameters:>10}", loss.mean, loss.mean.exp());
        if has_questions {
            for exact in recall(evaluations, memory, Recall::Exact) {
                text += &exact.map_or("      –".into(), |rate| {
                    format!(
                        "  {:>5.1} % [{:.1}, {:.1}]",
                        rate.mean * 100.0,
                        rate.low * 100.0,
                        rate.high * 100.0
                    )
                });
            }
        }
        text.push('\n');
    }
    text
}
