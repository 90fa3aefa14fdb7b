//! Trees over planted data, against an independent k-means, and at the edges.

use std::sync::Mutex;

use cluster_tree::{ClusterId, ClusterTree};
use kmeans::{Error, Job, Matrix, Options, Progress, build, lloyd};
use linfa::DatasetBase;
use linfa::traits::Fit;
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// `sizes[c]` points around centre `c`, drawn from `[-spread, spread]^dim`, in turn: rows and labels.
fn planted(sizes: &[usize], dim: usize, spread: f32, seed: u64) -> (Vec<f32>, Vec<usize>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let centres: Vec<f32> = (0..sizes.len() * dim).map(|_| rng.random_range(-spread..spread)).collect();
    let largest = sizes.iter().copied().max().unwrap_or(0);
    let (mut rows, mut labels) = (Vec::new(), Vec::new());
    for round in 0..largest {
        for cluster in (0..sizes.len()).filter(|&cluster| round < sizes[cluster]) {
            labels.push(cluster);
            rows.extend(centres[cluster * dim..][..dim].iter().map(|centre| centre + normal(&mut rng)));
        }
    }
    (rows, labels)
}

fn options(branching: &[usize]) -> Options {
    Options { branching: branching.to_vec(), ..Options::default() }
}

fn silent(rows: &[f32], dim: usize, options: &Options) -> kmeans::Result<ClusterTree> {
    Ok(build(&Matrix::new(rows, dim)?, options, &Job::default())?.tree)
}

fn assign(tree: &ClusterTree, rows: &[f32], width: usize) -> kmeans::Result<Vec<u32>> {
    kmeans::assign(tree, &Matrix::new(rows, tree.dim())?, width)
}

/// Share of points whose cluster's most common label is theirs.
fn purity(assigned: &[u32], labels: &[usize], n_clusters: usize, n_labels: usize) -> f64 {
    let mut table = vec![0usize; n_clusters * n_labels];
    assigned.iter().zip(labels).for_each(|(&a, &l)| table[a as usize * n_labels + l] += 1);
    let most = table.chunks_exact(n_labels).map(|row| row.iter().max().unwrap()).sum::<usize>();
    most as f64 / labels.len() as f64
}

/// Sum of squared distances to the nearest centroid, in f64.
fn objective(rows: &[f32], dim: usize, centroids: &[f32]) -> f64 {
    let distance = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum()
    };
    let nearest = |row| centroids.chunks_exact(dim).map(|c| distance(row, c)).fold(f64::INFINITY, f64::min);
    rows.chunks_exact(dim).map(nearest).sum()
}

fn centroids(tree: &ClusterTree, level: usize) -> Vec<f32> {
    let id = |index: usize| ClusterId { level: level as u8, index: index as u32 };
    (0..tree.n_clusters(level)).flat_map(|index| tree.centroid(id(index)).unwrap()).copied().collect()
}

/// Counts of children add up to those of their parent, and those of level 0 to all points; an empty
/// cluster has a centroid of zeros.
fn assert_consistent(tree: &ClusterTree, n_points: usize) {
    let mut parents = vec![n_points as u64];
    for level in 0..tree.n_levels() {
        let counts = tree.counts(level);
        let sums: Vec<u64> = counts.chunks(tree.branching(level)).map(|c| c.iter().sum()).collect();
        assert_eq!(sums, parents, "level {level}");
        for (centroid, &count) in centroids(tree, level).chunks_exact(tree.dim()).zip(counts) {
            assert!(count > 0 || centroid.iter().all(|&value| value == 0.0));
        }
        parents = counts.to_vec();
    }
}

fn histogram(assigned: &[u32], n: usize) -> Vec<u64> {
    let mut counts = vec![0; n];
    assigned.iter().for_each(|&leaf| counts[leaf as usize] += 1);
    counts
}

