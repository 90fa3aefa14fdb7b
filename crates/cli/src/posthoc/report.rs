//! posthoc.html, posthoc.json and the table, from what was measured.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use eval::report::{LabelRow, MethodRow, Posthoc, RecallRow, Side, card_places, count};
use eval::{Answer, HeldOut, N_BUCKETS, Question, Rate, TokenSum, bootstrap_mean};
use memory_bank::BlockStore;

use super::Seed;
use super::hand_over::card;
use super::measure::{Asked, Measured, OfText, Text};
use crate::config::{Config, Method, PosthocSection};
use crate::run::Run;
use crate::summary::per_token;

/// The checkpoint as it was, in rows and charts.
pub(super) const BEFORE: &str = "before";

/// Documents without a label, among the labels.
const NO_LABEL: &str = "(without a label)";

/// A method with what was measured of each seed.
type OfMethod<'a> = (&'static str, Vec<&'a Measured>);

/// Fails on what the model card has no place for.
pub(super) fn check_card(section: &PosthocSection) -> Result<()> {
    let places = card_places();
    match section.card.keys().find(|key| !places.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => bail!("posthoc.card.{key}: expected one of {}", places.join(", ")),
    }
}

/// All that the page shows, and the card of the first seed's memory.
pub(super) fn build(
    (config, section): (&Config, &PosthocSection),
    (run, command): (&Run, &str),
    asked: &Asked,
    (before, seeds): (&Measured, &[Seed]),
) -> Result<Posthoc> {
    let mut methods: Vec<OfMethod> = vec![(BEFORE, vec![before])];
    methods.extend(Method::ALL.into_iter().filter_map(|method| {
        let of_seed = |seed: &Seed| seed.methods.iter().position(|(found, _)| *found == method);
        let measured: Option<Vec<&Measured>> =
            seeds.iter().map(|seed| Some(&seed.methods[of_seed(seed)?].1)).collect();
        Some((method.name(), measured?))
    }));
    let choices = config.eval.choices;
    let row = |(name, measured): &OfMethod| method_row(name, (before, measured), (asked, choices));
    let recall = |property: fn(&Answer) -> bool| {
        let row = |(name, measured): &OfMethod| RecallRow {
            memory: name.to_string(),
            buckets: by_bucket(&asked.learned.questions, measured, property),
        };
        methods.iter().map(row).filter(|row| row.buckets.iter().any(Option::is_some)).collect::<Vec<_>>()
    };
    let of = |key: &str, otherwise: &str| section.card.get(key).cloned().unwrap_or_else(|| otherwise.into());
    let mut study = Posthoc {
        run: config.run.dir.display().to_string(),
        summary: summary((config, run), asked, (before, seeds)),
        learned: of("learned", "what was learned"),
        kept: of("other", "what was not"),
        methods: methods.iter().map(row).collect(),
        buckets: asked.learned.buckets.clone(),
        recall: recall(|answer| answer.exact),
        choice: if choices { recall(|answer| answer.chosen) } else { vec![] },
        labels: labels(&methods),
        card: BTreeMap::new(),
    };
    study.card = card((config, section), (run, command), asked, &study)?;
    Ok(study)
}

fn method_row(
    name: &str,
    (before, measured): (&Measured, &[&Measured]),
    (asked, choices): (&Asked, bool),
) -> MethodRow {
    let side = |of: fn(&Measured) -> &OfText, text: &Text| {
        let runs: Vec<&OfText> = measured.iter().map(|measured| of(measured)).collect();
        let before = (name != BEFORE).then(|| of(before));
        side((before, &runs), !text.questions.is_empty(), choices)
    };
    let mean = |of: fn(&Measured) -> f64| {
        measured.iter().map(|measured| of(measured)).sum::<f64>() / measured.len().max(1) as f64
    };
    let first = measured.first();
    MethodRow {
        method: name.into(),
        trained: first.map_or(0, |first| first.trained),
        used: first.map_or(0, |first| first.used),
        tokens: if name == BEFORE { 0 } else { first.map_or(0, |first| first.tokens) },
        tokens_per_s: if name == BEFORE { 0.0 } else { mean(|measured| measured.tokens_per_s) },
        learned: side(|measured| &measured.learned, &asked.learned),
        kept: side(|measured| &measured.kept, &asked.kept),
    }
}

