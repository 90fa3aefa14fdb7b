//! Shapes, descent, beam and paths of a tree.

use cluster_tree::{ClusterId, ClusterPath, ClusterTree, Error, Level};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A tree of random centroids in which about a quarter of the leaves are empty, and an inner
/// cluster is empty when all of its children are.
fn random_tree(dim: usize, branching: &[usize], seed: u64) -> ClusterTree {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n_leaves: usize = branching.iter().product();
    let mut counts: Vec<u64> =
        (0..n_leaves).map(|_| if rng.random_range(0..4) == 0 { 0 } else { rng.random_range(1..9) }).collect();
    let mut levels = Vec::new();
    for &branching in branching.iter().rev() {
        let centroids = (0..counts.len() * dim).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let parents = counts.chunks(branching).map(|children| children.iter().sum()).collect();
        levels.push(Level { branching, centroids, counts });
        counts = parents;
    }
    levels.reverse();
    ClusterTree::new(dim, levels).unwrap()
}

fn random_vector(dim: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..dim).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Two levels of 2 over one dimension, every cluster with one point.
fn small_levels() -> Vec<Level> {
    vec![
        Level { branching: 2, centroids: vec![-1.0, 1.0], counts: vec![2, 2] },
        Level { branching: 2, centroids: vec![-1.5, -0.5, 0.5, 1.5], counts: vec![1; 4] },
    ]
}

#[test]
fn indices_are_global_within_a_level() {
    let tree = random_tree(8, &[4, 3, 5], 1);
    assert_eq!((tree.n_levels(), tree.dim(), tree.n_leaves()), (3, 8, 60));
    assert_eq!((tree.branching(1), tree.n_clusters(1), tree.counts(2).len()), (3, 12, 60));
    let path = tree.path_of_leaf(47).unwrap();
    assert_eq!(path, ClusterPath::new(vec![3, 9, 47]).unwrap());
    let above = tree.parent(ClusterId { level: 2, index: 47 }).unwrap().unwrap();
    assert_eq!(above, ClusterId { level: 1, index: 9 });
    assert_eq!(tree.parent(above).unwrap(), Some(ClusterId { level: 0, index: 3 }));
    assert_eq!(tree.parent(ClusterId { level: 0, index: 3 }).unwrap(), None);
}

#[test]
fn a_beam_of_one_is_greedy_descent() {
    let tree = random_tree(33, &[6, 5, 4], 2);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..500 {
        let embedding = random_vector(33, &mut rng);
        let beam = tree.beam(&embedding, 1).unwrap();
        assert_eq!(beam.len(), 1);
        assert_eq!(beam[0].0, tree.descend(&embedding).unwrap());
        assert_eq!(beam[0].0, tree.path_of_leaf(beam[0].0.leaf().index).unwrap());
    }
}

#[test]
fn greedy_descent_is_the_nearest_child_at_each_level() {
    let tree = random_tree(40, &[6, 5], 4);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..200 {
        let embedding = random_vector(40, &mut rng);
        let nearest = |level: u8, children: std::ops::Range<u32>| {
            let alive = children.filter(|&i| tree.counts(usize::from(level))[i as usize] > 0);
            alive.min_by(|&a, &b| {
                let distance =
                    |index| distance(&embedding, tree.centroid(ClusterId { level, index }).unwrap());
                distance(a).total_cmp(&distance(b))
            })
        };
        let first = nearest(0, 0..6).unwrap();
        let second = nearest(1, first * 5..first * 5 + 5).unwrap();
        assert_eq!(tree.descend(&embedding).unwrap(), ClusterPath::new(vec![first, second]).unwrap());
    }
}

