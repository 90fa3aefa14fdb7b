//! report.html and report.json of a run.

use std::path::Path;

use anyhow::{Context, Result};
use eval::report::{self, Curve, LabelRow, MemoryRow, RecallRow, RelationRow, Report, Sample};
use memory_bank::BlockStore;
use train::TrainState;

use crate::evaluate::{self, Evaluation, MEMORIES};
use crate::run::{Run, write_whole};
use crate::summary::{Recall, loss, recall, summarise};

/// Writes the report of a run beside its configuration.
pub(crate) fn write(run: &Run, evaluation: &Evaluation) -> Result<std::path::PathBuf> {
    let report = build(run, std::slice::from_ref(evaluation))?;
    write_whole(&run.dir.join("report.json"), serde_json::to_string(&report)?.as_bytes())?;
    let page = run.dir.join("report.html");
    write_whole(&page, report::html(&report).as_bytes())?;
    Ok(page)
}

fn build(run: &Run, evaluations: &[Evaluation]) -> Result<Report> {
    let evaluation = &evaluations[0];
    let row = |memory: &&str| {
        let loss = loss(evaluations, memory)?;
        let measured = &evaluation.memories[*memory];
        let mut note = format!("trained on {} tokens", measured.tokens);
        if !measured.note.is_empty() {
            note = format!("{}; {note}", measured.note);
        }
        let (memory, perplexity) = (memory.to_string(), loss.mean.exp());
        Some(MemoryRow { memory, loss, perplexity, parameters: measured.parameters, note })
    };
    let recall_rows = |what: Recall| -> Vec<RecallRow> {
        let measured = MEMORIES.iter().filter(|memory| evaluation.memories.contains_key(**memory));
        let rows = measured.map(|memory| RecallRow {
            memory: memory.to_string(),
            buckets: recall(evaluations, memory, what),
        });
        rows.filter(|row| row.buckets.iter().any(Option::is_some)).collect()
    };
    Ok(Report {
        run: run.dir.display().to_string(),
        summary: summary(run, evaluation)?,
        curves: curves(run)?,
        memories: MEMORIES.iter().filter_map(row).collect(),
        recall: recall_rows(Recall::Exact),
        recall_held_out: recall_rows(Recall::ExactHeldOut),
        recall_choice: recall_rows(Recall::Chosen),
        buckets: buckets(run)?,
        relations: relations(evaluations),
        labels: labels(evaluation),
        cluster_sizes: (0..run.tree.n_levels()).map(|level| run.tree.counts(level).to_vec()).collect(),
        samples: samples(evaluation),
    })
}

fn summary(run: &Run, evaluation: &Evaluation) -> Result<Vec<(String, String)>> {
    let mut facts =
        vec![("anchor".to_string(), format!("{} parameters", run.anchor.config().n_parameters()))];
    if let Some(bank) = &run.bank {
        let spec = bank.store().spec();
        facts.push(("fetched a text".into(), format!("{} parameters", spec.fetch_len())));
        facts.push(("memory bank".into(), format!("{} parameters", spec.bank_len())));
        let shape: Vec<String> =
            spec.branching.iter().zip(&spec.width).map(|(k, r)| format!("× {k} (width {r})")).collect();
        facts.push(("cluster tree".into(), shape.join(" ")));
    }
    let TrainState { step, tokens_seen, .. } = run.state;
    facts.push(("trained on".into(), format!("{tokens_seen} tokens in {step} steps")));
    facts.push(("training speed".into(), format!("{:.0} tokens a second", evaluation.tokens_per_s)));
    for (level, purity) in evaluation.purity.iter().enumerate() {
        facts.push((format!("label purity, level {}", level + 1), format!("{:.1} %", purity * 100.0)));
    }
    facts.push(("seed".into(), run.config.train.seed.to_string()));
    facts.push(("version".into(), env!("CARGO_PKG_VERSION").into()));
    Ok(facts)
}

