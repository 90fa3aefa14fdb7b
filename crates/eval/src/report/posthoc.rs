//! The page of memory added to a checkpoint: what each way to learn gained, and what it damaged.

use serde::{Deserialize, Serialize};

use super::axis::{Scale, drawable, extent};
use super::charts::{RecallChart, known};
use super::format::{ABSENT, compact, count, decimal, escape, percent, perplexity, sentence_list};
use super::page::Frame;
use super::palette::{look, rank};
use super::sections::{figure, label_section, section};
use super::svg::Svg;
use super::tables::{name, number, recall_table, table};
use super::{LabelRow, RecallRow};
use crate::Rate;

/// All that the page shows; `posthoc.json`. Methods are named `before`, `memory`, `generic`, `lora`, `full` and
/// `replay`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Posthoc {
    /// The folder of all runs.
    pub run: String,
    /// Facts, each a name and a value ready to print.
    pub summary: Vec<(String, String)>,
    /// What was learned, in a few words.
    pub learned: String,
    /// What was not.
    pub kept: String,
    /// The checkpoint as it was, and what became of it.
    pub methods: Vec<MethodRow>,
    /// Labels of the buckets, rarest first.
    pub buckets: Vec<String>,
    /// Exact answers about what was learned, by how often it has the word that is asked for.
    pub recall: Vec<RecallRow>,
    /// How often the true answer is the likeliest of the choices.
    pub choice: Vec<RecallRow>,
    /// Perplexity of what was not learned, by label of the document.
    pub labels: Vec<LabelRow>,
    /// What the model card says of the run, by the names of its places.
    pub card: std::collections::BTreeMap<String, String>,
}

/// One way to learn.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MethodRow {
    /// Its name.
    pub method: String,
    /// Parameters that were trained.
    pub trained: u64,
    /// Parameters that a token uses.
    pub used: u64,
    /// Targets trained on, of one seed.
    pub tokens: u64,
    /// Targets a second while training, mean of the seeds.
    pub tokens_per_s: f64,
    /// On what was learned.
    pub learned: Side,
    /// On what was not.
    pub kept: Side,
}

/// What was measured on one kind of text, all seeds together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// Perplexity of held-out text; the interval is over its sequences.
    pub perplexity: Rate,
    /// Of each seed.
    pub by_seed: Vec<f64>,
    /// Nats a token above the checkpoint as it was, sequence by sequence; none of that itself.
    pub change: Option<Rate>,
    /// Questions answered to the letter.
    pub exact: Option<Rate>,
    /// Questions whose answer is the likeliest of the choices.
    pub chosen: Option<Rate>,
}

/// A method's place on the plane of gain and damage, nats a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Loss on what was learned, less than before.
    pub gain: f64,
    /// Loss on what was not, more than before.
    pub damage: f64,
}

impl MethodRow {
    /// Gain and damage; none of the checkpoint itself.
    pub fn reading(&self) -> Option<Reading> {
        let (gain, damage) = (-self.learned.change?.mean, self.kept.change?.mean);
        Some(Reading { gain, damage })
    }
}

/// The page; it needs nothing else. Every text is escaped.
pub fn posthoc_html(study: &Posthoc) -> String {
    let mut study = study.clone();
    study.methods.sort_by_key(|row| rank(&row.method));
    let frame = Frame { kind: "Gain and damage", run: &study.run, summary: &study.summary };
    let all = [
        plane(&study),
        side(&study, true),
        recall(&study),
        side(&study, false),
        labels(&study),
        cost(&study),
    ];
    frame.page(&findings(&study), &all.into_iter().flatten().collect::<String>())
}

/// Sentences about what was found, the most telling first.
fn findings(study: &Posthoc) -> Vec<String> {
    let row = |method: &str| study.methods.iter().find(|row| row.method == method);
    let (Some(before), Some(memory)) = (row("before"), row("memory")) else {
        return vec!["Nothing was measured.".into()];
    };
    let took = |row: &MethodRow| {
        format!(
            "the perplexity of {} from {} to {}, and that of {} from {} to {}",
            study.learned,
            perplexity(before.learned.perplexity.mean),
            perplexity(row.learned.perplexity.mean),
            study.kept,
            perplexity(before.kept.perplexity.mean),
            perplexity(row.kept.perplexity.mean)
        )
    };
    let mut found = vec![format!("Memory took {}.", took(memory))];
    let others: Vec<String> = study
        .methods
        .iter()
        .filter(|row| !["before", "memory"].contains(&row.method.as_str()))
        .map(|row| {
            format!(
                "{} {} and {}",
                look(&row.method).short,
                perplexity(row.learned.perplexity.mean),
                perplexity(row.kept.perplexity.mean)
            )
        })
        .collect();
    if !others.is_empty() {
        found.push(format!("At equal steps the others came to: {}.", sentence_list(&others)));
    }
    found.push("Without its memory the model is what it was, to the bit.".into());
    found
}

