//! What a run has found, in sentences made from its numbers.
//!
//! They state what was measured and leave the judgement to the reader; where intervals overlap they say so.

use super::axis::drawable;
use super::charts::{bucket_count, bucket_labels, in_order, known};
use super::format::{compact, count, decimal, perplexity, sentence_list, spoken_percent};
use super::palette::{look, phrase};
use super::{Curve, RecallRow, Report};
use crate::Rate;

/// The memories that fetched memory is compared with, the fairest first.
const CONTROLS: [&str; 3] = ["always_on", "generic", "none"];

/// Sentences about the run, the most telling first; never empty.
pub(super) fn findings(report: &Report) -> Vec<String> {
    let mut found: Vec<String> = vec![];
    found.extend(recall(report));
    found.extend(held_out(report));
    found.extend(loss(report));
    if found.is_empty() {
        found.push("Nothing was measured in this run.".into());
    }
    found
}

/// The (memory, value) pairs that a sentence compares: fetched memory, its fairest control, and no memory; or
/// the first of `pairs` if these are not there.
fn compared<'a, T: Copy>(pairs: &[(&'a str, T)]) -> Vec<(&'a str, T)> {
    let find = |wanted: &str| pairs.iter().find(|(memory, _)| *memory == wanted).copied();
    let mut chosen: Vec<(&str, T)> = find("fetched").into_iter().collect();
    chosen.extend(CONTROLS.into_iter().find_map(find));
    chosen.extend(find("none").filter(|_| chosen.last().is_some_and(|(memory, _)| *memory != "none")));
    match chosen.is_empty() {
        true => pairs.iter().take(1).copied().collect(),
        false => chosen,
    }
}

/// Exact match in the rarest bucket that was asked about, with fetched memory if there is any.
fn recall(report: &Report) -> Vec<String> {
    let n = bucket_count(&report.recall, &report.buckets);
    let rates = |bucket: usize| -> Vec<(&str, Rate)> {
        let rate = |row: &RecallRow| row.buckets.get(bucket)?.as_ref().and_then(known).copied();
        report.recall.iter().filter_map(|row| Some((row.memory.as_str(), rate(row)?))).collect()
    };
    let fetched =
        |memory: &str| memory == "fetched" || !report.recall.iter().any(|row| row.memory == "fetched");
    let asked = |bucket: &usize| rates(*bucket).iter().any(|(memory, _)| fetched(memory));
    let Some(bucket) = (0..n).find(asked) else { return vec![] };
    let rates = compared(&rates(bucket));
    let (labels, axis) = bucket_labels(&report.buckets, n);
    // Word joiners keep a range like 4–9 on one line.
    let label = format!("{} {axis}", labels[bucket]).replace('–', "\u{2060}–\u{2060}");
    let about = match bucket {
        0 => format!("the rarest entities ({})", label.trim_end()),
        _ => format!("entities of frequency {}", label.trim_end()),
    };
    let shares: Vec<String> = rates
        .iter()
        .enumerate()
        .map(|(i, (memory, rate))| {
            let of = if i == 0 { " of the questions to the letter" } else { "" };
            format!("{}{of} {}", spoken_percent(rate.mean), phrase(memory))
        })
        .collect();
    let mut sentences = vec![format!("Asked about {about}, the model answers {}.", sentence_list(&shares))];
    if let [(subject, a), (control, b), ..] = rates[..]
        && a.low <= b.high
        && b.low <= a.high
    {
        let (subject, control) = (phrase(subject), phrase(control));
        let n = count(a.n as u64);
        sentences.push(format!("The 95\u{202f}% intervals {subject} and {control} overlap there (n = {n})."));
    }
    sentences
}

/// Perplexity on held-out text.
fn held_out(report: &Report) -> Option<String> {
    let known = report.memories.iter().filter(|row| drawable(row.perplexity));
    let pairs: Vec<(&str, f64)> = known.map(|row| (row.memory.as_str(), row.perplexity)).collect();
    let values: Vec<String> = compared(&pairs)
        .iter()
        .map(|(memory, value)| format!("{} {}", perplexity(*value), phrase(memory)))
        .collect();
    (!values.is_empty()).then(|| format!("On held-out text, perplexity is {}.", sentence_list(&values)))
}

/// Where a loss began and ended: of the first validation curve, or of the first curve.
fn loss(report: &Report) -> Option<String> {
    let has_two = |curve: &&Curve| curve.points.iter().filter(|point| drawable(point.1)).count() > 1;
    let validated = report.curves.iter().filter(|curve| curve.validation).find(has_two);
    let curve = validated.or_else(|| report.curves.iter().find(has_two))?;
    let points = in_order(curve);
    let kind = if curve.validation { "Validation" } else { "Training" };
    let alone = report.curves.iter().filter(|other| other.validation == curve.validation).count() == 1;
    let of = if alone { String::new() } else { format!(" ({})", look(&curve.name).short) };
    if let Some((seen, _)) = points.iter().find(|point| !drawable(point.1)) {
        return Some(format!("{kind} loss{of} stopped being a number at {} tokens.", compact(*seen as f64)));
    }
    let (first, last) = (points.first()?, points.last()?);
    let (from, to) = (decimal(first.1, 2), decimal(last.1, 2));
    let tokens = compact(last.0 as f64);
    Some(match from == to {
        true => format!("{kind} loss{of} stayed at {to} nats per token over {tokens} tokens."),
        false => {
            let went = if last.1 < first.1 { "fell" } else { "rose" };
            format!("{kind} loss{of} {went} from {from} to {to} nats per token over {tokens} tokens.")
        }
    })
}
