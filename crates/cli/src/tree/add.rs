//! `anchorage tree add`: new documents in a tree that was made without them.

use anyhow::{Result, bail};
use cluster_tree::{ClusterId, ClusterPath};
use corpus::{Document, Fingerprint, SourceOptions};
use embed::Embedder;
use rayon::prelude::*;
use serde_json::json;

use super::{Opened, Target, edit, percent};
use crate::prepare::load_embedder;

/// Documents routed at a time.
const BATCH: usize = 256;

/// The percentiles of distances that are told.
const PERCENTILES: [f64; 3] = [0.5, 0.9, 0.99];

/// Leaf of each window of a document, and its squared distance to the leaf's centroid.
type Windows = Vec<(u32, f32)>;

/// A document in the tree, window by window.
struct Added {
    id: String,
    /// The leaf that most of its windows are routed to, the first in index of several.
    path: ClusterPath,
    n_windows: usize,
    /// Windows in that leaf.
    n_in_leaf: usize,
    /// Mean squared distance of its windows to their leaves' centroids.
    distance: f32,
    /// Windows farther than `limit`.
    n_far: usize,
}

pub(super) fn add(opened: &Opened, files: Vec<String>, json: bool, target: &Target) -> Result<()> {
    let embedder = embedder(opened)?;
    let before = Distances::of_corpus(opened)?;
    let limit = before.percentile(PERCENTILES[2]);
    let mut after = Distances(vec![]);
    let mut counts = vec![0u64; opened.tree.n_leaves()];
    let (mut n_documents, mut n_elsewhere) = (0, 0);
    let source = SourceOptions { files, validation_files: vec![], ..opened.config.corpus.source() };
    for file in corpus::list(&source)? {
        let mut documents = corpus::read(&file, &source)?;
        loop {
            let batch = documents.by_ref().take(BATCH).collect::<corpus::Result<Vec<Document>>>()?;
            if batch.is_empty() {
                break;
            }
            for (id, windows) in routed(opened, &*embedder, &batch)? {
                windows.iter().for_each(|&(leaf, _)| counts[leaf as usize] += 1);
                after.0.extend(windows.iter().map(|(_, distance)| distance));
                let added = Added::new(opened, id, &windows, limit)?;
                n_documents += 1;
                n_elsewhere += usize::from(added.n_in_leaf < added.n_windows);
                added.print(json);
            }
        }
    }
    if n_documents == 0 {
        bail!("{}: no document holds text, expected at least one", source.files.join(", "));
    }
    after.0.sort_by(f32::total_cmp);
    let tree = opened.tree.with_counts_added(&counts)?;
    let overfull = overfull(opened, &tree)?;
    let n_far = after.0.iter().filter(|&&distance| distance > limit).count();
    if json {
        let leaves: Vec<_> = overfull
            .iter()
            .map(|(path, was, is, cap)| json!({ "leaf": path, "before": was, "share": is, "cap": cap }))
            .collect();
        let whole = json!({
            "documents": n_documents, "windows": after.0.len(), "in_several_leaves": n_elsewhere,
            "corpus_distance": before.told(), "distance": after.told(), "new_topics": n_far, "overfull": leaves,
        });
        println!("{whole}");
    } else {
        println!(
            "{n_documents} documents, {} windows, {n_elsewhere} documents in several leaves",
            after.0.len()
        );
        println!("{:>20} {:>8} {:>8} {:>8}", "squared distance", "50 %", "90 %", "99 %");
        for (name, distances) in [("windows there are", &before), ("added windows", &after)] {
            let [a, b, c] = distances.told();
            println!("{name:>20} {a:>8.4} {b:>8.4} {c:>8.4}");
        }
        println!("{n_far} windows are farther than 99 % of those there are: new topics to this tree");
        for (path, was, is, cap) in &overfull {
            let (was, is, cap) = (percent(*was), percent(*is), percent(*cap));
            println!("leaf {path} becomes overfull: {is} of its parent, before {was}, cap {cap}");
        }
    }
    edit::finish(opened, &tree, target)
}

/// The embedder that the tree was made with.
fn embedder(opened: &Opened) -> Result<Box<dyn Embedder>> {
    let embedder = load_embedder(&opened.config, &opened.prepared.hashed())?;
    let expected = Fingerprint::load(&opened.prepared.dir)?.embedder;
    if embedder.fingerprint() != expected {
        bail!(
            "{}: the embedder is not that of the corpus: expected the hash {expected}, found {}",
            opened.prepared.dir.display(),
            embedder.fingerprint()
        );
    }
    Ok(embedder)
}