/// Training and held-out loss of this run, its controls and the anchor they all began with, on one axis.
fn curves(run: &Run) -> Result<Vec<Curve>> {
    let init = run.config.anchor.init.as_deref();
    let offset = run.state.tokens_before;
    let own = if run.is_always_on() { "always_on" } else { "fetched" };
    let own = if run.bank.is_some() { own } else { "none" };
    let mut runs = vec![(own, run.dir.as_path(), offset)];
    runs.extend(run.config.eval.always_on.as_deref().map(|dir| ("always_on", dir, offset)));
    runs.extend(run.config.eval.none.as_deref().map(|dir| ("none", dir, offset)));
    runs.extend(init.map(|dir| ("anchor", dir, 0)));
    let mut curves = vec![];
    for (name, dir, offset) in runs {
        // A run is whole without the folders it began with or is compared with.
        if !dir.join("metrics.jsonl").exists() {
            continue;
        }
        let lines = train::read_metrics(&dir.join("metrics.jsonl"))?;
        let training = lines.iter().map(|line| (line.tokens_seen + offset, line.loss)).collect();
        let held_out: Vec<(u64, f64)> =
            lines.iter().filter_map(|l| Some((l.tokens_seen + offset, l.validation_loss?))).collect();
        curves.push(Curve { name: name.into(), validation: false, points: training });
        if held_out.len() > 1 {
            curves.push(Curve { name: name.into(), validation: true, points: held_out });
        }
    }
    Ok(curves)
}

/// What the five buckets mean, from facts.json beside the questions if it is there.
fn buckets(run: &Run) -> Result<Vec<String>> {
    let plain = || (1..=eval::N_BUCKETS).map(|bucket| format!("bucket {bucket}")).collect();
    let Some(folder) = run.config.eval.questions.as_deref().and_then(Path::parent) else {
        return Ok(plain());
    };
    let path = folder.join("facts.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(plain()) };
    let facts: corpus::facts::Summary =
        serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
    Ok(facts.buckets.iter().map(|bucket| format!("{} documents", bucket.documents_per_entity)).collect())
}

fn relations(evaluations: &[Evaluation]) -> Vec<RelationRow> {
    let by_memory = summarise(evaluations).exact_match_by_relation;
    let mut rows: Vec<RelationRow> = vec![];
    for memory in MEMORIES {
        for (relation, &exact) in by_memory.get(memory).into_iter().flatten() {
            let value = (memory.to_string(), exact);
            match rows.iter_mut().find(|row| row.relation == *relation) {
                Some(row) => row.by_memory.push(value),
                None => {
                    let asked = |q: &&eval::Question| q.relation == *relation && q.phrasing == eval::TRAIN;
                    let n = evaluations[0].questions.iter().filter(asked).count();
                    rows.push(RelationRow { relation: relation.clone(), n, by_memory: vec![value] });
                }
            }
        }
    }
    rows
}

fn labels(evaluation: &Evaluation) -> Vec<LabelRow> {
    let mut rows: Vec<LabelRow> = vec![];
    for memory in MEMORIES {
        let Some(measured) = evaluation.memories.get(memory) else { continue };
        for (label, sum) in &measured.held_out.by_label {
            let value = (memory.to_string(), sum.perplexity());
            match rows.iter_mut().find(|row| row.label == *label) {
                Some(row) => row.by_memory.push(value),
                None => {
                    rows.push(LabelRow { label: label.clone(), tokens: sum.tokens, by_memory: vec![value] })
                }
            }
        }
    }
    rows
}

fn samples(evaluation: &Evaluation) -> Vec<Sample> {
    let sample = |(n, i): (usize, usize)| {
        let outputs = MEMORIES.iter().filter_map(|memory| {
            let text = evaluation.memories.get(memory)?.samples.get(n)?;
            Some((memory.to_string(), text.clone()))
        });
        Sample {
            prompt: evaluation.questions[i].prompt.clone(),
            answer: evaluation.questions[i].answer.clone(),
            path: evaluation.routed[i].to_string(),
            outputs: outputs.collect(),
        }
    };
    evaluate::samples(&evaluation.questions).enumerate().map(sample).collect()
}