#[test]
fn planted_clusters_are_recovered() {
    let (rows, labels) = planted(&[120; 16], 24, 8.0, 1);
    let all = options(&[16]);
    let fresh = Options { points_per_iteration: Some(400), ..all.clone() };
    for options in [all, fresh] {
        let tree = silent(&rows, 24, &options).unwrap();
        let assigned = assign(&tree, &rows, 1).unwrap();
        let purity = purity(&assigned, &labels, 16, 16);
        assert!(purity >= 0.99, "purity {purity} with {options:?}");
        assert_consistent(&tree, labels.len());
        assert_eq!(histogram(&assigned, 16), tree.counts(0));
    }
}

#[test]
fn planted_directions_are_recovered_by_unit_centroids() {
    let (mut rows, labels) = planted(&[100; 8], 32, 8.0, 2);
    for (index, row) in rows.chunks_exact_mut(32).enumerate() {
        let norm = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        let length = 1.0 + (index % 3) as f32;
        row.iter_mut().for_each(|value| *value *= length / norm);
    }
    let tree = silent(&rows, 32, &Options { spherical: true, ..options(&[8]) }).unwrap();
    for centroid in centroids(&tree, 0).chunks_exact(32) {
        assert!((centroid.iter().map(|value| value * value).sum::<f32>() - 1.0).abs() < 1e-5);
    }
    assert!(purity(&assign(&tree, &rows, 1).unwrap(), &labels, 8, 8) >= 0.99);
}

#[test]
fn the_objective_is_that_of_an_independent_kmeans() {
    // Overlapping clusters, K above and below the number planted, and K beyond one panel.
    let (rows, _) = planted(&[250; 12], 16, 2.0, 3);
    let array =
        Array2::from_shape_vec((3000, 16), rows.iter().map(|&value| f64::from(value)).collect()).unwrap();
    for k in [8, 16, 40] {
        let dataset = DatasetBase::from(array.clone());
        let model = linfa_clustering::KMeans::params(k).n_runs(3).fit(&dataset).unwrap();
        let theirs = model.centroids().mapv(|value| value as f32);
        // A share of 1 turns the balance off, which the reference does not have. Both take the best
        // of three runs.
        let base = Options { iterations: 100, max_share: Some(1.0), ..options(&[k]) };
        let run = |seed| silent(&rows, 16, &Options { seed, ..base.clone() }).unwrap();
        let ours = (0..3).map(|seed| objective(&rows, 16, &centroids(&run(seed), 0)));
        let ours = ours.fold(f64::INFINITY, f64::min);
        let theirs = objective(&rows, 16, theirs.as_slice().unwrap());
        assert!((ours / theirs - 1.0).abs() < 0.02, "k {k}: {ours} against {theirs}");
    }
}

/// Every cluster within the limit of its node, which has room for all.
fn assert_capped(tree: &ClusterTree, n_points: usize, options: &Options) {
    let mut parents = vec![n_points];
    for level in 0..tree.n_levels() {
        let k = tree.branching(level);
        for (node, counts) in tree.counts(level).chunks_exact(k).enumerate() {
            let limit = options.limit(k, parents[node]) as u64;
            assert!(
                counts.iter().all(|&n| n <= limit),
                "level {level}, node {node}: {counts:?} above {limit}"
            );
        }
        parents = tree.counts(level).iter().map(|&n| n as usize).collect();
    }
}

#[test]
fn no_cluster_takes_more_than_its_share_of_a_huge_one() {
    let (rows, labels) = planted(&[4000, 60, 60, 60, 60, 60, 60, 60], 8, 12.0, 4);
    let share = |tree: &ClusterTree| *tree.counts(0).iter().max().unwrap() as f64 / labels.len() as f64;
    let free = Options { max_share: Some(1.0), iterations: 4, ..options(&[8]) };
    assert!(share(&silent(&rows, 8, &free).unwrap()) > 0.25, "the data does not need the balance");
    let capped = options(&[8]);
    let tree = silent(&rows, 8, &capped).unwrap();
    assert_capped(&tree, labels.len(), &capped);
    assert_consistent(&tree, labels.len());
}

