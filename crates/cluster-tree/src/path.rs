use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One cluster: its level, 0 the coarsest, and its index, global within the level.
///
/// Child `c` of cluster `i` has index `i * k + c`, `k` the branching of the child's level.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ClusterId {
    /// Level, 0 the coarsest.
    pub level: u8,
    /// Index within the level, or [`ClusterId::GENERIC`].
    pub index: u32,
}

impl ClusterId {
    /// The index of a level's generic cluster: the one that no document is assigned to.
    pub const GENERIC: u32 = u32::MAX;

    /// Whether this is the generic cluster of its level.
    pub fn is_generic(&self) -> bool {
        self.index == Self::GENERIC
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_generic() {
            write!(f, "level{}/generic", self.level)
        } else {
            write!(f, "level{}/{}", self.level, self.index)
        }
    }
}

/// A path from the root to a leaf: one index per level, coarse to fine, or generic at every level.
///
/// A path holds 1 to 255 levels, and is never generic at some levels only. It does not know the
/// tree: that its indices follow each other is up to who made it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "Vec<u32>", into = "Vec<u32>")]
pub struct ClusterPath(Vec<u32>);

impl ClusterPath {
    /// A path of these indices, one per level. Fails on no levels, on more than 255, and on a path
    /// that is generic at some levels only.
    pub fn new(indices: Vec<u32>) -> Result<Self> {
        if indices.is_empty() || indices.len() > usize::from(u8::MAX) {
            return Err(Error::LevelCount { found: indices.len() });
        }
        let n_generic = indices.iter().filter(|&&index| index == ClusterId::GENERIC).count();
        if n_generic != 0 && n_generic != indices.len() {
            return Err(Error::MixedPath { path: indices });
        }
        Ok(Self(indices))
    }

    /// The path that no document has. Fails on a number of levels outside 1 to 255.
    pub fn generic(n_levels: usize) -> Result<Self> {
        Self::new(vec![ClusterId::GENERIC; n_levels])
    }

    /// The inverse of `Display`: `"3/49/790"` or `"generic"`. The number of levels is given because
    /// the text of the generic path does not tell it; a path of another length is an error.
    pub fn parse(text: &str, n_levels: usize) -> Result<Self> {
        if text == "generic" {
            return Self::generic(n_levels);
        }
        let error = || Error::PathText { text: text.to_owned(), n_levels };
        let indices: Vec<u32> =
            text.split('/').map(|part| part.parse().map_err(|_| error())).collect::<Result<_>>()?;
        if indices.len() != n_levels || indices.contains(&ClusterId::GENERIC) {
            return Err(error());
        }
        Self::new(indices)
    }

    /// Whether this is the generic path.
    pub fn is_generic(&self) -> bool {
        self.0[0] == ClusterId::GENERIC
    }

    /// Number of levels, at least 1.
    pub fn n_levels(&self) -> usize {
        self.0.len()
    }

    /// Index at a level, global within it.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn index(&self, level: usize) -> u32 {
        self.0[level]
    }

    /// The cluster at the deepest level.
    pub fn leaf(&self) -> ClusterId {
        let level = self.0.len() - 1;
        ClusterId { level: level as u8, index: self.0[level] }
    }

    /// The clusters of the path, coarse to fine.
    pub fn ids(&self) -> impl Iterator<Item = ClusterId> + '_ {
        self.0.iter().enumerate().map(|(level, &index)| ClusterId { level: level as u8, index })
    }
}

impl fmt::Display for ClusterPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_generic() {
            return f.write_str("generic");
        }
        for (level, index) in self.0.iter().enumerate() {
            write!(f, "{}{index}", if level == 0 { "" } else { "/" })?;
        }
        Ok(())
    }
}

impl TryFrom<Vec<u32>> for ClusterPath {
    type Error = Error;

    fn try_from(indices: Vec<u32>) -> Result<Self> {
        Self::new(indices)
    }
}

impl From<ClusterPath> for Vec<u32> {
    fn from(path: ClusterPath) -> Self {
        path.0
    }
}
