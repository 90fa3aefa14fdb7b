use cluster_tree::ClusterId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// What a block's parameters are.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryKind {
    /// Extra FFN width in every layer: M1, M2 `[r, d]` and M3 `[d, r]` (paper section 3).
    Ffn,
}

/// The sizes of a bank: one block per cluster, and one generic block per level.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// What the parameters are.
    pub kind: MemoryKind,
    /// Layers of the anchor, L.
    pub n_layers: usize,
    /// Model dimension of the anchor, d.
    pub d_model: usize,
    /// Memory width r per level, coarse to fine; 0 is a level without memory.
    pub width: Vec<usize>,
    /// Branching k per level of the cluster tree, coarse to fine.
    pub branching: Vec<usize>,
}

impl BlockSpec {
    /// Fails on a spec that describes no bank: a size of 0, other than a width, widths and
    /// branchings of different numbers of levels, no memory at all, or a bank too large to count.
    pub fn validate(&self) -> Result<()> {
        let n_levels = self.width.len();
        let wrong = |field, expected: &str, found: String| {
            Err(Error::Setting { field, expected: expected.to_owned(), found })
        };
        if self.n_layers == 0 {
            return wrong("n_layers", "at least 1", "0".to_owned());
        }
        if self.d_model == 0 {
            return wrong("d_model", "at least 1", "0".to_owned());
        }
        if n_levels == 0 || n_levels > usize::from(u8::MAX) {
            return wrong("width", "1 to 255 levels", format!("{n_levels} levels"));
        }
        if self.width.iter().all(|&width| width == 0) {
            return wrong("width", "a level wider than 0", format!("{:?}", self.width));
        }
        if self.branching.len() != n_levels {
            let (expected, found) = (format!("{n_levels} levels, as in width"), self.branching.len());
            return wrong("branching", &expected, format!("{found} levels"));
        }
        if self.branching.contains(&0) {
            return wrong("branching", "at least 1 at every level", format!("{:?}", self.branching));
        }
        if !self.is_countable() {
            let expected = "less than 2^32 blocks a level and 2^60 parameters";
            return wrong(
                "branching and width",
                expected,
                format!("{:?} and {:?}", self.branching, self.width),
            );
        }
        Ok(())
    }

    /// Parameters per unit of memory width: c0 = 3·L·d (paper section 3).
    pub fn unit(&self) -> u64 {
        match self.kind {
            MemoryKind::Ffn => 3 * self.n_layers as u64 * self.d_model as u64,
        }
    }

    /// Number of levels of the tree, with memory or without.
    pub fn n_levels(&self) -> usize {
        self.width.len()
    }

    /// Parameters of one block of a level: s = c0·r.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn block_len(&self, level: usize) -> usize {
        self.unit() as usize * self.width[level]
    }

    /// Parameters that one path fetches: Σ s_l.
    pub fn fetch_len(&self) -> u64 {
        self.levels().map(|level| self.block_len(level) as u64).sum()
    }

    /// Parameters of the bank: Σ n_blocks·s_l, the generic blocks not counted.
    pub fn bank_len(&self) -> u64 {
        self.levels().map(|level| self.n_blocks(level) as u64 * self.block_len(level) as u64).sum()
    }

    /// Blocks of a level, the generic one not counted: the product of the branchings down to it.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn n_blocks(&self, level: usize) -> usize {
        self.branching[..=level].iter().product()
    }

    /// The levels that have memory, coarse to fine.
    pub fn levels(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.width.len()).filter(|&level| self.width[level] > 0)
    }

    /// Fails on a block that the bank does not have, which every block of a level of width 0 is.
    pub fn check(&self, id: ClusterId) -> Result<()> {
        self.row(id).map(|_| ())
    }

    /// The row of a block in its level's tensor: its index, and `n_blocks` for the generic block.
    /// Fails as [`BlockSpec::check`] does.
    pub fn row(&self, id: ClusterId) -> Result<usize> {
        let level = usize::from(id.level);
        let has_memory = self.width.get(level).is_some_and(|&width| width > 0);
        let n_blocks = if has_memory { self.n_blocks(level) } else { 0 };
        if has_memory && id.is_generic() {
            Ok(n_blocks)
        } else if (id.index as usize) < n_blocks {
            Ok(id.index as usize)
        } else {
            Err(Error::UnknownBlock { id, n_blocks })
        }
    }

    /// SHA-256, in hex, of the spec: two banks with the same hash hold the same blocks.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update(match self.kind {
            MemoryKind::Ffn => b"ffn".as_slice(),
        });
        let sizes = [self.n_layers, self.d_model, self.n_levels()];
        for &size in sizes.iter().chain(&self.width).chain(&self.branching) {
            hasher.update((size as u64).to_le_bytes());
        }
        crate::manifest::hex(&hasher.finalize())
    }

    /// The inverse of [`BlockSpec::row`], for a row of a level with memory.
    pub(crate) fn id_of_row(&self, level: usize, row: usize) -> ClusterId {
        let index = if row == self.n_blocks(level) { ClusterId::GENERIC } else { row as u32 };
        ClusterId { level: level as u8, index }
    }

    fn is_countable(&self) -> bool {
        let unit = 3u128.saturating_mul(self.n_layers as u128).saturating_mul(self.d_model as u128);
        let (mut n_blocks, mut total) = (1u128, 0u128);
        for (&branching, &width) in self.branching.iter().zip(&self.width) {
            n_blocks = n_blocks.saturating_mul(branching as u128);
            // One block more than the clusters: the generic one.
            total = total.saturating_add((n_blocks + 1).saturating_mul(unit).saturating_mul(width as u128));
            if n_blocks >= u128::from(u32::MAX) || total >= 1 << 60 {
                return false;
            }
        }
        true
    }
}