#[test]
fn shares_nest_and_stay_below_the_cap_on_any_data() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for case in 0..24 {
        let sizes: Vec<usize> = (0..rng.random_range(1..12)).map(|_| rng.random_range(1..400)).collect();
        let dim = rng.random_range(2..40);
        let (rows, labels) = planted(&sizes, dim, rng.random_range(0.1..20.0), case);
        let branching: Vec<usize> = (0..rng.random_range(1..4)).map(|_| rng.random_range(2..20)).collect();
        let least = 1.0 / *branching.iter().min().unwrap() as f64;
        let options = Options {
            max_share: [None, Some(rng.random_range(least..1.0))][rng.random_range(0..2)],
            points_per_iteration: [None, Some(rng.random_range(20..300))][rng.random_range(0..2)],
            spherical: rng.random(),
            iterations: rng.random_range(1..12),
            seed: case,
            ..options(&branching)
        };
        let built = build(&Matrix::new(&rows, dim).unwrap(), &options, &Job::default()).unwrap();
        assert_consistent(&built.tree, labels.len());
        assert_capped(&built.tree, labels.len(), &options);
        assert_eq!(histogram(&built.leaves, built.tree.n_leaves()), built.tree.counts(branching.len() - 1));
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let (rows, _) = planted(&[2000, 300, 300, 300, 300], 20, 4.0, 5);
    let base = Options { seed: 9, iterations: 6, ..options(&[4, 20]) };
    for options in [base.clone(), Options { points_per_iteration: Some(500), ..base }] {
        let run = |n_threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            pool.install(|| {
                let tree = silent(&rows, 20, &options).unwrap();
                (tree.hash(), assign(&tree, &rows, 3).unwrap())
            })
        };
        let first = run(1);
        assert!(first == run(2) && first == run(3));
        let other = Options { seed: 10, ..options.clone() };
        assert_ne!(silent(&rows, 20, &other).unwrap().hash(), first.0);
    }
}

#[test]
fn levels_may_branch_differently_and_points_descend_to_where_they_are_counted() {
    let (rows, labels) = planted(&[50; 32], 12, 10.0, 6);
    let free = Options { max_share: Some(1.0), ..options(&[4, 8]) };
    let built = build(&Matrix::new(&rows, 12).unwrap(), &free, &Job::default()).unwrap();
    let tree = built.tree;
    assert_eq!((tree.n_levels(), tree.n_clusters(0), tree.n_leaves()), (2, 4, 32));
    assert_consistent(&tree, labels.len());
    let assigned = assign(&tree, &rows, 1).unwrap();
    for (row, &leaf) in rows.chunks_exact(12).zip(&assigned) {
        assert_eq!(tree.descend(row).unwrap().leaf(), ClusterId { level: 1, index: leaf });
    }
    assert_eq!(histogram(&assigned, 32), tree.counts(1));
    let wide = assign(&tree, &rows, 32).unwrap();
    let leaves = centroids(&tree, 1);
    for (row, &leaf) in rows.chunks_exact(12).zip(&wide) {
        let nearest = objective(row, 12, &leaves);
        let found = objective(row, 12, &leaves[leaf as usize * 12..][..12]);
        assert!(found <= nearest * (1.0 + 1e-5), "leaf {leaf} at {found}, nearest at {nearest}");
    }
}

#[test]
fn equal_points_share_one_cluster() {
    let rows = [0.1f32, -0.7, 0.3].repeat(500);
    for spherical in [false, true] {
        let tree = silent(&rows, 3, &Options { spherical, ..options(&[4, 4]) }).unwrap();
        assert_consistent(&tree, 500);
        for level in 0..2 {
            let mut counts = tree.counts(level).to_vec();
            counts.sort();
            assert_eq!(counts.last(), Some(&500));
            assert_eq!(counts.iter().sum::<u64>(), 500);
        }
    }
    let tree = silent(&rows, 3, &options(&[4])).unwrap();
    let leaf = assign(&tree, &rows[..3], 1).unwrap()[0];
    assert_eq!(tree.centroid(ClusterId { level: 0, index: leaf }).unwrap(), &rows[..3]);
}

#[test]
fn a_point_repeated_often_leaves_the_other_clusters_whole() {
    let (mut rows, mut labels) = planted(&[40; 7], 8, 20.0, 7);
    rows.extend([100f32; 8].repeat(2000));
    labels.extend([7; 2000]);
    let tree = silent(&rows, 8, &options(&[8])).unwrap();
    assert!(purity(&assign(&tree, &rows, 1).unwrap(), &labels, 8, 8) >= 0.99);
    assert!(tree.counts(0).contains(&2000), "{:?}", tree.counts(0));
}