#[test]
fn a_wide_beam_is_the_brute_force_order() {
    let tree = random_tree(20, &[5, 5, 5], 6);
    let n_alive = tree.counts(2).iter().filter(|&&count| count > 0).count();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut greedy_misses = 0;
    for _ in 0..100 {
        let embedding = random_vector(20, &mut rng);
        let mut brute: Vec<(u32, f64)> = (0..125u32)
            .filter(|&leaf| tree.counts(2)[leaf as usize] > 0)
            .map(|index| (index, distance(&embedding, tree.centroid(ClusterId { level: 2, index }).unwrap())))
            .collect();
        brute.sort_by(|a, b| a.1.total_cmp(&b.1));
        let beam = tree.beam(&embedding, 1000).unwrap();
        assert_eq!(beam.len(), n_alive);
        for ((path, found), (leaf, expected)) in beam.iter().zip(&brute) {
            assert_eq!(path.leaf().index, *leaf);
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} against {expected}");
        }
        greedy_misses += usize::from(tree.descend(&embedding).unwrap() != beam[0].0);
    }
    assert!(greedy_misses > 0, "the tree should be hard enough for greedy descent to miss a leaf");
}

#[test]
fn empty_clusters_are_never_chosen() {
    let tree = random_tree(16, &[4, 4, 4], 8);
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for leaf in (0..64).filter(|&leaf| tree.counts(2)[leaf as usize] == 0) {
        // Standing on the empty leaf's own centroid, and near it.
        let mut embedding = tree.centroid(ClusterId { level: 2, index: leaf }).unwrap().to_vec();
        for _ in 0..5 {
            for (path, _) in tree.beam(&embedding, 10).unwrap() {
                assert!(path.ids().all(|id| tree.counts(usize::from(id.level))[id.index as usize] > 0));
            }
            embedding.iter_mut().for_each(|value| *value += rng.random_range(-0.1f32..0.1));
        }
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    let tree = ClusterTree::new(1, small_levels()).unwrap();
    assert_eq!(tree.descend(&[0.0]).unwrap().to_string(), "0/1");
    let beam = tree.beam(&[0.0], 4).unwrap();
    let order: Vec<(u32, f32)> = beam.iter().map(|(path, distance)| (path.leaf().index, *distance)).collect();
    assert_eq!(order, [(1, 0.25), (2, 0.25), (0, 2.25), (3, 2.25)]);
}

#[test]
fn embeddings_are_checked() {
    let tree = ClusterTree::new(1, small_levels()).unwrap();
    assert_eq!(
        tree.descend(&[1.0, 2.0]).unwrap_err().to_string(),
        "embedding has 2 dimensions, the tree has 1"
    );
    let text = tree.beam(&[f32::NAN], 1).unwrap_err().to_string();
    assert_eq!(text, "embedding has squared norm NaN, expected at most 1e30");
    assert!(matches!(tree.descend(&[1e30]), Err(Error::NonFiniteEmbedding { .. })));
    assert!(matches!(tree.beam(&[1.0], 0), Err(Error::ZeroWidth)));
}

#[test]
fn unknown_clusters_are_errors() {
    let tree = ClusterTree::new(1, small_levels()).unwrap();
    let unknown = [(0, 2), (1, 4), (2, 0), (0, ClusterId::GENERIC), (1, ClusterId::GENERIC)];
    for (level, index) in unknown {
        let id = ClusterId { level, index };
        assert!(matches!(tree.centroid(id), Err(Error::UnknownCluster { id: found, .. }) if found == id));
        assert!(matches!(tree.parent(id), Err(Error::UnknownCluster { .. })));
    }
    let text = tree.path_of_leaf(4).unwrap_err().to_string();
    assert_eq!(text, "no cluster level1/4 in the tree: level 1 has 4 clusters");
}

/// What `ClusterTree::new` says after `change` spoils the small tree.
fn refusal(change: impl FnOnce(&mut Vec<Level>)) -> String {
    let mut levels = small_levels();
    change(&mut levels);
    ClusterTree::new(1, levels).unwrap_err().to_string()
}

#[test]
fn a_tree_is_checked_when_made() {
    assert!(matches!(ClusterTree::new(0, small_levels()), Err(Error::TreeDimension { found: 0, .. })));
    assert!(matches!(ClusterTree::new(1, Vec::new()), Err(Error::LevelCount { found: 0 })));
    assert_eq!(
        refusal(|levels| levels[1].centroids.push(0.0)),
        "level 1: centroids has 5 values, expected 4"
    );
    assert_eq!(refusal(|levels| levels[0].counts.truncate(1)), "level 0: counts has 1 values, expected 2");
    assert_eq!(
        refusal(|levels| levels[1].branching = 0),
        "level 1 with branching 0 has 0 clusters, expected 1 to 4294967295"
    );
    assert!(
        refusal(|levels| levels[1].branching = 1 << 40).starts_with("level 1 with branching 1099511627776")
    );
    assert_eq!(
        refusal(|levels| levels[1].centroids[2] = f32::INFINITY),
        "centroid 2 of level 1 has squared norm inf, expected at most 1e30"
    );
    assert_eq!(
        refusal(|levels| levels[1].counts[2..].fill(0)),
        "cluster 1 of level 0 has 2 points but its children have 0"
    );
    assert_eq!(
        refusal(|levels| levels[0].counts[0] = 0),
        "cluster 0 of level 0 has 0 points but its children have 2"
    );
    let empty = |levels: &mut Vec<Level>| levels.iter_mut().for_each(|level| level.counts.fill(0));
    assert_eq!(refusal(empty), "every cluster of the tree is empty, expected at least one point");
}

#[test]
fn paths_print_and_parse() {
    let path = ClusterPath::new(vec![3, 49, 790]).unwrap();
    assert_eq!(path.to_string(), "3/49/790");
    assert_eq!(ClusterPath::parse("3/49/790", 3).unwrap(), path);
    assert_eq!((path.n_levels(), path.index(1), path.is_generic()), (3, 49, false));
    assert_eq!(path.leaf(), ClusterId { level: 2, index: 790 });
    let ids: Vec<String> = path.ids().map(|id| id.to_string()).collect();
    assert_eq!(ids, ["level0/3", "level1/49", "level2/790"]);

    let generic = ClusterPath::generic(3).unwrap();
    assert!(generic.is_generic() && generic.ids().all(|id| id.is_generic()));
    assert_eq!(generic.to_string(), "generic");
    assert_eq!(ClusterPath::parse("generic", 3).unwrap(), generic);
    assert_eq!(generic.leaf().to_string(), "level2/generic");

    for text in ["", "3/49", "3/49/790/1", "3//790", "3/x/790", "3/-1/790", "3/49/4294967295", "Generic"] {
        let error = ClusterPath::parse(text, 3).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{text:?} is not a cluster path: expected 3 indices")), "{error}");
    }
}

#[test]
fn a_path_is_generic_at_all_levels_or_none() {
    assert!(matches!(ClusterPath::new(vec![3, ClusterId::GENERIC]), Err(Error::MixedPath { .. })));
    assert!(matches!(ClusterPath::new(Vec::new()), Err(Error::LevelCount { found: 0 })));
    assert!(matches!(ClusterPath::new(vec![0; 256]), Err(Error::LevelCount { found: 256 })));
    assert!(ClusterPath::new(vec![0; 255]).is_ok());
}

#[test]
fn paths_deserialize_only_when_valid() {
    let path = ClusterPath::new(vec![3, 49]).unwrap();
    let json = serde_json::to_string(&path).unwrap();
    assert_eq!(json, "[3,49]");
    assert_eq!(serde_json::from_str::<ClusterPath>(&json).unwrap(), path);
    assert!(serde_json::from_str::<ClusterPath>("[3,4294967295]").is_err());
    assert!(serde_json::from_str::<ClusterPath>("[]").is_err());
}

#[test]
fn the_hash_covers_every_part() {
    let hash = |change: &dyn Fn(&mut Vec<Level>)| {
        let mut levels = small_levels();
        change(&mut levels);
        ClusterTree::new(1, levels).unwrap().hash()
    };
    let plain = hash(&|_| ());
    assert_eq!(plain.len(), 64);
    assert_eq!(plain, hash(&|_| ()));
    assert_ne!(plain, hash(&|levels| levels[1].centroids[3] = 1.25));
    assert_ne!(plain, hash(&|levels| levels[1].counts[3] = 7));
    assert_ne!(plain, hash(&|levels| levels.truncate(1)));
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum()
}
