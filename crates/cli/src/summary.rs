//! What one or more evaluations come to: rates with intervals, the line of JSON, the table.

use std::collections::BTreeMap;

use eval::{Answer, N_BUCKETS, Question, Rate, TRAIN, bootstrap_mean};
use serde::{Deserialize, Serialize};

use crate::evaluate::{Evaluation, MEMORIES, Measured};

/// 2.5th and 97.5th percentile of a bootstrap.
type Interval = [f64; 2];

/// 95 % intervals of what [`Summary`] has under the same names.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Intervals {
    pub(crate) loss: BTreeMap<String, Option<Interval>>,
    pub(crate) exact_match: BTreeMap<String, Vec<Option<Interval>>>,
    pub(crate) exact_match_held_out: BTreeMap<String, Vec<Option<Interval>>>,
    pub(crate) choice: BTreeMap<String, Vec<Option<Interval>>>,
}

/// The last line of `eval --json` and `quickstart --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) loss: BTreeMap<String, Option<f64>>,
    pub(crate) perplexity: BTreeMap<String, Option<f64>>,
    /// By bucket, rarest first; questions in the wording of the corpus.
    pub(crate) exact_match: BTreeMap<String, Vec<Option<f64>>>,
    /// The same in a wording that the corpus never uses.
    pub(crate) exact_match_held_out: BTreeMap<String, Vec<Option<f64>>>,
    /// Whether the answer is the likeliest of the choices, questions in the wording of the corpus.
    pub(crate) choice: BTreeMap<String, Vec<Option<f64>>>,
    pub(crate) intervals: Intervals,
    /// Nats a token by which the first memory's loss is above the second's: mean, and the interval of the
    /// differences by sequence.
    pub(crate) loss_difference: BTreeMap<String, (f64, Interval)>,
    pub(crate) parameters: BTreeMap<String, Option<u64>>,
    /// Targets trained on, the initial anchor's included.
    pub(crate) tokens: BTreeMap<String, Option<u64>>,
    pub(crate) exact_match_by_relation: BTreeMap<String, BTreeMap<String, f64>>,
    pub(crate) perplexity_by_label: BTreeMap<String, BTreeMap<String, f64>>,
    pub(crate) purity_by_level: Vec<f64>,
    pub(crate) seconds: f64,
    pub(crate) peak_rss_mb: u64,
    pub(crate) tokens_per_s: f64,
    pub(crate) seeds: Vec<u64>,
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
    let mut sums = vec![];
    for evaluation in evaluations {
        let sequences = &evaluation.memories.get(memory)?.held_out.sequences;
        sums.extend(sequences.iter().map(|sum| (sum.nats, sum.tokens)));
    }
    per_token(&sums)
}

/// Σ nats / Σ tokens over sequences, with its interval. The bootstrap is of the ratio linearised at its
/// mean R, R + (nats − R·tokens) / mean length, so that unequal lengths do not widen it.
pub(crate) fn per_token(sums: &[(f64, u64)]) -> Option<Rate> {
    let tokens: u64 = sums.iter().map(|(_, tokens)| tokens).sum();
    if tokens == 0 {
        return None;
    }
    let ratio = sums.iter().map(|(nats, _)| nats).sum::<f64>() / tokens as f64;
    let mean_len = tokens as f64 / sums.len() as f64;
    let part = |&(nats, tokens): &(f64, u64)| ratio + (nats - ratio * tokens as f64) / mean_len;
    bootstrap_mean(&sums.iter().map(part).collect::<Vec<_>>()).map(|rate| Rate { mean: ratio, ..rate })
}

fn interval(rate: Rate) -> Interval {
    [rate.low, rate.high]
}

/// Differences of loss that say what memory is worth, as far as both sides were measured.
fn differences(evaluations: &[Evaluation]) -> impl Iterator<Item = (String, Rate)> {
    let pairs = [
        ("fetched", "always_on"),
        ("fetched", "none"),
        ("fetched", "generic"),
        ("fetched", "random"),
        ("always_on", "none"),
    ];
    let name = |a: &str, b: &str| format!("{a} - {b}");
    pairs.into_iter().filter_map(move |(a, b)| Some((name(a, b), loss_difference(evaluations, a, b)?)))
}

