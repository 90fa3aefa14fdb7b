//! `anchorage tree inspect`: sizes by level, and one cluster in detail.

use anyhow::Result;
use cluster_tree::ClusterId;
use eval::tree_page::{self, LevelRow, Snippet};
use eval::{ClassWords, Vocabulary, WordCounter};
use serde_json::{Value, json};

use super::survey::{Place, Survey};
use super::{Opened, percent, purity};

/// Windows that are decoded at a time.
const BATCH: usize = 4096;

/// Terms of a cluster in detail.
pub(super) const N_TERMS: usize = 12;

/// Tokens that hold the first words of a window.
const SNIPPET_TOKENS: usize = 48;

pub(super) fn inspect(
    opened: &Opened,
    survey: &Survey,
    cluster: Option<ClusterId>,
    json: bool,
) -> Result<()> {
    let levels = levels(opened, survey)?;
    let detail = cluster.map(|id| detail(opened, survey, id)).transpose()?;
    let hash = opened.tree.hash();
    if json {
        let n_windows = survey.leaves.len();
        let whole = json!({ "tree": hash, "windows": n_windows, "levels": levels, "cluster": detail });
        println!("{whole}");
        return Ok(());
    }
    println!("{}", opened.prepared.tree().display());
    println!("tree {hash}, {} windows", survey.leaves.len());
    print_levels(&levels);
    if let Some(detail) = detail {
        println!();
        print_detail(&detail);
    }
    Ok(())
}

/// The rows of all levels.
pub(super) fn levels(opened: &Opened, survey: &Survey) -> Result<Vec<LevelRow>> {
    let row = |level: usize| {
        let labels = (!survey.labels.is_empty()).then(|| purity::measures(&survey.labels, level));
        Ok(LevelRow { labels, ..survey.level(opened, level)? })
    };
    (0..opened.tree.n_levels()).map(row).collect()
}

/// Words of all windows: the first pass of class-based tf-idf.
pub(super) fn vocabulary(opened: &Opened) -> Result<Vocabulary> {
    let mut counter = WordCounter::default();
    let all: Vec<usize> = (0..opened.windows.store.n_windows()).collect();
    for windows in all.chunks(BATCH) {
        opened.windows.texts(windows)?.iter().for_each(|text| counter.add(text));
    }
    Ok(counter.finish())
}

/// Leaf and text of every window, leaf by leaf, decoded some at a time: the second pass.
pub(super) fn texts_by_leaf(opened: &Opened, leaves: &[u32]) -> impl Iterator<Item = Result<(u32, String)>> {
    let mut order: Vec<usize> = (0..leaves.len()).collect();
    order.sort_by_key(|&window| leaves[window]);
    let n_batches = order.len().div_ceil(BATCH);
    (0..n_batches).flat_map(move |batch| {
        let windows = &order[batch * BATCH..order.len().min((batch + 1) * BATCH)];
        match opened.windows.texts(windows) {
            Ok(texts) => {
                windows.iter().zip(texts).map(|(&window, text)| Ok((leaves[window], text))).collect()
            }
            Err(error) => vec![Err(error)],
        }
    })
}

/// The windows at `places` as a reader sees them.
pub(super) fn snippets(opened: &Opened, places: &[Place]) -> Result<Vec<Snippet>> {
    let store = &opened.windows.store;
    let snippet = |place: &Place| {
        let mut tokens = store.window_tokens(place.window as usize)?;
        tokens.truncate(SNIPPET_TOKENS);
        Ok(Snippet {
            doc: place.document,
            label: store.label(place.document)?.map(str::to_owned),
            distance: place.distance,
            text: tree_page::snippet(&opened.windows.tokenizer.decode(&tokens)?),
        })
    };
    places.iter().map(snippet).collect()
}

