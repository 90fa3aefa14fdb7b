//! A made-up run of realistic size, for tests.

use super::{Curve, LabelRow, MemoryRow, RecallRow, RelationRow, Report, Sample};
use crate::Rate;

const MEMORIES: [&str; 5] = ["none", "generic", "always_on", "fetched", "random"];
const RELATIONS: [&str; 9] = [
    "birth year",
    "capital",
    "atomic number",
    "profession",
    "founded in",
    "river",
    "mother tongue",
    "author",
    "currency",
];

/// A run with every section.
pub(super) fn report() -> Report {
    Report {
        run: "quickstart".into(),
        summary: summary(),
        curves: curves(4_000),
        memories: memories(),
        recall: recall([0.02, 0.04, 0.09, 0.41, 0.01], 0.12),
        recall_held_out: recall([0.01, 0.02, 0.03, 0.13, 0.01], 0.05),
        recall_choice: recall([0.21, 0.24, 0.31, 0.66, 0.19], 0.06),
        buckets: ["4–9", "10–29", "30–99", "100–299", "300–999"].map(|b| format!("{b} exposures")).to_vec(),
        relations: relations(),
        labels: labels(),
        cluster_sizes: [16, 256, 4096, 65_536].map(level).to_vec(),
        samples: samples(),
    }
}

fn summary() -> Vec<(String, String)> {
    let facts = [
        ("anchor", "6.9 M parameters"),
        ("fetched", "0.74 M per token"),
        ("bank", "188 M parameters, 16 / 256 / 4,096 blocks"),
        ("tokens", "65.5 M in 32,000 sequences"),
        ("time", "41 min 07 s"),
        ("machine", "2 × AMD EPYC, 24 GB, no GPU"),
        ("seed", "1"),
        ("version", "0.1.0 (4de720b)"),
    ];
    facts.map(|(name, value)| (name.into(), value.into())).to_vec()
}

/// A number from -0.5 to 0.5 that looks random and is the same for the same `i`.
fn noise(i: u64) -> f64 {
    let mixed = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f64 / (1u64 << 24) as f64 - 0.5
}

pub(super) fn curves(n: u64) -> Vec<Curve> {
    let tokens = 65_500_000;
    let loss = |seen: u64| 3.05 + 6.0 * (-(seen as f64) / 2.5e6).exp() + 0.9 * (-(seen as f64) / 3e7).exp();
    let point = |i: u64, n: u64, wobble: f64| {
        let seen = tokens * i / n;
        (seen, loss(seen) + wobble * noise(i))
    };
    let training = (1..=n).map(|i| point(i, n, 0.35)).collect();
    let validation = (0..=20).map(|i| point(i, 20, 0.01)).map(|(seen, loss)| (seen, loss + 0.06)).collect();
    vec![
        Curve { name: "training".into(), validation: false, points: training },
        Curve { name: "validation".into(), validation: true, points: validation },
    ]
}

fn rate(mean: f64, half: f64, n: usize) -> Rate {
    Rate { mean, low: mean - half, high: mean + half, n }
}

fn memories() -> Vec<MemoryRow> {
    let rows = [
        ("none", 3.412, 6_920_000, ""),
        ("generic", 3.371, 7_660_000, ""),
        ("always_on", 3.322, 7_660_000, "from the run quickstart-always-on"),
        ("fetched", 3.104, 7_660_000, ""),
        ("random", 3.468, 7_660_000, ""),
    ];
    rows.map(|(memory, loss, parameters, note)| MemoryRow {
        memory: memory.into(),
        loss: rate(loss, 0.021, 512),
        perplexity: f64::exp(loss),
        parameters,
        note: note.into(),
    })
    .to_vec()
}

fn recall(rarest: [f64; 5], gain: f64) -> Vec<RecallRow> {
    let bucket = |share: f64, i: usize| {
        let mean = (share + gain * i as f64).min(0.97);
        let half = 1.96 * (mean * (1.0 - mean) / 240.0).sqrt();
        Some(Rate { mean, low: (mean - half).max(0.0), high: (mean + half).min(1.0), n: 240 })
    };
    let row = |(memory, share): (&str, f64)| RecallRow {
        memory: memory.into(),
        buckets: (0..5).map(|i| bucket(share, i)).collect(),
    };
    MEMORIES.into_iter().zip(rarest).map(row).collect()
}

fn by_memory(i: usize, values: [f64; 5], wobble: f64) -> Vec<(String, f64)> {
    let value = |(k, value): (usize, f64)| (value * (1.0 + wobble * noise((i * 5 + k) as u64))).max(0.0);
    MEMORIES.iter().map(|m| m.to_string()).zip(values.into_iter().enumerate().map(value)).collect()
}

fn relations() -> Vec<RelationRow> {
    let row = |(i, relation): (usize, &&str)| RelationRow {
        relation: relation.to_string(),
        n: 120 + 7 * i,
        by_memory: by_memory(i, [0.08, 0.11, 0.2, 0.55, 0.06], 0.9),
    };
    RELATIONS.iter().enumerate().map(row).collect()
}

fn labels() -> Vec<LabelRow> {
    let row = |(i, label): (usize, &str)| LabelRow {
        label: label.into(),
        tokens: 900_000 / (i as u64 + 1),
        by_memory: by_memory(i, [30.3, 29.1, 27.7, 22.3, 32.1], 0.15)
            .into_iter()
            .map(|(m, p)| (m, p * (1.0 + i as f64 / 3.0)))
            .collect(),
    };
    ["Emma", "Moby-Dick; or, The Whale", "The Origin of Species", "Walden", "Ulysses"]
        .into_iter()
        .enumerate()
        .map(row)
        .collect()
}

fn level(n: u64) -> Vec<u64> {
    (0..n)
        .map(|i| (1_048_576.0 / n as f64 * (1.0 + 0.9 * noise(i) + 0.4 * noise(3 * i + 1)).max(0.0)) as u64)
        .collect()
}

fn samples() -> Vec<Sample> {
    let sample = |(prompt, answer, path, outputs): (&str, &str, &str, [&str; 5])| Sample {
        prompt: prompt.into(),
        answer: answer.into(),
        path: path.into(),
        outputs: MEMORIES.iter().map(|m| m.to_string()).zip(outputs.map(String::from)).collect(),
    };
    [
        ("The atomic number of xenon is", "54", "7 › 112 › 1,801", [" 12", " 18", " 36", " 54", " 20"]),
        (
            "Maren Oldquist was born in the year",
            "1871",
            "2 › 41 › 660",
            [" 1902", " 1884", " 1871", " 1871", " 1900 in the city of"],
        ),
        (
            "The river that runs through Tarnholm is the",
            "Esk",
            "11 › 180 › 2,885",
            [" river", " Thames", " Tarn", " Eskimo", ""],
        ),
        (
            "Ilse Varga wrote in",
            "Hungarian",
            "2 › 37 › 598",
            [" the", " German", " German", " Hungarian", " English"],
        ),
    ]
    .map(sample)
    .to_vec()
}
