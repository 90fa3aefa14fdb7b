use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::Result;

/// Maps texts to unit vectors. The same texts give the same bits on any number of threads.
pub trait Embedder: Send + Sync {
    /// Dimension D of the embeddings.
    fn dim(&self) -> usize;

    /// SHA-256, in hex, of everything that decides the output: embeddings of two embedders may be
    /// compared if and only if their fingerprints are equal.
    fn fingerprint(&self) -> &str;

    /// The embeddings of `texts`, `[N, D]` row-major, each row of unit L2 norm. Texts in which the
    /// embedder knows nothing (spaces, punctuation) all get the same one, the first axis unless a model
    /// has its own: a corpus may hold such windows, and a query of the same kind should meet them in the
    /// same cluster.
    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>>;
}

/// Fills one row of D zeros per text with `fill`, in parallel, and scales each to unit norm. `S` is
/// what a thread reuses from text to text. The error returned is that of the first text at fault.
pub(crate) fn embed_rows<S: Default>(
    texts: &[&str],
    dim: usize,
    fill: impl Fn(&mut S, usize, &mut [f32]) -> Result<()> + Sync,
) -> Result<Vec<f32>> {
    let mut rows = vec![0f32; texts.len() * dim];
    let results: Vec<Result<()>> = rows
        .par_chunks_exact_mut(dim)
        .enumerate()
        .map_init(S::default, |scratch, (index, row)| {
            fill(scratch, index, row)?;
            normalise(row);
            Ok(())
        })
        .collect();
    results.into_iter().collect::<Result<()>>()?;
    Ok(rows)
}

/// Scales a row of at least one element to unit L2 norm; one without a direction becomes the first axis.
pub fn normalise(row: &mut [f32]) {
    let norm = row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if norm == 0.0 || !norm.is_finite() {
        row.fill(0.0);
        row[0] = 1.0;
        return;
    }
    row.iter_mut().for_each(|value| *value = (f64::from(*value) / norm) as f32);
}

/// SHA-256, in hex, of the parts, each preceded by its length.
pub fn sha256(parts: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
