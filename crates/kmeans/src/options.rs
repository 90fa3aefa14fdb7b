use crate::{Error, Result};

/// How a tree is built. The default is the paper's tree, 16 clusters at each of 4 levels, with
/// every point taken in every step.
#[derive(Clone, PartialEq, Debug)]
pub struct Options {
    /// Clusters of each node, by level, coarse first; each at least 2.
    pub branching: Vec<usize>,
    /// Seed: with the level and the index of a node, it decides all that is random there.
    pub seed: u64,
    /// Steps of k-means in a node, at least 1. A node whose centroids stand still stops before.
    pub iterations: usize,
    /// Points of the node that a step takes, fresh ones each step; none is all, every step. At least
    /// the largest branching. The paper has 6,400.
    pub points_per_iteration: Option<usize>,
    /// Share of a node's points above which a cluster is split, from 1/K to 1; none is 1.5/K (the
    /// paper's 0.094 at K = 16).
    pub max_share: Option<f64>,
    /// Whether centroids are scaled to unit norm, so that the nearest by L2 is the nearest by angle.
    pub spherical: bool,
    /// Bytes of points that a build of a file holds at a time; the result does not depend on them.
    pub host_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            branching: vec![16; 4],
            seed: 0,
            iterations: 20,
            points_per_iteration: None,
            max_share: None,
            spherical: false,
            host_bytes: 1 << 30,
        }
    }
}

impl Options {
    /// Fails on an option out of range.
    pub fn check(&self) -> Result<()> {
        let error = |option, expected: String, found: String| Err(Error::Option { option, expected, found });
        let Options { branching, iterations, points_per_iteration, max_share, .. } = self;
        let n_clusters = branching.iter().try_fold(1u64, |n, &k| n.checked_mul(k as u64));
        let fits = n_clusters.is_some_and(|n| n < u64::from(u32::MAX));
        if branching.is_empty() || branching.iter().any(|&k| k < 2) || !fits {
            let expected = "numbers from 2 up with a product below 4294967295".to_owned();
            return error("branching", expected, format!("{branching:?}"));
        }
        if *iterations == 0 {
            return error("iterations", "at least 1".to_owned(), "0".to_owned());
        }
        let (min, max) = branching.iter().fold((usize::MAX, 0), |(min, max), &k| (k.min(min), k.max(max)));
        if let Some(n) = points_per_iteration.filter(|&n| n < max) {
            return error("points_per_iteration", format!("at least the branching {max}"), n.to_string());
        }
        let least = 1.0 / min as f64;
        if let Some(share) = max_share.filter(|share| !(least..=1.0).contains(share)) {
            return error("max_share", format!("{least} to 1 for the branching {min}"), share.to_string());
        }
        Ok(())
    }

    /// The share that a cluster of `k` may have.
    pub fn share(&self, k: usize) -> f64 {
        self.max_share.unwrap_or(1.5 / k as f64)
    }

    /// The most points that a cluster of a node of `n` may have: its share, but no fewer than make room for all.
    pub fn limit(&self, k: usize, n: usize) -> usize {
        ((self.share(k) * n as f64) as usize).max(n.div_ceil(k))
    }

    /// The most points of `dim` dimensions that are held together under `host_bytes`: each in f32, in codes of 8 bits,
    /// and in what the steps note of it.
    pub fn loadable(&self, dim: usize) -> usize {
        (self.host_bytes / (5 * dim as u64 + 40)) as usize
    }
}

/// All of `n` rows, in the order given.
pub(crate) fn order(n: usize, given: Option<&[u32]>) -> Result<Vec<u32>> {
    let Some(given) = given else { return Ok((0..n as u32).collect()) };
    let mut seen = vec![false; n];
    let is_new = |&row: &u32| seen.get_mut(row as usize).is_some_and(|seen| !std::mem::replace(seen, true));
    if given.len() != n || !given.iter().all(is_new) {
        return Err(Error::Order { expected: n, found: given.len() });
    }
    Ok(given.to_vec())
}
