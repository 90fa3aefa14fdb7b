//! The sections of the page, each none when it has nothing to show.

use super::axis::drawable;
use super::charts::{RecallChart, cluster_chart, loss_chart};
use super::format::{compact, count, escape, percent, perplexity, plural, shorten};
use super::palette::rank;
use super::strip::Strip;
use super::tables::{Comparison, Line, memory_table, name, recall_table};
use super::{Curve, LabelRow, RelationRow, Report, Sample};

/// Rows of a long table that are shown.
const ROWS: usize = 40;
/// Samples that are shown.
const SAMPLES: usize = 24;
/// Curves that are shown.
const CURVES: usize = 8;
/// Characters of a sample's text that are shown.
const SAMPLE_TEXT: usize = 400;

/// What the charts of recall compare, for those who cannot see them.
const BUCKETS: &str = "frequency bucket, rarest first, for memory";

/// Every section with something to show.
pub(super) fn sections(report: &Report) -> String {
    let all = [
        recall(report),
        choice(report),
        recall_held_out(report),
        memories(report),
        relations(report),
        labels(report),
        samples(report),
        curves(report),
        clusters(report),
    ];
    all.into_iter().flatten().collect()
}

/// A section; `about` says how to read it, `body` is markup.
pub(super) fn section(title: &str, about: &str, body: &str) -> String {
    format!(
        "<section>\n<h2>{}</h2>\n<p class=\"about\">{}</p>\n{body}</section>\n",
        escape(title),
        escape(about)
    )
}

/// The same chart for a desktop and for a phone, so that text keeps its size on both; one of them is shown.
pub(super) fn figure(draw: impl Fn(f64, f64) -> String) -> String {
    format!(
        "<figure><div class=\"wide\">{}</div><div class=\"narrow\">{}</div></figure>\n",
        draw(720.0, 380.0),
        draw(328.0, 300.0)
    )
}

fn recall(report: &Report) -> Option<String> {
    let (rows, buckets) = (&report.recall[..], &report.buckets[..]);
    let chart = RecallChart { rows, buckets, across: BUCKETS, measure: "exact match" };
    let about = "Closed-book questions in the wording of the training text: the share answered to the letter, by \
                 how often that text names the entity. Rarest entities at the left; bars are 95\u{202f}% intervals.";
    let body = figure(|width, height| chart.draw(width, height))
        + &recall_table(rows, buckets, ("exact match, %", "questions"));
    (!rows.is_empty()).then(|| section("Recall by frequency", about, &body))
}

fn recall_held_out(report: &Report) -> Option<String> {
    let (rows, buckets) = (&report.recall_held_out[..], &report.buckets[..]);
    let chart = RecallChart { rows, buckets, across: BUCKETS, measure: "exact match" };
    let about = "The same facts asked in a wording that the training text never uses.";
    let body = figure(|width, height| chart.draw(width, height * 0.85))
        + &recall_table(rows, buckets, ("exact match, %", "questions"));
    (!rows.is_empty()).then(|| section("Recall in a new wording", about, &body))
}

fn choice(report: &Report) -> Option<String> {
    let (rows, buckets) = (&report.recall_choice[..], &report.buckets[..]);
    let chart = RecallChart { rows, buckets, across: BUCKETS, measure: "true answer likeliest" };
    let about =
        "The same questions by choice: how often the true answer is likelier than every other choice.";
    let body = figure(|width, height| chart.draw(width, height * 0.85))
        + &recall_table(rows, buckets, ("true answer likeliest, %", "questions"));
    (!rows.is_empty()).then(|| section("Recall by choice", about, &body))
}

fn memories(report: &Report) -> Option<String> {
    let about = "Documents that were never trained on, read with each kind of memory. Further left is better; \
                 bars are 95\u{202f}% intervals.";
    (!report.memories.is_empty()).then(|| section("Held-out text", about, &memory_table(&report.memories)))
}