/// Gain to the right, damage upwards: one mark a method, with intervals.
fn plane(study: &Posthoc) -> Option<String> {
    let rows: Vec<(&MethodRow, Reading)> =
        study.methods.iter().filter_map(|row| Some((row, row.reading()?))).collect();
    let interval = |rate: Option<Rate>, sign: f64| rate.map_or([0.0; 2], |r| [r.low * sign, r.high * sign]);
    let gains = rows.iter().flat_map(|(row, _)| interval(row.learned.change, -1.0)).chain([0.0]);
    let damages = rows.iter().flat_map(|(row, _)| interval(row.kept.change, 1.0)).chain([0.0]);
    let (gains, damages) = (extent(gains)?, extent(damages)?);
    let draw = |width: f64, height: f64| {
        let x = Scale::new(gains, (46.0, width - 92.0)).rounded();
        let y = Scale::new(damages, (height - 40.0, 26.0)).rounded();
        let mut svg = Svg::new(width, height);
        svg.text("t", (0.0, 12.0), "damage: nats a token above before");
        for tick in y.ticks() {
            svg.line("grid", (46.0, y.at(tick)), (width - 92.0, y.at(tick)));
            svg.text("t end", (40.0, y.at(tick) + 4.0), &decimal(tick, y.tick_digits()));
        }
        for tick in x.ticks() {
            svg.text("t mid", (x.at(tick), height - 22.0), &decimal(tick, x.tick_digits()));
        }
        svg.text("t mid", (width / 2.0, height - 4.0), "gain: nats a token below before");
        svg.line("axis", (46.0, y.at(0.0)), (width - 92.0, y.at(0.0)));
        svg.line("axis", (x.at(0.0), height - 40.0), (x.at(0.0), 26.0));
        let mut labels: Vec<(f64, f64)> = vec![];
        for (row, reading) in &rows {
            let (look, at) = (look(&row.method), (x.at(reading.gain), y.at(reading.damage)));
            let [low, high] = interval(row.learned.change, -1.0).map(|v| x.at(v));
            let [bottom, top] = interval(row.kept.change, 1.0).map(|v| y.at(v));
            svg.open_group(look.class);
            svg.line("interval", (low, at.1), (high, at.1));
            svg.line("interval", (at.0, bottom), (at.0, top));
            svg.mark(look.mark, at, Some(look.meaning));
            let mut label = (at.0 + 9.0, at.1 - 6.0);
            // Below those it would lie over.
            while labels.iter().any(|l| (l.0 - label.0).abs() < 70.0 && (l.1 - label.1).abs() < 13.0) {
                label.1 += 13.0;
            }
            svg.text("t name", label, look.short);
            labels.push(label);
            svg.close_group();
        }
        svg.finish("chart", "gain on what was learned against damage to what was not, by method")
    };
    let about = "How much lower the loss on held-out text of what was learned became, and how much higher that on \
                 what was not. Right and low is good; the checkpoint as it was is where the axes cross; bars are \
                 95\u{202f}% intervals.";
    (!rows.is_empty()).then(|| section("Gain and damage", about, &figure(draw)))
}

fn cell(rate: Option<&Rate>, format: impl Fn(f64) -> String) -> String {
    match rate.and_then(known) {
        Some(rate) => {
            number(&format!("{}<small>{}–{}</small>", format(rate.mean), format(rate.low), format(rate.high)))
        }
        None => number(ABSENT),
    }
}

fn side(study: &Posthoc, is_learned: bool) -> Option<String> {
    let of = |row: &MethodRow| if is_learned { row.learned.clone() } else { row.kept.clone() };
    let percents = |value: f64| percent(value, 1);
    let row = |row: &MethodRow| {
        let side = of(row);
        let seeds: Vec<String> = side.by_seed.iter().map(|value| perplexity(*value)).collect();
        let aside = look(&row.method).meaning;
        format!(
            "<th scope=\"row\">{}<small>{}</small></th>{}{}{}{}{}",
            name(&row.method),
            escape(aside),
            cell(Some(&side.perplexity), perplexity),
            cell(side.change.as_ref(), |value| decimal(value, 3)),
            cell(side.exact.as_ref(), percents),
            cell(side.chosen.as_ref(), percents),
            number(&seeds.join(" "))
        )
    };
    let head = "<th></th><th class=\"n\">perplexity</th><th class=\"n\">nats a token above before</th>\
                <th class=\"n\">answered, %</th><th class=\"n\">chosen, %</th>\
                <th class=\"n quiet\">perplexity by seed</th>";
    let rows: Vec<String> = study.methods.iter().map(row).collect();
    let (title, what) = match is_learned {
        true => (format!("What was learned: {}", study.learned), "held-out documents of it"),
        false => (format!("What was not: {}", study.kept), "documents that no method read"),
    };
    let asked = study.methods.iter().find_map(|row| of(row).exact.map(|rate| rate.n)).unwrap_or(0);
    let about = format!(
        "Perplexity of {what}. Answered: questions completed to the letter; chosen: those whose answer is likelier \
         than three others. {} answers a row; intervals are of 95\u{202f}%.",
        count(asked as u64)
    );
    (!rows.is_empty()).then(|| section(&title, &about, &table(&title, head, &rows)))
}