fn side((before, runs): (Option<&OfText>, &[&OfText]), is_asked: bool, choices: bool) -> Side {
    let now: Vec<&[TokenSum]> = runs.iter().map(|run| &run.held_out.sequences[..]).collect();
    let loss = per_token(&over_seeds(&now, |_| 0.0)).unwrap_or_default();
    let change =
        before.and_then(|before| per_token(&over_seeds(&now, |i| before.held_out.sequences[i].nats)));
    let share = |property: fn(&Answer) -> bool| {
        let answers: Vec<&[Answer]> = runs.iter().map(|run| &run.answers[..]).collect();
        if is_asked { bootstrap_mean(&shares(&answers, |_| true, property)) } else { None }
    };
    Side {
        perplexity: Rate { mean: loss.mean.exp(), low: loss.low.exp(), high: loss.high.exp(), n: loss.n },
        by_seed: runs.iter().map(|run| TokenSum::total(&run.held_out.sequences).perplexity()).collect(),
        change,
        exact: share(|answer| answer.exact),
        chosen: if choices { share(|answer| answer.chosen) } else { None },
    }
}

/// Nats above `less` and tokens of each sequence, means of the runs: an interval is over texts, and seeds are not more
/// of them.
fn over_seeds(runs: &[&[TokenSum]], less: impl Fn(usize) -> f64) -> Vec<(f64, u64)> {
    let sequence = |(i, first): (usize, &TokenSum)| {
        let nats = runs.iter().map(|run| run[i].nats).sum::<f64>() / runs.len() as f64;
        (nats - less(i), first.tokens)
    };
    runs.first().map_or(vec![], |first| first.iter().enumerate().map(sequence).collect())
}

/// The share of the runs in which an answer has a property, for each question that `keep` admits.
fn shares(runs: &[&[Answer]], keep: impl Fn(usize) -> bool, property: fn(&Answer) -> bool) -> Vec<f64> {
    let n_questions = runs.first().map_or(0, |first| first.len());
    let share = |question: usize| {
        runs.iter().filter(|run| property(&run[question])).count() as f64 / runs.len() as f64
    };
    (0..n_questions).filter(|&question| keep(question)).map(share).collect()
}

fn by_bucket(
    questions: &[Question],
    measured: &[&Measured],
    property: fn(&Answer) -> bool,
) -> Vec<Option<Rate>> {
    let answers: Vec<&[Answer]> = measured.iter().map(|measured| &measured.learned.answers[..]).collect();
    let bucket = |bucket: usize| {
        bootstrap_mean(&shares(&answers, |question| questions[question].bucket == bucket, property))
    };
    (1..=N_BUCKETS).map(bucket).collect()
}

/// Perplexity of what was not learned by label, all seeds together.
fn labels(methods: &[OfMethod]) -> Vec<LabelRow> {
    let mut rows: Vec<LabelRow> = vec![];
    for (name, measured) in methods {
        let mut sums: BTreeMap<&str, Vec<TokenSum>> = BTreeMap::new();
        for measured in measured {
            let HeldOut { total, by_label, .. } = &measured.kept.held_out;
            let labelled = TokenSum::total(&by_label.values().copied().collect::<Vec<_>>());
            by_label.iter().for_each(|(label, sum)| sums.entry(label).or_default().push(*sum));
            // Plain text has no labels.
            if total.tokens > labelled.tokens {
                let rest =
                    TokenSum { nats: total.nats - labelled.nats, tokens: total.tokens - labelled.tokens };
                sums.entry(NO_LABEL).or_default().push(rest);
            }
        }
        for (label, sums) in sums {
            let value = (name.to_string(), TokenSum::total(&sums).perplexity());
            match rows.iter_mut().find(|row| row.label == label) {
                Some(row) => row.by_memory.push(value),
                None => {
                    let tokens = sums[0].tokens;
                    rows.push(LabelRow { label: label.into(), tokens, by_memory: vec![value] });
                }
            }
        }
    }
    rows
}