/// Terms of one cluster, best first.
fn terms(opened: &Opened, survey: &Survey, id: ClusterId) -> Result<Vec<(String, f64)>> {
    let level = usize::from(id.level);
    let vocabulary = vocabulary(opened)?;
    let below: usize = opened.branching()[level + 1..].iter().product();
    let own = |leaf: u32| leaf as usize / below == id.index as usize;
    let windows: Vec<usize> = (0..survey.leaves.len()).filter(|&w| own(survey.leaves[w])).collect();
    let mut class = ClassWords::default();
    for windows in windows.chunks(BATCH) {
        opened.windows.texts(windows)?.iter().for_each(|text| class.add(&vocabulary, text));
    }
    let terms = vocabulary.top_terms(&class, survey.n_used()[level], N_TERMS);
    Ok(terms.into_iter().map(|(id, weight)| (vocabulary.word(id).to_owned(), weight)).collect())
}

fn detail(opened: &Opened, survey: &Survey, id: ClusterId) -> Result<Value> {
    let (tree, level) = (&opened.tree, usize::from(id.level));
    let members = &survey.clusters[level][id.index as usize];
    let child = |index: u32| -> Result<Value> {
        let child = ClusterId { level: id.level + 1, index };
        let points = tree.counts(level + 1)[index as usize];
        Ok(json!({ "path": opened.path(child), "points": points, "share": tree.share(child)? }))
    };
    let children = match level + 1 < tree.n_levels() {
        true => {
            let k = tree.branching(level + 1) as u32;
            (id.index * k..(id.index + 1) * k).map(child).collect::<Result<Vec<_>>>()?
        }
        false => vec![],
    };
    Ok(json!({
        "path": opened.path(id),
        "level": level + 1,
        "points": tree.counts(level)[id.index as usize],
        "windows": members.n_windows,
        "share": tree.share(id)?,
        "cap": opened.cap(level),
        "distance": members.distance(),
        "terms": terms(opened, survey, id)?,
        "labels": survey.labels.labels_of(level, id.index),
        "children": children,
        "nearest": snippets(opened, &members.nearest)?,
        "farthest": snippets(opened, &members.farthest)?,
    }))
}

fn print_levels(levels: &[LevelRow]) {
    println!(
        "{:>5} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>13} {:>8} {:>10}",
        "level",
        "clusters",
        "non-empty",
        "min",
        "median",
        "max",
        "variation",
        "largest share",
        "cap",
        "distance²"
    );
    for (level, row) in levels.iter().enumerate() {
        println!(
            "{:>5} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9.2} {:>13} {:>8} {:>10}",
            level + 1,
            row.clusters,
            row.non_empty,
            row.min,
            row.median,
            row.max,
            row.variation,
            percent(row.largest_share),
            percent(row.cap),
            row.distance.map_or("–".into(), |distance| format!("{distance:.4}"))
        );
    }
}

fn print_detail(detail: &Value) {
    let share = |value: &Value| percent(value.as_f64().unwrap_or(0.0));
    let list = |key: &str| detail[key].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    println!(
        "cluster {}: {} points, {} of its parent (cap {}), {} windows are routed to it",
        text(&detail["path"]),
        detail["points"],
        share(&detail["share"]),
        share(&detail["cap"]),
        detail["windows"]
    );
    if let Some(distance) = detail["distance"].as_f64() {
        println!("mean squared distance {distance:.4}");
    }
    let terms: Vec<String> = list("terms").iter().map(|term| text(&term[0])).collect();
    println!("terms: {}", if terms.is_empty() { "none".into() } else { terms.join(", ") });
    for label in list("labels") {
        println!("label {}: {} training windows", text(&label[0]), label[1]);
    }
    for child in list("children") {
        println!(
            "child {:<12} {:>8} points {:>8}",
            text(&child["path"]),
            child["points"],
            share(&child["share"])
        );
    }
    for key in ["nearest", "farthest"] {
        for found in list(key) {
            let label = found["label"].as_str().map_or(String::new(), |label| format!(" [{label}]"));
            let distance = found["distance"].as_f64().unwrap_or(0.0);
            println!("{key:<8} {distance:.4} document {}{label}: {}", found["doc"], text(&found["text"]));
        }
    }
}
