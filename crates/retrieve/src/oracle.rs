use std::collections::HashMap;
use std::sync::Arc;

use cluster_tree::{ClusterPath, ClusterTree};

use crate::leaves::Leaves;
use crate::{Error, Query, Result, Route, Router};

/// Characters of an unknown text that its error shows.
const SHOWN: usize = 60;

/// A control: the path that the text's document was trained under, which no embedding has to find.
pub struct Oracle {
    leaves: Leaves,
    paths: HashMap<String, ClusterPath>,
}

impl Oracle {
    /// Knows the path of each of these texts.
    ///
    /// # Errors
    /// On a path that is not one of the tree's.
    pub fn new(tree: Arc<ClusterTree>, paths: HashMap<String, ClusterPath>) -> Result<Self> {
        for path in paths.values() {
            let same = match path.is_generic() || path.leaf().index as usize >= tree.n_leaves() {
                true => format!("{} levels, {} leaves", tree.n_levels(), tree.n_leaves()),
                false => tree.path_of_leaf(path.leaf().index)?.to_string(),
            };
            if same != path.to_string() {
                return Err(Error::OtherPath { expected: same, found: path.clone() });
            }
        }
        Ok(Self { leaves: Leaves::new(tree), paths })
    }
}

impl Router for Oracle {
    fn dim(&self) -> usize {
        self.leaves.dim()
    }

    fn route(&self, Query { text, embedding }: Query<'_>) -> Result<Vec<Route>> {
        self.leaves.check(embedding)?;
        let unknown = || Error::UnknownText { text: text.chars().take(SHOWN).collect() };
        let path = self.paths.get(text).ok_or_else(unknown)?;
        Ok(vec![self.leaves.route(path.leaf().index, embedding)?])
    }
}