fn summary(
    (config, run): (&Config, &Run),
    asked: &Asked,
    (before, seeds): (&Measured, &[Seed]),
) -> Vec<(String, String)> {
    let checkpoint =
        config.anchor.checkpoint.as_ref().map_or(String::new(), |path| path.display().to_string());
    let mut facts = vec![
        ("checkpoint".to_string(), checkpoint),
        ("its parameters".into(), count(run.anchor.config().n_parameters())),
    ];
    if let Some(bank) = &run.bank {
        let spec = bank.store().spec();
        facts.push(("memory".into(), format!("{}, layers {}", spec.kind.name(), spec.layers)));
        facts.push(("fetched a text".into(), format!("{} parameters", count(spec.fetch_len()))));
        facts.push(("memory bank".into(), format!("{} parameters", count(spec.bank_len()))));
        let levels = spec.branching.iter().zip(&spec.width);
        let shape: Vec<String> = levels.map(|(k, r)| format!("× {k} (width {r})")).collect();
        facts.push(("cluster tree".into(), shape.join(" ")));
    }
    let train = &config.train;
    facts.push(("training".into(), format!("{} steps of {} sequences", train.steps, train.batch_size)));
    for (name, text, of_text) in [
        ("asked of what was learned", &asked.learned, &before.learned),
        ("asked of what was not", &asked.kept, &before.kept),
    ] {
        let n = (of_text.held_out.sequences.len(), text.questions.len());
        facts.push((name.into(), format!("{} held-out sequences, {} questions", n.0, n.1)));
    }
    let seeds: Vec<String> = seeds.iter().map(|seed| seed.seed.to_string()).collect();
    facts.push(("seeds".into(), seeds.join(", ")));
    facts.push(("version".into(), env!("CARGO_PKG_VERSION").into()));
    facts
}

/// The table that ends the command; a dash is what was not measured.
pub(super) fn table(study: &Posthoc) -> String {
    let mut text = format!(
        "{:<10} {:>12} {:>11} {:>10} {:>18} {:>10} {:>18} {:>11} {:>11}\n",
        "method", "trained", "tokens", "learned", "change", "kept", "change", "answered", "chosen"
    );
    let change = |side: &Side| match side.change {
        Some(Rate { mean, low, high, .. }) => format!("{mean:+.3} [{low:+.2}, {high:+.2}]"),
        None => "–".into(),
    };
    let share = |rate: Option<Rate>| rate.map_or("–".into(), |rate| format!("{:.1} %", rate.mean * 100.0));
    for row in &study.methods {
        text += &format!(
            "{:<10} {:>12} {:>11} {:>10.2} {:>18} {:>10.2} {:>18} {:>11} {:>11}\n",
            row.method,
            row.trained,
            row.tokens,
            row.learned.perplexity.mean,
            change(&row.learned),
            row.kept.perplexity.mean,
            change(&row.kept),
            share(row.learned.exact),
            share(row.learned.chosen)
        );
    }
    text + "learned, kept: perplexity of held-out text of what was learned, and of what was not; change: nats a\n\
            token above before, with 95 % intervals; answered, chosen: questions about what was learned\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_of_each_sequence_against_itself() {
        let of = |nats: [f64; 3]| {
            let sequences: Vec<TokenSum> =
                nats.into_iter().zip([10, 20, 30]).map(|(nats, tokens)| TokenSum { nats, tokens }).collect();
            let held_out = HeldOut { total: TokenSum::total(&sequences), sequences, ..Default::default() };
            OfText { held_out, answers: vec![Answer { exact: true, chosen: false }] }
        };
        // A tenth of a nat a token less, whatever the sequence.
        let (before, now) = (of([30.0, 20.0, 60.0]), of([29.0, 18.0, 57.0]));
        let side = side((Some(&before), &[&now, &now]), true, false);
        let change = side.change.unwrap();
        assert!((change.mean + 0.1).abs() < 1e-12 && change.high - change.low < 1e-9, "{change:?}");
        assert!((side.perplexity.mean.ln() - 104.0 / 60.0).abs() < 1e-12);
        assert_eq!((side.by_seed.len(), side.exact.unwrap().mean, side.chosen), (2, 1.0, None));
        // A seed more is not a text more.
        assert_eq!((change.n, side.exact.unwrap().n), (3, 1));
    }
}