#[test]
fn fewer_points_than_clusters_are_each_their_own() {
    let (rows, _) = planted(&[5], 6, 3.0, 8);
    let tree = silent(&rows, 6, &options(&[16, 16])).unwrap();
    assert_consistent(&tree, 5);
    let mut counts = tree.counts(0).to_vec();
    counts.sort();
    assert_eq!(counts[11..], [1; 5]);
    assert_eq!(counts[..11], [0; 11]);
    for (row, &leaf) in rows.chunks_exact(6).zip(&assign(&tree, &rows, 1).unwrap()) {
        assert_eq!(tree.centroid(ClusterId { level: 1, index: leaf }).unwrap(), row);
    }
}

#[test]
fn progress_rises_to_the_whole_and_counts_the_nodes() {
    let (rows, _) = planted(&[30; 10], 4, 5.0, 9);
    let seen: Mutex<Vec<Progress>> = Mutex::new(vec![]);
    let progress = |progress| seen.lock().unwrap().push(progress);
    let job = Job { progress: &progress, ..Job::default() };
    let tree = build(&Matrix::new(&rows, 4).unwrap(), &options(&[10, 10, 2]), &job).unwrap().tree;
    let seen = seen.into_inner().unwrap();
    assert!(seen.len() > 20 && seen.iter().all(|p| p.done <= p.total && p.total == 300 * 3 * 21));
    let used = |level: usize| tree.counts(level).iter().filter(|&&n| n > 0).count() as u64;
    let last = Progress { done: 18_900, total: 18_900, nodes: 1 + used(0) + used(1) };
    assert_eq!(seen.last(), Some(&last));
}

#[test]
fn lloyd_reaches_the_objective_of_plain_distances() {
    let (rows, _) = planted(&[150; 9], 21, 2.0, 10);
    let start = rows[..40 * 21].to_vec();
    let mut expected: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
    for _ in 0..12 {
        let (mut sums, mut counts) = (vec![0f64; expected.len()], [0f64; 40]);
        for row in rows.chunks_exact(21) {
            let distance =
                |c: &[f64]| -> f64 { row.iter().zip(c).map(|(&x, c)| (f64::from(x) - c).powi(2)).sum() };
            let distances: Vec<f64> = expected.chunks_exact(21).map(distance).collect();
            let best = (0..40).min_by(|&a, &b| distances[a].total_cmp(&distances[b])).unwrap();
            counts[best] += 1.0;
            sums[best * 21..][..21].iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        assert!(counts.iter().all(|&n| n > 0.0), "this reference has no rule for empty clusters");
        expected =
            sums.chunks_exact(21).zip(counts).flat_map(|(s, n)| s.iter().map(move |s| s / n)).collect();
    }
    let found = lloyd(&Matrix::new(&rows, 21).unwrap(), &start, 12).unwrap();
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
    }
    let short = lloyd(&Matrix::new(&rows, 21).unwrap(), &start[..20], 1).unwrap_err();
    assert_eq!(short.to_string(), "20 values are not rows of dimension 21");
    let far = lloyd(&Matrix::new(&rows, 21).unwrap(), &[&start[..21], &[1e20; 21]].concat(), 1).unwrap_err();
    assert_eq!(far.to_string(), "start 1 has squared norm inf, expected at most 1e30");
}

#[test]
fn values_too_small_for_codes_do_not_matter() {
    let rows = [1.0f32, 1e-38, 1.0, 0.0, 1.0, 3e-20].repeat(40);
    let built = build(&Matrix::new(&rows, 2).unwrap(), &options(&[4, 2]), &Job::default()).unwrap();
    assert_consistent(&built.tree, 120);
    let centroids = lloyd(&Matrix::new(&rows, 2).unwrap(), &rows[..6], 3).unwrap();
    // Three starts for what is one point in sums: what has no point of its own is zeros.
    assert_eq!(centroids[..4], [1.0, 0.0, 1.0, 0.0]);
    assert_eq!(centroids[4..], [0.0, 0.0]);
}