/// Ids of documents, and leaf and squared distance of each of their windows, which are cut as those of
/// the corpus were. Left out are documents without a token.
fn routed(
    opened: &Opened,
    embedder: &dyn Embedder,
    documents: &[Document],
) -> Result<Vec<(String, Windows)>> {
    let tokenizer = &opened.windows.tokenizer;
    let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
    let mut windows = vec![];
    let mut lengths = vec![];
    for tokens in tokenizer.encode_batch(&texts)? {
        let before = windows.len();
        for window in tokens.chunks(opened.config.corpus.window as usize) {
            windows.push(tokenizer.decode(window)?);
        }
        lengths.push(windows.len() - before);
    }
    let windows: Vec<&str> = windows.iter().map(String::as_str).collect();
    let rows = embedder.embed(&windows)?;
    let place = |row: &[f32]| -> Result<(u32, f32)> {
        let leaf = opened.tree.nearest_leaf(row, opened.config.tree.beam)?.leaf();
        Ok((leaf.index, nearest::squared_distance(row, opened.tree.centroid(leaf)?)))
    };
    let places = rows.par_chunks_exact(opened.tree.dim()).map(place).collect::<Result<Vec<_>>>()?;
    let mut places = places.into_iter();
    let of_document =
        |(document, n): (&Document, usize)| (document.id.clone(), places.by_ref().take(n).collect());
    let all: Vec<(String, Windows)> = documents.iter().zip(lengths).map(of_document).collect();
    Ok(all.into_iter().filter(|(_, windows)| !windows.is_empty()).collect())
}

impl Added {
    /// `windows` are leaf and squared distance, at least one.
    fn new(opened: &Opened, id: String, windows: &[(u32, f32)], limit: f32) -> Result<Self> {
        let mut leaves: Vec<u32> = windows.iter().map(|(leaf, _)| *leaf).collect();
        leaves.sort_unstable();
        let mut best = (leaves[0], 0);
        for same in leaves.chunk_by(|a, b| a == b) {
            if same.len() > best.1 {
                best = (same[0], same.len());
            }
        }
        let sum: f32 = windows.iter().map(|(_, distance)| distance).sum();
        Ok(Self {
            id,
            path: opened.tree.path_of_leaf(best.0)?,
            n_windows: windows.len(),
            n_in_leaf: best.1,
            distance: sum / windows.len() as f32,
            n_far: windows.iter().filter(|(_, distance)| *distance > limit).count(),
        })
    }

    fn print(&self, json: bool) {
        let Self { id, path, n_windows, n_in_leaf, distance, n_far } = self;
        if json {
            let line = json!({
                "id": id, "path": path.to_string(), "windows": n_windows, "in_leaf": n_in_leaf,
                "distance": distance, "new_topics": n_far,
            });
            println!("{line}");
            return;
        }
        let several = if n_in_leaf < n_windows {
            format!(" ({n_in_leaf} of {n_windows} windows)")
        } else {
            String::new()
        };
        let new = if *n_far > 0 { " new topic" } else { "" };
        println!("{:<14} distance {distance:.4}  {id}{several}{new}", path.to_string());
    }
}

/// Squared distances of windows to their leaves' centroids, ascending.
struct Distances(Vec<f32>);

impl Distances {
    fn of_corpus(opened: &Opened) -> Result<Self> {
        let level = (opened.tree.n_levels() - 1) as u8;
        let distance = |(window, &index): (usize, &u32)| {
            Ok(nearest::squared_distance(
                opened.row(window),
                opened.tree.centroid(ClusterId { level, index })?,
            ))
        };
        let mut distances: Vec<f32> =
            opened.leaves()?.par_iter().enumerate().map(distance).collect::<Result<_>>()?;
        distances.par_sort_unstable_by(f32::total_cmp);
        Ok(Self(distances))
    }

    /// The distance that a share of the windows does not go beyond. There is at least one.
    fn percentile(&self, share: f64) -> f32 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    fn told(&self) -> [f32; 3] {
        PERCENTILES.map(|share| self.percentile(share))
    }
}

/// Leaves that are over the cap in `after` and were not before: path, share before and after, cap.
fn overfull(opened: &Opened, after: &cluster_tree::ClusterTree) -> Result<Vec<(String, f64, f64, f64)>> {
    let level = after.n_levels() - 1;
    let cap = opened.cap(level);
    let mut found = vec![];
    for index in 0..after.n_leaves() as u32 {
        let id = ClusterId { level: level as u8, index };
        let (was, is) = (opened.tree.share(id)?, after.share(id)?);
        if was <= cap && is > cap {
            found.push((opened.path(id), was, is, cap));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let distances = Distances((1..=200).map(|i| i as f32).collect());
        assert_eq!(distances.told(), [100.0, 180.0, 198.0]);
        assert_eq!(Distances(vec![7.0]).told(), [7.0; 3]);
    }
}