fn relations(report: &Report) -> Option<String> {
    let mut rows: Vec<_> = report.relations.iter().collect();
    rows.sort_by(|a, b| b.n.cmp(&a.n).then_with(|| a.relation.cmp(&b.relation)));
    rows.truncate(ROWS);
    let line = |row: &&RelationRow| fetched_or_best(&row.by_memory);
    rows.sort_by(|a, b| line(b).total_cmp(&line(a)));
    let values = rows.iter().flat_map(|row| row.by_memory.iter().map(|(_, share)| *share));
    let comparison = Comparison {
        strip: Strip::linear(values.chain([0.0])),
        lines: rows
            .iter()
            .map(|row| Line { name: &row.relation, weight: row.n as u64, by_memory: &row.by_memory })
            .collect(),
        heads: ("relation", "questions"),
        format: |share| percent(share, 1),
    };
    let about = format!(
        "Exact match in percent, by what is asked about the entity{}",
        left_off(report.relations.len(), "questions")
    );
    (!rows.is_empty()).then(|| section("Recall by relation", &about, &comparison.table()))
}

/// The share of fetched memory, or else the best; a row without any sorts last.
fn fetched_or_best(by_memory: &[(String, f64)]) -> f64 {
    let fetched = by_memory.iter().find(|(memory, share)| memory == "fetched" && drawable(*share));
    let best =
        || by_memory.iter().map(|(_, share)| *share).filter(|share| drawable(*share)).fold(-1.0, f64::max);
    fetched.map_or_else(best, |(_, share)| *share)
}

fn labels(report: &Report) -> Option<String> {
    label_section(&report.labels, "Perplexity by label")
}

/// Perplexity by label of the document.
pub(super) fn label_section(labels: &[LabelRow], title: &str) -> Option<String> {
    let mut rows: Vec<_> = labels.iter().collect();
    rows.sort_by(|a, b| b.tokens.cmp(&a.tokens).then_with(|| a.label.cmp(&b.label)));
    rows.truncate(ROWS);
    let values = rows.iter().flat_map(|row| row.by_memory.iter().map(|(_, perplexity)| *perplexity));
    let comparison = Comparison {
        strip: Strip::logarithmic(values),
        lines: rows
            .iter()
            .map(|row| Line { name: &row.label, weight: row.tokens, by_memory: &row.by_memory })
            .collect(),
        heads: ("label", "tokens"),
        format: perplexity,
    };
    let about = format!(
        "Perplexity on held-out text, by label of the document; strips are logarithmic, further left is better{}",
        left_off(labels.len(), "tokens")
    );
    (!rows.is_empty()).then(|| section(title, &about, &comparison.table()))
}

/// How a sentence about a table ends that shows `ROWS` of `n` rows, those with the most `weight`.
fn left_off(n: usize, weight: &str) -> String {
    match n > ROWS {
        true => format!(". Shown are the {ROWS} of {} with the most {weight}.", count(n as u64)),
        false => ".".into(),
    }
}

fn samples(report: &Report) -> Option<String> {
    let shown = report.samples.len().min(SAMPLES);
    let about = match shown < report.samples.len() {
        true => format!("The first {shown} of {}. ", plural(report.samples.len() as u64, "sample")),
        false => String::new(),
    } + "What the model writes after the prompt; ✓ where it begins with the true answer.";
    let body: String = report.samples[..shown].iter().map(sample).collect();
    (shown > 0).then(|| section("Samples", &about, &format!("<div class=\"samples\">\n{body}</div>\n")))
}

