use cluster_tree::ClusterPath;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Which memory a context is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryMode {
    /// The plain anchor.
    None,
    /// The context-independent path; in a run trained with `assign = "always_on"`, its only memory.
    Generic,
    /// The path of the context.
    Fetched,
    /// The path of another leaf.
    Random,
}

impl MemoryMode {
    /// As in tables and the names of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Generic => "generic",
            Self::Fetched => "fetched",
            Self::Random => "random",
        }
    }

    /// The path that a context of index `index` and path `own` is given; `leaves` are those to draw a
    /// random one from.
    ///
    /// # Errors
    /// When a random path is asked for and there is no second leaf.
    pub fn path(
        self,
        own: &ClusterPath,
        (index, leaves): (u64, &[ClusterPath]),
    ) -> Result<Option<ClusterPath>> {
        Ok(match self {
            Self::None => None,
            Self::Generic => Some(ClusterPath::generic(own.n_levels())?),
            Self::Fetched => Some(own.clone()),
            Self::Random => Some(random_other(own, index, leaves)?),
        })
    }
}

/// One of `leaves` that is not `own`: the same one for the same index.
///
/// # Errors
/// When there is no other leaf.
pub fn random_other(own: &ClusterPath, index: u64, leaves: &[ClusterPath]) -> Result<ClusterPath> {
    let others: u64 = leaves.iter().filter(|leaf| *leaf != own).count() as u64;
    // A multiplicative hash (Knuth) spreads consecutive indices.
    let chosen = (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).checked_rem(others);
    let other = chosen.and_then(|n| leaves.iter().filter(|leaf| *leaf != own).nth(n as usize));
    other.cloned().ok_or(Error::OneLeaf { found: leaves.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_path_is_never_ones_own_and_reaches_every_other() {
        let leaves: Vec<_> = (0..5).map(|i| ClusterPath::new(vec![i]).unwrap()).collect();
        let drawn: Vec<_> = (0..500).map(|i| random_other(&leaves[2], i, &leaves).unwrap()).collect();
        assert!(!drawn.contains(&leaves[2]));
        for leaf in [0, 1, 3, 4] {
            let n = drawn.iter().filter(|path| **path == leaves[leaf]).count();
            assert!((75..175).contains(&n), "leaf {leaf} drawn {n} times of 500");
        }
        let error = random_other(&leaves[2], 0, &leaves[2..3]).unwrap_err().to_string();
        assert!(error.contains("at least 2 leaves"), "{error}");
    }
}