/// Loss with memory `a` less that with `b`, nats a token; resampled by sequence, each against itself.
fn loss_difference(evaluations: &[Evaluation], a: &str, b: &str) -> Option<Rate> {
    let mut sums = vec![];
    for evaluation in evaluations {
        let sequences = |memory| Some(&evaluation.memories.get(memory)?.held_out.sequences);
        let pairs = sequences(a)?.iter().zip(sequences(b)?);
        sums.extend(pairs.map(|(a, b)| (a.nats - b.nats, a.tokens)));
    }
    per_token(&sums)
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
    let losses = MEMORIES.map(|memory| (memory.to_string(), loss(evaluations, memory)));
    let of_loss = |value: &dyn Fn(Rate) -> f64| -> BTreeMap<String, Option<f64>> {
        losses.iter().map(|(memory, loss)| (memory.clone(), loss.map(value))).collect()
    };
    let [exact, held_out, chosen] = [Recall::Exact, Recall::ExactHeldOut, Recall::Chosen]
        .map(|what| MEMORIES.map(|memory| (memory.to_string(), recall(evaluations, memory, what))));
    let of_memory = |value: &dyn Fn(&Measured) -> u64| -> BTreeMap<String, Option<u64>> {
        let measured = |memory: &str| evaluations.first().and_then(|e| e.memories.get(memory));
        MEMORIES.iter().map(|memory| (memory.to_string(), measured(memory).map(value))).collect()
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
        loss: of_loss(&|loss| loss.mean),
        perplexity: of_loss(&|loss| loss.mean.exp()),
        exact_match: each(&exact, |rate| rate.mean),
        exact_match_held_out: each(&held_out, |rate| rate.mean),
        choice: each(&chosen, |rate| rate.mean),
        intervals: Intervals {
            loss: losses.iter().map(|(memory, loss)| (memory.clone(), loss.map(interval))).collect(),
            exact_match: each(&exact, interval),
            exact_match_held_out: each(&held_out, interval),
            choice: each(&chosen, interval),
        },
        loss_difference: differences(evaluations)
            .map(|(pair, rate)| (pair, (rate.mean, interval(rate))))
            .collect(),
        parameters: of_memory(&|measured| measured.parameters),
        tokens: of_memory(&|measured| measured.tokens),
        exact_match_by_relation: grouped(&|question| question.relation.clone()),
        perplexity_by_label: labels(evaluations),
        purity_by_level: evaluations.first().map_or(vec![], |e| e.purity.clone()),
        seconds: evaluations.iter().map(|e| e.seconds).sum(),
        peak_rss_mb: peak_rss_mb(),
        tokens_per_s: evaluations.iter().map(|e| e.tokens_per_s).sum::<f64>() / evaluations.len() as f64,
        seeds: evaluations.iter().map(|e| e.seed).collect(),
    }
}

/// One value of each rate, by memory and bucket.
fn each<T>(rates: &[(String, Vec<Option<Rate>>)], value: fn(Rate) -> T) -> BTreeMap<String, Vec<Option<T>>> {
    let row = |rates: &Vec<Option<Rate>>| rates.iter().map(|rate| rate.map(value)).collect();
    rates.iter().map(|(memory, rates)| (memory.clone(), row(rates))).collect()
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

/// The table of memories that ends every evaluation; a dash is what was not measured.
pub(crate) fn table(evaluations: &[Evaluation]) -> String {
    let mut text = format!(
        "{:<10} {:>7} {:>18} {:>10} {:>11} {:>12}",
        "memory", "loss", "95 %", "perplexity", "parameters", "tokens"
    );
    let has_questions = evaluations.iter().any(|e| !e.questions.is_empty());
    if has_questions {
        text += "   exact match, rarest bucket first";
    }
    text.push('\n');
    let dash = || "–".to_string();
    for memory in MEMORIES {
        let Some(measured) = evaluations[0].memories.get(memory) else { continue };
        let loss = loss(evaluations, memory);
        text += &format!(
            "{memory:<10} {:>7} {:>18} {:>10} {:>11} {:>12}",
            loss.map_or_else(dash, |loss| format!("{:.4}", loss.mean)),
            loss.map_or_else(dash, |loss| format!("[{:.4}, {:.4}]", loss.low, loss.high)),
            loss.map_or_else(dash, |loss| format!("{:.2}", loss.mean.exp())),
            measured.parameters,
            measured.tokens
        );
        for rate in recall(evaluations, memory, Recall::Exact).into_iter().filter(|_| has_questions) {
            text += &rate.map_or("      –".into(), |rate| {
                format!("  {:>5.1} % [{:.1}, {:.1}]", rate.mean * 100.0, rate.low * 100.0, rate.high * 100.0)
            });
        }
        text.push('\n');
    }
    for (pair, rate) in differences(evaluations) {
        text += &format!("loss, {pair}: {:+.4} [{:+.4}, {:+.4}]\n", rate.mean, rate.low, rate.high);
    }
    let notes =
        MEMORIES.iter().filter_map(|memory| Some((memory, evaluations[0].memories.get(memory)?.note)));
    for (memory, note) in notes.filter(|(_, note)| !note.is_empty()) {
        text += &format!("{memory}: {note}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_is_the_same_in_long_and_short_sequences_has_no_spread() {
        let equal: Vec<(f64, u64)> = (1..60).map(|tokens| (2.5 * tokens as f64, tokens)).collect();
        let rate = per_token(&equal).unwrap();
        assert!((rate.mean - 2.5).abs() < 1e-12 && rate.high - rate.low < 1e-9, "{rate:?}");
        // Each loss is 2 or 3 with equal chance: the mean of n has a standard error of 0.5 / √n.
        let spread: Vec<(f64, u64)> =
            (0..400).map(|i| (f64::from(2 + i % 2) * f64::from(1 + i % 7), 1 + (i % 7) as u64)).collect();
        let rate = per_token(&spread).unwrap();
        assert!(rate.low < 2.5 && 2.5 < rate.high && rate.high - rate.low < 0.14, "{rate:?}");
        assert_eq!(per_token(&[]), None);
    }
}
