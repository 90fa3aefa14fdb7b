use std::collections::BTreeMap;
use std::sync::Arc;

use futures::stream::StreamExt;

use crate::checkpoint::{Column, Entry};
use crate::{Checkpoint, Identity, Result};

/// How the weights of two banks differ in one level, the generic block counted.
#[derive(Clone, PartialEq, Debug)]
pub struct LevelDiff {
    /// The level, 0 the coarsest.
    pub level: usize,
    /// Blocks updated in the first bank alone.
    pub only_first: u64,
    /// Blocks updated in the second bank alone.
    pub only_second: u64,
    /// Blocks updated in both that are the same to the bit.
    pub equal: u64,
    /// Blocks updated in both that are not.
    pub changed: u64,
    /// Largest difference of a weight of those.
    pub max_abs: f64,
    /// Root of the mean squared difference of their weights; 0 when there are none.
    pub rms: f64,
}

/// Compares two banks of the same sizes and initial weights, whatever tree or anchor they belong to. The
/// blocks updated in both are read.
pub async fn diff(first: &Checkpoint, second: &Checkpoint) -> Result<Vec<LevelDiff>> {
    let hashes = second.manifest().hashes.clone();
    second.check_same(&Identity { hashes, ..first.manifest().identity() })?;
    let mut levels = Vec::new();
    for level in first.spec().levels() {
        levels.push(diff_level(first, second, level).await?);
    }
    Ok(levels)
}

async fn diff_level(first: &Checkpoint, second: &Checkpoint, level: usize) -> Result<LevelDiff> {
    let others: BTreeMap<u32, Entry> =
        second.entries(level).iter().map(|entry| (entry.row, *entry)).collect();
    let in_both = |entry: &Entry| others.get(&entry.row).map(|other| (*entry, *other));
    let (ours, theirs): (Vec<Entry>, Vec<Entry>) = first.entries(level).iter().filter_map(in_both).unzip();
    let n_both = ours.len() as u64;
    let column = Column { level, tensor: 0 };
    let read = |checkpoint: &Checkpoint, entries| {
        checkpoint.read_each(Arc::clone(checkpoint.values()), column, entries)
    };
    let mut pairs = std::pin::pin!(read(first, ours).zip(read(second, theirs)));
    let (mut changed, mut max_abs, mut squares) = (0u64, 0f64, 0f64);
    while let Some((ours, theirs)) = pairs.next().await {
        let (ours, theirs) = (ours?, theirs?);
        if ours == theirs {
            continue;
        }
        changed += 1;
        let floats = |bytes: &[u8]| bytemuck::pod_collect_to_vec::<u8, f32>(bytes);
        for (ours, theirs) in floats(&ours).into_iter().zip(floats(&theirs)) {
            let difference = (f64::from(ours) - f64::from(theirs)).abs();
            max_abs = max_abs.max(difference);
            squares += difference * difference;
        }
    }
    let n_values = changed * first.spec().block_len(level) as u64;
    Ok(LevelDiff {
        level,
        only_first: first.entries(level).len() as u64 - n_both,
        only_second: second.entries(level).len() as u64 - n_both,
        equal: n_both - changed,
        changed,
        max_abs,
        rms: (squares / n_values.max(1) as f64).sqrt(),
    })
}