fn sample(sample: &Sample) -> String {
    let text = |text: &str| escape(&shorten(text, SAMPLE_TEXT));
    let mut outputs: Vec<&(String, String)> = sample.outputs.iter().collect();
    outputs.sort_by_key(|(memory, _)| rank(memory));
    let output = |(memory, output): &&(String, String)| {
        let right = begins_with(output, &sample.answer);
        let mark = if right { "<b aria-label=\"right\">✓</b> " } else { "" };
        let class = if right { " class=\"right\"" } else { "" };
        let said = match output.trim() {
            "" => "<i>nothing</i>".into(),
            said => text(said),
        };
        format!("<dt>{}</dt><dd{class} dir=\"auto\">{mark}{said}</dd>\n", name(memory))
    };
    let outputs: String = outputs.iter().map(output).collect();
    let path = match sample.path.is_empty() {
        true => String::new(),
        false => format!("<p class=\"path\">path {}</p>\n", text(&sample.path)),
    };
    let (prompt, answer) = (text(sample.prompt.trim_end()), text(sample.answer.trim()));
    format!(
        "<article>\n<p class=\"prompt\" dir=\"auto\">{prompt} <span class=\"answer\">{answer}</span></p>\n\
         <dl>\n{outputs}</dl>\n{path}</article>\n"
    )
}

/// Whether `output` begins with `answer` as a whole word.
fn begins_with(output: &str, answer: &str) -> bool {
    let answer = answer.trim();
    let rest = output.trim().strip_prefix(answer).filter(|_| !answer.is_empty());
    rest.is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
}

fn curves(report: &Report) -> Option<String> {
    let with_points = report.curves.iter().filter(|curve| curve.points.iter().any(|point| drawable(point.1)));
    let all: Vec<_> = with_points.cloned().collect();
    let shown = &all[..all.len().min(CURVES)];
    let last = shown.iter().flat_map(|curve| curve.points.iter().map(|point| point.0)).max()?;
    let late = |curve: &Curve| curve.points.iter().filter(|point| point.0 >= last / 2).count();
    let size = (348.0, 250.0);
    let panel = |title: &str, from: u64| {
        format!("<figure><figcaption>{title}</figcaption>{}</figure>\n", loss_chart(shown, from, size))
    };
    let mut panels = panel("The whole run", 0);
    if shown.iter().map(late).max() >= Some(8) {
        panels += &panel("Its second half, enlarged", last / 2);
    }
    let mut about = "Loss by tokens seen.".to_string();
    if shown.iter().any(|curve| curve.validation) && shown.iter().any(|curve| !curve.validation) {
        about += " Dots: held-out documents. Thin: the batches trained on, averaged where they are many; the pale \
                  band is single batches.";
    }
    if shown.len() < all.len() {
        about += &format!(" Shown are the first {} of {} curves.", shown.len(), all.len());
    }
    Some(section("Loss while training", &about, &format!("<div class=\"panels two\">\n{panels}</div>\n")))
}

fn clusters(report: &Report) -> Option<String> {
    let panel = |(i, sizes): (usize, &Vec<u64>)| {
        let empty = sizes.iter().filter(|size| **size == 0).count();
        let (least, most) = (sizes.iter().min()?, sizes.iter().max()?);
        let n = plural(sizes.len() as u64, "cluster");
        let mut facts =
            format!("{n}, {} to {} documents each", compact(*least as f64), compact(*most as f64));
        if empty > 0 {
            facts += &format!(", {} empty", count(empty as u64));
        }
        let chart = cluster_chart(sizes, (164.0, 110.0));
        let caption = format!("Level {}<small>{facts}</small>", i + 1);
        Some(format!("<figure><figcaption>{caption}</figcaption>{chart}</figure>\n"))
    };
    let panels: String = report.cluster_sizes.iter().enumerate().filter_map(panel).collect();
    let about = "Documents per cluster at each level of the tree, largest cluster at the left. A flat outline is a \
                 balanced level.";
    let body = format!("<div class=\"panels four\">\n{panels}</div>\n");
    (!panels.is_empty()).then(|| section("The cluster tree", about, &body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_as_a_whole_word_only() {
        assert!(begins_with(" 12. Its", "12"));
        assert!(begins_with("12", " 12 "));
        assert!(!begins_with("123", "12"));
        assert!(!begins_with("It is 12", "12"));
        assert!(!begins_with("anything", ""));
    }
}
