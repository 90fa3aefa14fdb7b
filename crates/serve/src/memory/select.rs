use std::sync::Arc;

use anchor::PathMemory;
use cluster_tree::{ClusterId, ClusterPath, ClusterTree};
use memory_bank::Step;
use retrieve::Exact;

use super::{Bank, Blocked, LevelFetch, Result};

/// Candidates that a descent is asked for when all that the router names are blocked.
const MORE: usize = 64;

/// What a request says of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// That of the path that the router finds for its text.
    Auto,
    /// None: the plain anchor.
    Off,
    /// The generic path's.
    Generic,
    /// That of a path of the tree.
    Path(ClusterPath),
}

/// Which memory is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Name of the bank; the default one without.
    pub bank: Option<String>,
    /// What is routed, for [`Memory::Auto`].
    pub text: String,
    /// How the path is found.
    pub memory: Memory,
    /// What is not to be used.
    pub blocked: Arc<Blocked>,
}

/// The memory of a request, fetched.
#[derive(Clone, Default)]
pub struct Selected {
    /// Its blocks; none for no memory.
    pub memory: PathMemory,
    /// Their path; none for no memory.
    pub path: Option<ClusterPath>,
    /// Blocked prefixes of paths that were nearer, nearest first, each once.
    pub blocked: Vec<String>,
    /// The bank, to be held until the request ends; none for no memory.
    pub bank: Option<Arc<Bank>>,
    /// Step of the bank.
    pub bank_version: Option<Step>,
    /// What embedding and routing took.
    pub route_ms: f64,
    /// What the blocks took.
    pub fetch_ms: f64,
    /// Where the blocks were, by level.
    pub cached: Vec<LevelFetch>,
}

/// A path that may be used.
pub(super) struct Choice {
    /// None when everything is blocked.
    pub(super) path: Option<ClusterPath>,
    /// Blocked prefixes of paths that came first.
    pub(super) passed: Vec<String>,
}

/// The best of a text's paths that may be used: of those that the router names, then of a wider descent, then the
/// nearest leaf of all.
pub(super) fn choose(
    (tree, exact): (&ClusterTree, &Exact),
    embedding: &[f32],
    candidates: &[retrieve::Route],
    blocked: &Blocked,
) -> Result<Choice> {
    let mut passed = vec![];
    if let Some(path) = first_allowed(candidates, blocked, &mut passed) {
        return Ok(Choice { path: Some(path), passed });
    }
    let more = tree.beam(embedding, MORE)?;
    if let Some(path) = first_allowed(&more, blocked, &mut passed) {
        return Ok(Choice { path: Some(path), passed });
    }
    let allows = |leaf| tree.path_of_leaf(leaf).is_ok_and(|path| blocked.prefix_of(&path).is_none());
    let nearest = exact.nearest_of(embedding, allows)?;
    Ok(Choice { path: nearest.map(|(path, _)| path), passed })
}

fn first_allowed(
    candidates: &[retrieve::Route],
    blocked: &Blocked,
    passed: &mut Vec<String>,
) -> Option<ClusterPath> {
    for (path, _) in candidates {
        match blocked.prefix_of(path) {
            None => return Some(path.clone()),
            Some(prefix) if passed.contains(&prefix) => {}
            Some(prefix) => passed.push(prefix),
        }
    }
    None
}

/// Clusters whose blocks the next request of this kind is likely to want, most likely first: those of the router's
/// other candidates, then the leaves beside the chosen one, nearest index first.
pub(super) fn likely_next(
    tree: &ClusterTree,
    path: &ClusterPath,
    candidates: &[retrieve::Route],
    n: usize,
) -> Vec<ClusterId> {
    let mut next: Vec<ClusterId> = vec![];
    let mut add = |id: ClusterId| {
        let is_new = path.index(usize::from(id.level)) != id.index && !next.contains(&id);
        if is_new && next.len() < n {
            next.push(id);
        }
    };
    candidates.iter().flat_map(|(path, _)| path.ids()).for_each(&mut add);
    let (leaf, level) = (path.leaf(), tree.n_levels() - 1);
    let branching = tree.branching(level) as u32;
    let first = leaf.index / branching * branching;
    let mut beside: Vec<u32> =
        (first..first + branching).filter(|&index| tree.counts(level)[index as usize] > 0).collect();
    beside.sort_by_key(|index| index.abs_diff(leaf.index));
    beside.into_iter().for_each(|index| add(ClusterId { level: leaf.level, index }));
    next
}
