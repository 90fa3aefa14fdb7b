//! Every router on small trees whose answers are known, on planted clusters, and on what it must refuse.

use std::collections::HashMap;
use std::sync::Arc;

use cluster_tree::{ClusterPath, ClusterTree, Level};
use embed::Embedder;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use retrieve::{
    Beam, Exact, Hnsw, HnswOptions, Oracle, PrototypeOptions, Prototypes, Query, Random, Retriever, Route,
    Router,
};

/// Two clusters of three leaves on a line, at −2, 0 and 0.9, and at 1.5, 4.5 and 0.9; those at 0.9 are empty.
/// Nearest to 0.9 is leaf 3, but its cluster, at 3, is farther than the other, at −1.
fn line() -> Arc<ClusterTree> {
    let places = |xs: &[f32]| xs.iter().flat_map(|&x| [x, 0.0]).collect();
    let levels = vec![
        Level { branching: 2, centroids: places(&[-1.0, 3.0]), counts: vec![2, 2] },
        Level {
            branching: 3,
            centroids: places(&[-2.0, 0.0, 0.9, 1.5, 4.5, 0.9]),
            counts: vec![1, 1, 0, 1, 1, 0],
        },
    ];
    Arc::new(ClusterTree::new(2, levels).unwrap())
}

/// A tree of `[k, k]` unit leaves in `dim` dimensions around unit clusters, and `n` points near each leaf.
fn planted(k: usize, dim: usize, n: usize) -> (Arc<ClusterTree>, Vec<f32>, Vec<u32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut near = |centre: &[f32], spread: f32| -> Vec<f32> {
        let moved: Vec<f32> = centre.iter().map(|x| x + spread * (rng.random::<f32>() - 0.5)).collect();
        let norm = moved.iter().map(|x| x * x).sum::<f32>().sqrt();
        moved.iter().map(|x| x / norm).collect()
    };
    let clusters: Vec<f32> = (0..k).flat_map(|_| near(&vec![0.0; dim], 1.0)).collect();
    let leaves: Vec<f32> = clusters
        .chunks_exact(dim)
        .flat_map(|c| (0..k).flat_map(|_| near(c, 0.4)).collect::<Vec<_>>())
        .collect();
    let rows = leaves.chunks_exact(dim).flat_map(|c| (0..n).flat_map(|_| near(c, 0.1)).collect::<Vec<_>>());
    let (rows, labels) = (rows.collect(), (0..(k * k * n) as u32).map(|i| i / n as u32).collect());
    let level = |centroids, n_clusters: usize| Level { branching: k, centroids, counts: vec![1; n_clusters] };
    let tree = ClusterTree::new(dim, vec![level(clusters, k), level(leaves, k * k)]).unwrap();
    (Arc::new(tree), rows, labels)
}

fn route(router: &dyn Router, embedding: &[f32]) -> Vec<Route> {
    router.route(Query { text: "", embedding }).unwrap()
}

fn leaves(router: &dyn Router, embedding: &[f32]) -> Vec<u32> {
    route(router, embedding).iter().map(|(path, _)| path.leaf().index).collect()
}

fn best(router: &dyn Router, rows: &[f32]) -> Vec<u32> {
    rows.chunks_exact(router.dim()).map(|row| leaves(router, row)[0]).collect()
}