#[test]
fn wrong_points_are_errors() {
    let fail = |rows: &[f32], dim| silent(rows, dim, &options(&[2])).unwrap_err().to_string();
    assert_eq!(fail(&[1.0], 0), "points have dimension 0, expected 1 to 65536");
    assert_eq!(fail(&[1.0; 7], 3), "7 values are not rows of dimension 3");
    assert_eq!(fail(&[], 3), "0 points, expected 1 to 4294967294");
    let mut rows = vec![1f32; 30_000];
    for (row, value) in [(9_999, f32::NAN), (7_000, f32::INFINITY), (5_000, 1e30)] {
        rows[row * 3 + 1] = value;
        let Err(Error::Point { row: found, .. }) = silent(&rows, 3, &options(&[2])) else {
            panic!("{value} accepted")
        };
        assert_eq!(found, row);
    }
    rows[12..15].fill(0.0);
    assert_eq!(fail(&rows, 3), "point 4 has squared norm 0, expected one above 0 and at most 1e30");
    rows[12..15].fill(1.0);
    for (row, value) in [(9_999, 1.0), (7_000, 1.0), (5_000, 1e14)] {
        rows[row * 3 + 1] = value;
    }
    assert_eq!(
        fail(&rows, 3),
        "points have norms from 1.7320508 to values of 100000000000000, expected less far apart: the least are lost in sums"
    );
    rows[0] = f32::NAN;
    assert_eq!(fail(&rows, 3), "point 0 has squared norm NaN, expected one above 0 and at most 1e30");
    let matrix = Matrix::new(&[1.0, 2.0, 3.0], 1).unwrap();
    for order in [&[0, 1][..], &[0, 1, 1], &[0, 1, 3]] {
        let job = Job { order: Some(order), ..Job::default() };
        let error = build(&matrix, &options(&[2]), &job).unwrap_err().to_string();
        assert_eq!(error, format!("an order of {} points, expected each of 3 rows once", order.len()));
    }
}

#[test]
fn options_out_of_range_are_errors() {
    let base = options(&[4, 8]);
    let cases = [
        (options(&[]), "branching is [], expected numbers from 2 up"),
        (options(&[16, 1]), "branching is [16, 1], expected numbers from 2 up"),
        (
            options(&[65_536, 65_536]),
            "branching is [65536, 65536], expected numbers from 2 up with a product",
        ),
        (Options { iterations: 0, ..base.clone() }, "iterations is 0, expected at least 1"),
        (
            Options { points_per_iteration: Some(7), ..base.clone() },
            "points_per_iteration is 7, expected at least the branching 8",
        ),
        (
            Options { max_share: Some(0.2), ..base.clone() },
            "max_share is 0.2, expected 0.25 to 1 for the branching 4",
        ),
        (Options { max_share: Some(1.1), ..base.clone() }, "max_share is 1.1, expected"),
        (Options { max_share: Some(f64::NAN), ..base }, "max_share is NaN, expected"),
    ];
    for (options, wanted) in cases {
        let error = silent(&[1.0, 2.0, 3.0], 1, &options).unwrap_err().to_string();
        assert!(error.starts_with(wanted), "{error}");
    }
}

#[test]
fn wrong_assignments_are_errors() {
    let tree = silent(&[0.5, 0.5, 1.0, 1.0, 5.0, 5.0], 2, &options(&[2])).unwrap();
    assert_eq!(assign(&tree, &[0.1, 0.1, 5.1, 5.1], 1).unwrap().len(), 2);
    // Too far apart to be added up, which assigning does not.
    assert_eq!(assign(&tree, &[0.1, 0.1, 1e14, 1.0], 1).unwrap().len(), 2);
    let fail = |rows: &[f32], width| assign(&tree, rows, width).unwrap_err();
    assert!(matches!(fail(&[1.0; 3], 1), Error::Length { values: 3, dim: 2 }));
    assert!(matches!(fail(&[1.0, 1.0, f32::NAN, 1.0], 1), Error::Point { row: 1, .. }));
    assert!(matches!(fail(&[1.0; 2], 0), Error::Tree(cluster_tree::Error::ZeroWidth)));
}
