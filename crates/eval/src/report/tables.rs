//! The tables. Numbers are right-aligned; a wide table scrolls sideways in its own box.

use super::charts::{bucket_count, bucket_labels, interval, known};
use super::format::{ABSENT, compact, count, decimal, escape, percent, perplexity, shorten};
use super::palette::{look, ordered, rank};
use super::strip::{Reading, Strip};
use super::svg::key;
use super::{MemoryRow, RecallRow};

/// Characters of a name in a table's first column, at most.
const NAME: usize = 80;

/// A table from its parts, all of them markup; `label` says what it holds.
pub(super) fn table(label: &str, head: &str, rows: &[String]) -> String {
    let rows: String = rows.iter().map(|row| format!("<tr>{row}</tr>\n")).collect();
    let label = escape(label);
    format!(
        "<div class=\"scroll\" role=\"region\" aria-label=\"{label}\" tabindex=\"0\"><table>\n\
         <thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
}

pub(super) fn number(text: &str) -> String {
    format!("<td class=\"n\">{text}</td>")
}

/// A memory's key and name.
pub(super) fn name(memory: &str) -> String {
    let look = look(memory);
    format!("<span class=\"who {}\">{}{}</span>", look.class, key(look), escape(&shorten(look.short, NAME)))
}

/// The head of the column of strips: the ends of their scale.
fn strip_head(strip: &Option<Strip>, format: impl Fn(f64) -> String) -> String {
    let Some(Strip { ends: (low, high), .. }) = strip else { return "<th></th>".into() };
    format!("<th class=\"ends\"><span>{}</span><span>{}</span></th>", format(*low), format(*high))
}

/// Loss on held-out documents by memory.
pub(super) fn memory_table(rows: &[MemoryRow]) -> String {
    let mut rows: Vec<&MemoryRow> = rows.iter().collect();
    rows.sort_by_key(|row| rank(&row.memory));
    let ends = rows.iter().flat_map(|row| [row.loss.low, row.loss.mean, row.loss.high]);
    let strip = Strip::linear(ends);
    let head = format!(
        "<th>memory</th>{}<th class=\"n\">nats per token</th><th class=\"n\">perplexity</th>\
         <th class=\"n\">parameters a token uses</th><th class=\"n\">n</th>",
        strip_head(&strip, |v| decimal(v, 2))
    );
    let row = |row: &&MemoryRow| {
        let asides: String = [look(&row.memory).meaning, &row.note]
            .into_iter()
            .filter(|aside| !aside.is_empty())
            .map(|aside| format!("<small>{}</small>", escape(aside)))
            .collect();
        let (mean, low, high) =
            (decimal(row.loss.mean, 3), decimal(row.loss.low, 3), decimal(row.loss.high, 3));
        let reading = Reading {
            memory: &row.memory,
            value: row.loss.mean,
            interval: Some((row.loss.low, row.loss.high)),
        };
        let label = format!("{}: {mean} nats per token, {low} to {high}", look(&row.memory).short);
        let drawn = strip.as_ref().map_or(String::new(), |strip| strip.draw(&[reading], &label));
        let loss = format!("{mean}<small>{low}–{high}</small>");
        let counts =
            [compact(row.parameters as f64), count(row.loss.n as u64)].map(|text| number(&text)).concat();
        let (name, perplexity) = (name(&row.memory), number(&perplexity(row.perplexity)));
        format!("<th scope=\"row\">{name}{asides}</th><td>{drawn}</td>{}{perplexity}{counts}", number(&loss))
    };
    table("held-out loss by memory", &head, &rows.iter().map(row).collect::<Vec<_>>())
}

/// Accuracy by bucket and memory, in percent, with intervals, and the number of `units` it rests on.
pub(super) fn recall_table(rows: &[RecallRow], buckets: &[String], (label, units): (&str, &str)) -> String {
    let n = bucket_count(rows, buckets);
    let mut rows: Vec<&RecallRow> = rows.iter().collect();
    rows.sort_by_key(|row| rank(&row.memory));

    let (labels, axis) = bucket_labels(buckets, n);
    let heads: String =
        labels.iter().map(|label| format!("<th class=\"n\">{}</th>", escape(label))).collect();
    let cell = |row: &RecallRow, bucket: usize| match row.buckets.get(bucket).and_then(|rate| rate.as_ref()) {
        Some(rate) if known(rate).is_some() => {
            number(&format!("{}<small>{}</small>", percent(rate.mean, 1), interval(rate)))
        }
        _ => number(ABSENT),
    };
    let mut body: Vec<String> = rows
        .iter()
        .map(|row| {
            let cells: String = (0..n).map(|bucket| cell(row, bucket)).collect();
            format!("<th scope=\"row\">{}</th>{cells}", name(&row.memory))
        })
        .collect();
    let asked =
        |bucket: usize| rows.iter().filter_map(|row| row.buckets.get(bucket)?.map(|rate| rate.n)).max();
    let asked: String =
        (0..n).map(|bucket| number(&asked(bucket).map_or(ABSENT.into(), |n| count(n as u64)))).collect();
    body.push(format!("<th scope=\"row\" class=\"quiet\">{units}</th>{asked}"));
    table(label, &format!("<th>{}</th>{heads}", escape(&axis)), &body)
}

/// One line of a [`Comparison`].
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    /// What the value rests on: questions, tokens.
    pub(super) weight: u64,
    pub(super) by_memory: &'a [(String, f64)],
}

/// A value by name and memory, with a strip that compares the memories.
pub(super) struct Comparison<'a> {
    pub(super) lines: Vec<Line<'a>>,
    /// Heads of the first and of the weight column.
    pub(super) heads: (&'a str, &'a str),
    pub(super) strip: Option<Strip>,
    pub(super) format: fn(f64) -> String,
}

impl Comparison<'_> {
    /// The table.
    pub(super) fn table(&self) -> String {
        let memories =
            ordered(self.lines.iter().flat_map(|line| line.by_memory).map(|(memory, _)| memory.as_str()));
        let heads: String =
            memories.iter().map(|memory| format!("<th class=\"n\">{}</th>", name(memory))).collect();
        let (first, weight) = self.heads;
        let strips = strip_head(&self.strip, self.format);
        let head = format!("<th>{first}</th>{strips}{heads}<th class=\"n quiet\">{weight}</th>");
        let rows: Vec<String> = self.lines.iter().map(|line| self.row(line, &memories)).collect();
        table(&format!("by {first} and memory"), &head, &rows)
    }

    fn row(&self, line: &Line<'_>, memories: &[&str]) -> String {
        let value =
            |memory: &str| line.by_memory.iter().find(|(name, _)| name == memory).map(|(_, value)| *value);
        let cells: String =
            memories.iter().map(|memory| number(&value(memory).map_or(ABSENT.into(), self.format))).collect();
        // The subject is drawn last, on top.
        let readings: Vec<Reading<'_>> = memories
            .iter()
            .filter(|memory| **memory != "fetched")
            .chain(memories.iter().filter(|memory| **memory == "fetched"))
            .filter_map(|memory| Some(Reading { memory, value: value(memory)?, interval: None }))
            .collect();
        let drawn = self.strip.as_ref().map_or(String::new(), |strip| strip.draw(&readings, line.name));
        let name = escape(&shorten(line.name, NAME));
        let weight = compact(line.weight as f64);
        format!("<th scope=\"row\">{name}</th><td>{drawn}</td>{cells}<td class=\"n quiet\">{weight}</td>")
    }
}