fn share_equal(a: &[u32], b: &[u32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

fn message<T>(result: retrieve::Result<T>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn greedy_descent_misses_the_nearest_leaf_that_the_others_find() {
    let tree = line();
    let beam = |width| Beam::new(tree.clone(), width).unwrap();
    assert_eq!(leaves(&beam(1), &[0.9, 0.0]), [1]);
    let wide = route(&beam(4), &[0.9, 0.0]);
    assert_eq!(
        wide.iter().map(|(path, _)| path.to_string()).collect::<Vec<_>>(),
        ["1/3", "0/1", "0/0", "1/4"]
    );
    for ((_, found), expected) in wide.iter().zip([0.36, 0.81, 8.41, 12.96]) {
        assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
    }
    let hnsw = Hnsw::new(tree.clone(), HnswOptions::default()).unwrap();
    assert_eq!(route(&Exact::new(tree.clone(), 4).unwrap(), &[0.9, 0.0]), wide);
    assert_eq!(route(&hnsw, &[0.9, 0.0]), wide);
    let all =
        HnswOptions { connections: 2, ef_construction: usize::MAX, ef_search: usize::MAX, n: usize::MAX };
    assert_eq!(route(&Hnsw::new(tree.clone(), all).unwrap(), &[0.9, 0.0]), wide);
    assert_eq!(route(&Exact::new(tree, 1).unwrap(), &[0.9, 0.0]), wide[..1]);
}

#[test]
fn a_tree_of_one_leaf_has_one_route() {
    let level = Level { branching: 2, centroids: vec![1.0, 0.0, 0.0, 1.0], counts: vec![0, 3] };
    let tree = Arc::new(ClusterTree::new(2, vec![level]).unwrap());
    let prototypes = Prototypes::fit(tree.clone(), (&[0.6, 0.8], &[1]), PrototypeOptions::default());
    let routers: [Box<dyn Router>; 5] = [
        Box::new(Beam::new(tree.clone(), 4).unwrap()),
        Box::new(Exact::new(tree.clone(), 4).unwrap()),
        Box::new(Hnsw::new(tree.clone(), HnswOptions::default()).unwrap()),
        Box::new(prototypes.unwrap()),
        Box::new(Random::new(tree, 1)),
    ];
    for router in routers {
        assert_eq!(leaves(&*router, &[1.0, 0.0]), [1]);
    }
}

#[test]
fn a_leaf_of_two_parts_is_found_by_either() {
    let tree = line();
    // Leaf 0 holds two directions, and one of them twice; leaf 1 the direction between them.
    let rows = [1.0, 0.0, 0.0, 2.0, 0.0, 2.0, 1.0, 1.2, -1.0, 0.0];
    let fit = |per_leaf| {
        let options = PrototypeOptions { per_leaf, seed: 1, n: 3 };
        Prototypes::fit(tree.clone(), (&rows, &[0, 0, 0, 1, 4]), options).unwrap()
    };
    let points = fit(2);
    assert_eq!(leaves(&points, &[5.0, 1.0]), [0, 1, 4]);
    assert_eq!(leaves(&points, &[0.1, 9.0]), [0, 1, 4]);
    assert_eq!(leaves(&points, &[1.0, 1.0]), [1, 0, 4]);
    assert_eq!(leaves(&points, &[-1.0, -0.2]), [4, 0, 1]);
    // One prototype of leaf 0 lies between its parts, and neither is found by it: its direction is (1, 4).
    let means = fit(1);
    assert_eq!(leaves(&means, &[5.0, 1.0]), [1, 0, 4]);
    assert_eq!(leaves(&means, &[0.1, 9.0]), [0, 1, 4]);
    // The distance is that to the leaf's centroid, whatever chose the leaf.
    assert_eq!(route(&points, &[5.0, 1.0])[0].1, 50.0);
}

#[test]
fn prototypes_and_graph_agree_with_the_exact_leaf_on_planted_clusters() {
    let (tree, rows, labels) = planted(16, 24, 24);
    let exact = best(&Exact::new(tree.clone(), 1).unwrap(), &rows);
    assert!(share_equal(&exact, &labels) > 0.99);
    assert!(share_equal(&best(&Beam::new(tree.clone(), 256).unwrap(), &rows), &exact) == 1.0);
    let hnsw = Hnsw::new(tree.clone(), HnswOptions { n: 1, ..HnswOptions::default() }).unwrap();
    let agreement = share_equal(&best(&hnsw, &rows), &exact);
    assert!(agreement > 0.98, "hnsw agrees on {agreement}");
    let options = PrototypeOptions { per_leaf: 4, seed: 3, n: 1 };
    let prototypes = Prototypes::fit(tree.clone(), (&rows, &labels), options).unwrap();
    let agreement = share_equal(&best(&prototypes, &rows), &exact);
    assert!(agreement > 0.98, "prototypes agree on {agreement}");
    let random = share_equal(&best(&Random::new(tree, 1), &rows), &exact);
    assert!(random < 0.02, "random agrees on {random}");
}

#[test]
fn the_seed_decides_the_prototypes() {
    let (tree, rows, labels) = planted(4, 8, 40);
    let all = |seed| {
        let options = PrototypeOptions { per_leaf: 3, seed, n: 16 };
        let router = Prototypes::fit(tree.clone(), (&rows, &labels), options).unwrap();
        rows.chunks_exact(8).map(|row| leaves(&router, row)).collect::<Vec<_>>()
    };
    assert_eq!(all(1), all(1));
    assert_ne!(all(1), all(2));
}

/// Texts are their numbers: "0.9 0".
struct Numbers(usize);

impl Embedder for Numbers {
    fn dim(&self) -> usize {
        self.0
    }

    fn fingerprint(&self) -> &str {
        "numbers"
    }

    fn embed(&self, texts: &[&str]) -> embed::Result<Vec<f32>> {
        Ok(texts.iter().flat_map(|text| text.split(' ')).map(|number| number.parse().unwrap()).collect())
    }
}

#[test]
fn any_number_of_threads_gives_the_same_routes() {
    let (tree, rows, labels) = planted(8, 16, 12);
    let texts: Vec<String> = rows
        .chunks_exact(16)
        .map(|row| row.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        .collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let routes = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let options = PrototypeOptions { per_leaf: 3, seed: 1, n: 2 };
            let routers: [Box<dyn Router>; 5] = [
                Box::new(Beam::new(tree.clone(), 2).unwrap()),
                Box::new(Exact::new(tree.clone(), 2).unwrap()),
                Box::new(Hnsw::new(tree.clone(), HnswOptions::default()).unwrap()),
                Box::new(Prototypes::fit(tree.clone(), (&rows, &labels), options).unwrap()),
                Box::new(Random::new(tree.clone(), 1)),
            ];
            let routed = |router| Retriever::new(Box::new(Numbers(16)), router).unwrap().routes(&texts);
            routers.map(|router| routed(router).unwrap())
        })
    };
    assert_eq!(routes(1), routes(2));
}

#[test]
fn random_leaves_are_repeatable_even_and_never_empty() {
    let (tree, rows) = (line(), planted(8, 2, 20).1);
    let draw = |seed| best(&Random::new(tree.clone(), seed), &rows);
    let drawn = draw(1);
    assert_eq!(drawn, draw(1));
    assert_ne!(drawn, draw(2));
    for leaf in 0..6 {
        let n = drawn.iter().filter(|found| **found == leaf).count();
        let expected = if [2, 5].contains(&leaf) { 0..1 } else { 260..380 };
        assert!(expected.contains(&n), "leaf {leaf} drawn {n} times of {}", drawn.len());
    }
}

#[test]
fn the_oracle_knows_its_texts_and_no_other() {
    let path = |indices: &[u32]| ClusterPath::new(indices.to_vec()).unwrap();
    let oracle = |path| Oracle::new(line(), HashMap::from([("gold".to_string(), path)]));
    let known = oracle(path(&[1, 4])).unwrap();
    let query = |text| known.route(Query { text, embedding: &[0.5, 0.0] });
    assert_eq!(query("gold").unwrap(), [(path(&[1, 4]), 16.0)]);
    assert_eq!(message(query("silver")), "expected a text whose path is known, found \"silver\"");
    assert!(message(query(&"x".repeat(1000))).len() < 120);
    assert_eq!(message(oracle(path(&[0, 4]))), "expected a path of the tree (1/4), found 0/4");
    assert!(message(oracle(path(&[1, 9]))).contains("2 levels, 6 leaves"));
    assert!(message(oracle(path(&[4]))).contains("(1/4), found 4"));
    assert!(message(oracle(ClusterPath::generic(2).unwrap())).contains("found generic"));
}

#[test]
fn settings_out_of_range_are_named() {
    let tree = line();
    assert!(message(Beam::new(tree.clone(), 0)).contains("width"));
    assert_eq!(message(Exact::new(tree.clone(), 0)), "leaves of an exact scan: expected at least 1, found 0");
    let options = HnswOptions::default();
    for (options, error) in [
        (HnswOptions { connections: 1, ..options }, "connections: expected 2 to 255, found 1"),
        (HnswOptions { connections: 256, ..options }, "connections: expected 2 to 255, found 256"),
        (HnswOptions { ef_construction: 0, ..options }, "ef_construction: expected at least 1, found 0"),
        (HnswOptions { ef_search: 0, ..options }, "ef_search: expected at least 1, found 0"),
        (HnswOptions { n: 0, ..options }, "n: expected at least 1, found 0"),
    ] {
        assert_eq!(message(Hnsw::new(tree.clone(), options)), error);
    }
}

#[test]
fn prototypes_of_wrong_rows_are_refused() {
    let fit = |rows: &[f32], leaves: &[u32], per_leaf| {
        let options = PrototypeOptions { per_leaf, ..PrototypeOptions::default() };
        message(Prototypes::fit(line(), (rows, leaves), options))
    };
    assert_eq!(fit(&[1.0; 4], &[0], 8), "embeddings of 1 rows: expected 2 numbers, found 4");
    assert_eq!(fit(&[1.0; 4], &[0, 0], 0), "per_leaf: expected at least 1, found 0");
    for (value, found) in [(f32::NAN, "NaN"), (2e15, ""), (3e38, "inf")] {
        let error = fit(&[1.0, 1.0, 1.0, value], &[0, 0], 8);
        let expected = "embedding 1: expected a squared norm of at most 1e30, found ";
        assert!(error.strip_prefix(expected).is_some_and(|rest| rest.starts_with(found)), "{error}");
    }
    let of_no_leaf =
        |row, leaf| format!("embedding {row}: expected a leaf that holds points, of 6, found {leaf}");
    assert_eq!(fit(&[1.0; 4], &[0, 6], 8), of_no_leaf(1, 6));
    assert_eq!(fit(&[1.0; 4], &[2, 0], 8), of_no_leaf(0, 2));
    assert!(fit(&[], &[], 8).contains("at least one embedding"));
    assert!(fit(&[0.0; 4], &[0, 1], 8).contains("that is not zero"));
    // The largest there may be are clustered without overflow.
    let far = [9e14, 0.0, -9e14, 0.0, 0.0, 9e14];
    let options = PrototypeOptions { per_leaf: 2, ..PrototypeOptions::default() };
    let fitted = Prototypes::fit(line(), (&far, &[3, 3, 3]), options).unwrap();
    assert_eq!(leaves(&fitted, &[1.0, 1.0]), [3]);
}

#[test]
fn wrong_embeddings_and_texts_are_refused() {
    let tree = line();
    let (options, paths) = (PrototypeOptions::default(), HashMap::new());
    let routers: [Box<dyn Router>; 6] = [
        Box::new(Beam::new(tree.clone(), 4).unwrap()),
        Box::new(Exact::new(tree.clone(), 4).unwrap()),
        Box::new(Hnsw::new(tree.clone(), HnswOptions::default()).unwrap()),
        Box::new(Prototypes::fit(tree.clone(), (&[1.0, 0.0], &[0]), options).unwrap()),
        Box::new(Random::new(tree.clone(), 1)),
        Box::new(Oracle::new(tree.clone(), paths).unwrap()),
    ];
    for router in routers {
        let refused = |embedding| message(router.route(Query { text: "", embedding }));
        assert!(refused(&[1.0]).contains("dimension"), "{}", refused(&[1.0]));
        assert!(refused(&[f32::NAN, 1.0]).contains("NaN"), "{}", refused(&[f32::NAN, 1.0]));
        assert_eq!(router.dim(), 2);
    }
    let retriever = |dim, router| Retriever::new(Box::new(Numbers(dim)), router);
    let beam = || Box::new(Beam::new(tree.clone(), 4).unwrap());
    assert_eq!(message(retriever(3, beam())), "embedder of 3 dimensions for a cluster tree of 2");
    let ours = retriever(2, beam()).unwrap();
    let paths = ours.paths(&["0.9 0", "4 0"]).unwrap();
    assert_eq!(paths.iter().map(ToString::to_string).collect::<Vec<_>>(), ["1/3", "1/4"]);
    assert_eq!(message(ours.routes(&["0.9 0", " \n"])), "text 1 is empty, expected something to route by");
    assert_eq!(
        message(retriever(2, Box::new(Nowhere)).unwrap().paths(&["1 1"])),
        "text 0: expected a leaf, found none"
    );
}

/// Breaks the promise of at least one leaf.
struct Nowhere;

impl Router for Nowhere {
    fn dim(&self) -> usize {
        2
    }

    fn route(&self, _: Query<'_>) -> retrieve::Result<Vec<Route>> {
        Ok(vec![])
    }
}