fn recall(study: &Posthoc) -> Option<String> {
    let across = "how often what was learned has the word, rarest first, for";
    let part = |rows: &[RecallRow], measure: &str| {
        let chart = RecallChart { rows, buckets: &study.buckets, across, measure };
        let label = format!("{measure}, %");
        figure(|width, height| chart.draw(width, height * 0.85))
            + &recall_table(rows, &study.buckets, (&label, "answers"))
    };
    let body = part(&study.choice, "chosen") + &part(&study.recall, "answered");
    let about = "Questions about what was learned, by how often its training text has the word that is asked for: \
                 first how often the true word is the likeliest of four, then how often it is written to the letter.";
    (!study.recall.is_empty()).then(|| section("By frequency", about, &body))
}

fn labels(study: &Posthoc) -> Option<String> {
    label_section(&study.labels, "What was not learned, by label")
}

fn cost(study: &Posthoc) -> Option<String> {
    let row = |row: &MethodRow| {
        let rate = if drawable(row.tokens_per_s) && row.tokens_per_s > 0.0 {
            compact(row.tokens_per_s)
        } else {
            ABSENT.into()
        };
        let cells = [count(row.trained), count(row.used), count(row.tokens), rate];
        format!("<th scope=\"row\">{}</th>{}", name(&row.method), cells.map(|text| number(&text)).concat())
    };
    let head = "<th></th><th class=\"n\">parameters trained</th><th class=\"n\">a token uses</th>\
                <th class=\"n\">tokens trained on</th><th class=\"n\">tokens a second</th>";
    let rows: Vec<String> = study.methods.iter().map(row).collect();
    let about = "All methods begin with the same checkpoint and take as many steps of as many sequences. Speed is that \
                 of training, validation and checkpoints included.";
    (!rows.is_empty()).then(|| section("What it took", about, &table("cost by method", head, &rows)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::assert_sound;
    use super::*;

    fn rate(mean: f64) -> Rate {
        Rate { mean, low: mean * 0.9, high: mean * 1.1, n: 120 }
    }

    fn study() -> Posthoc {
        let side = |perplexity, change: Option<f64>| Side {
            perplexity: rate(perplexity),
            by_seed: vec![perplexity, perplexity + 0.5],
            change: change.map(rate),
            exact: Some(rate(0.2)),
            chosen: None,
        };
        let row = |method: &str, learned, kept| MethodRow {
            method: method.into(),
            trained: 1_234_567,
            learned: side(40.0, learned),
            kept: side(30.0, kept),
            ..MethodRow::default()
        };
        let recall = ["before", "memory", "full"].map(|memory| RecallRow {
            memory: memory.into(),
            buckets: vec![Some(rate(0.1)), None, Some(rate(0.3)), None, None],
        });
        Posthoc {
            run: "runs/<posthoc>".into(),
            learned: "a <book>".into(),
            kept: "four others".into(),
            methods: vec![
                row("full", Some(-0.5), Some(0.8)),
                row("memory", Some(-0.4), Some(0.01)),
                row("before", None, None),
            ],
            buckets: ["1–2", "3–9", "10–40", "41–99", "100–"].map(String::from).to_vec(),
            recall: recall.to_vec(),
            choice: recall.to_vec(),
            labels: vec![LabelRow {
                label: "us-history".into(),
                tokens: 10,
                by_memory: vec![("before".into(), 30.0), ("memory".into(), f64::NAN)],
            }],
            ..Posthoc::default()
        }
    }

    #[test]
    fn the_page_is_sound_and_memory_comes_before_what_it_is_compared_with() {
        let study = study();
        let page = posthoc_html(&study);
        assert_sound(&page);
        assert!(page.contains("Memory took the perplexity of a &lt;book&gt; from 40.00 to 40.00"), "{page}");
        let place = |text: &str| page.find(text).unwrap();
        // Charts tell of methods too.
        let table = &page[place("What was learned")..];
        let row = |text: &str| table.find(text).unwrap();
        assert!(row("the checkpoint as it was<") < row("the blocks that a text fetches"));
        assert!(
            page.contains("Gain and damage") && page.contains("By frequency") && page.contains("us-history")
        );
        let reading = study.methods[1].reading().unwrap();
        assert_eq!((reading.gain, reading.damage), (0.4, 0.01));
        assert_eq!(study.methods[2].reading(), None);
        let json = serde_json::to_string(&Posthoc { labels: vec![], ..study.clone() }).unwrap();
        assert_eq!(serde_json::from_str::<Posthoc>(&json).unwrap(), Posthoc { labels: vec![], ..study });
    }

    #[test]
    fn a_page_of_nothing_says_so() {
        assert!(posthoc_html(&Posthoc::default()).contains("Nothing was measured."));
    }
}
