//! The same tree by every way: threads, orders of rows, files under little memory, builds that were killed.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use kmeans::{
    Built, Error, Job, JournalFile, Matrix, Options, Progress, RowFile, Rows, build, remove_journal,
};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIM: usize = 24;

/// Unit vectors around centres of several sizes.
fn points(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random::<f32>() - 0.5).collect() };
    let centres = uniform(40 * DIM);
    let mut rows = uniform(n * DIM);
    for (index, row) in rows.chunks_exact_mut(DIM).enumerate() {
        // Squares make some centres common and others rare.
        let centre = (index * index / 7) % 40;
        row.iter_mut().zip(&centres[centre * DIM..]).for_each(|(x, c)| *x = 0.6 * *x + c);
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    rows
}

fn options() -> Options {
    Options { branching: vec![5, 7, 3], seed: 3, iterations: 7, ..Options::default() }
}

fn grown(rows: &dyn Rows, options: &Options, job: &Job) -> (String, Vec<u32>) {
    let Built { tree, leaves } = build(rows, options, job).unwrap();
    (tree.hash(), leaves)
}

fn write(path: &Path, rows: &[f32]) {
    fs::write(path, rows.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
}

#[test]
fn the_same_tree_from_rows_in_any_order_and_of_any_ids() {
    let n = 5000;
    let rows = points(n, 1);
    let matrix = Matrix::new(&rows, DIM).unwrap();
    for options in [options(), Options { points_per_iteration: Some(600), ..options() }] {
        let (hash, leaves) = grown(&matrix, &options, &Job::default());
        let mut shuffled: Vec<u32> = (0..n as u32).collect();
        shuffled.shuffle(&mut ChaCha8Rng::seed_from_u64(2));
        let row = |&index: &u32| &rows[index as usize * DIM..][..DIM];
        let other: Vec<f32> = shuffled.iter().flat_map(row).copied().collect();
        // Where each row went: the order that names them as before.
        let mut order = vec![0u32; n];
        shuffled.iter().enumerate().for_each(|(at, &row)| order[row as usize] = at as u32);
        let job = Job { order: Some(&order), ..Job::default() };
        let found = grown(&Matrix::new(&other, DIM).unwrap(), &options, &job);
        assert_eq!(found.0, hash);
        assert!(shuffled.iter().zip(&found.1).all(|(&row, &leaf)| leaves[row as usize] == leaf));
    }
}

#[test]
fn the_same_tree_from_a_file_under_any_memory_and_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("points.f32");
    let rows = points(4000, 4);
    write(&path, &rows);
    let file = RowFile::open(&path, DIM).unwrap();
    let matrix = Matrix::new(&rows, DIM).unwrap();
    for options in [options(), Options { points_per_iteration: Some(300), ..options() }] {
        let expected = grown(&matrix, &options, &Job::default());
        // All of it, a child of the root, a grandchild, hardly anything.
        for (host_bytes, n_threads) in [(1 << 30, 1), (200_000, 2), (30_000, 3), (2_000, 2)] {
            let options = Options { host_bytes, ..options.clone() };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            let found = pool.install(|| grown(&file, &options, &Job::default()));
            assert!(found == expected, "{host_bytes} bytes, {n_threads} threads");
        }
    }
}

fn noting<'a>(path: &'a Path, progress: &'a (dyn Fn(Progress) + Sync)) -> Job<'a> {
    Job { order: None, journal: Some(JournalFile { path, identity: "points" }), progress }
}

#[test]
fn a_killed_build_goes_on_to_the_same_tree() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = (folder.path().join("points.f32"), folder.path().join("journal"));
    let rows = points(3000, 5);
    write(&path, &rows);
    let (file, matrix) = (RowFile::open(&path, DIM).unwrap(), Matrix::new(&rows, DIM).unwrap());
    let small = Options { host_bytes: 100_000, ..options() };
    let expected = grown(&matrix, &options(), &Job::default());
    for (rows, options) in [(&matrix as &dyn Rows, options()), (&file, small)] {
        for kill_at in [1, 3, 20, 40] {
            // A panic stands for the kill: the work of other threads ends too.
            let n_calls = AtomicUsize::new(0);
            let kill = |_| assert!(n_calls.fetch_add(1, Ordering::Relaxed) < kill_at * 4, "killed");
            let job = noting(&journal, &kill);
            let result = catch_unwind(AssertUnwindSafe(|| build(rows, &options, &job)));
            assert!(result.is_err(), "not killed at {kill_at}");
        }
        let noted = fs::read(&journal).unwrap();
        assert!(noted.len() > 5 * DIM * 4, "{} bytes noted", noted.len());
        for cut in [noted.len(), noted.len() - 1, noted.len() / 2, 30, 0] {
            fs::write(&journal, &noted[..cut]).unwrap();
            assert!(grown(rows, &options, &noting(&journal, &|_| ())) == expected, "cut to {cut}");
        }
        // A flipped bit ends what is used.
        let mut wrong = noted.clone();
        wrong[noted.len() / 2] ^= 1;
        fs::write(&journal, wrong).unwrap();
        assert!(grown(rows, &options, &noting(&journal, &|_| ())) == expected);
        remove_journal(&journal).unwrap();
        remove_journal(&journal).unwrap();
    }
}

#[test]
fn a_journal_of_other_points_or_options_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal");
    let job = |identity| Job { journal: Some(JournalFile { path: &journal, identity }), ..Job::default() };
    let (a, b) = (points(500, 6), points(500, 7));
    let (a, b) = (Matrix::new(&a, DIM).unwrap(), Matrix::new(&b, DIM).unwrap());
    grown(&a, &options(), &job("a"));
    assert_eq!(grown(&b, &options(), &job("b")), grown(&b, &options(), &Job::default()));
    let other = Options { seed: 4, ..options() };
    assert_eq!(grown(&b, &other, &job("b")), grown(&b, &other, &Job::default()));
    // The nodes of the same points are: those of a journal that calls other points by their name give their tree.
    grown(&a, &options(), &job("name"));
    assert_eq!(grown(&b, &options(), &job("name")), grown(&a, &options(), &Job::default()));
}

/// A `.npy` file of version 1 with this dictionary.
fn write_npy(path: &Path, dictionary: &str, rows: &[f32]) {
    let header = format!("{dictionary:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(rows.iter().flat_map(|x| x.to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_npy_file_is_read_where_its_header_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("points.npy");
    let rows = points(300, 9);
    let dictionary = |dtype: &str, order: &str, shape: &str| {
        format!("{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}")
    };
    write_npy(&path, &dictionary("<f4", "False", "(300, 24)"), &rows);
    let small = Options { host_bytes: 10_000, ..options() };
    let found = grown(&RowFile::open_npy(&path).unwrap(), &small, &Job::default());
    assert_eq!(found, grown(&Matrix::new(&rows, DIM).unwrap(), &options(), &Job::default()));
    let cases = [
        dictionary("<f8", "False", "(300, 24)"),
        dictionary("<f4", "True", "(300, 24)"),
        dictionary("<f4", "False", "(7200,)"),
        dictionary("<f4", "False", "(10, 30, 24)"),
        dictionary("<f4", "False", "(301, 24)"),
    ];
    for dictionary in cases {
        write_npy(&path, &dictionary, &rows);
        let error = RowFile::open_npy(&path).err().unwrap();
        assert!(matches!(error, Error::Npy { .. }), "{dictionary}: {error}");
    }
    fs::write(&path, b"not one of NumPy's").unwrap();
    let error = RowFile::open_npy(&path).err().unwrap().to_string();
    assert!(error.contains("points.npy: expected a .npy file"), "{error}");
}

#[test]
fn files_that_are_wrong_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("points.f32");
    let name = path.display();
    fs::write(&path, [0u8; 200]).unwrap();
    let error = RowFile::open(&path, DIM).err().unwrap().to_string();
    assert_eq!(error, format!("{name}: 200 bytes, expected a multiple of 96, the bytes of a point"));
    let missing = RowFile::open(&folder.path().join("missing"), DIM).err().unwrap().to_string();
    assert!(missing.contains("missing: No such file"), "{missing}");
    let rows = points(100, 8);
    write(&path, &rows);
    let file = RowFile::open(&path, DIM).unwrap();
    // Cut short after it was opened, as by another program.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
    let error = build(&file, &Options { host_bytes: 100, ..options() }, &Job::default()).unwrap_err();
    assert!(matches!(&error, Error::Io { path: found, .. } if *found == path), "{error}");
    assert!(error.to_string().starts_with(&format!("{name}: ")), "{error}");
    let folder_as_journal = JournalFile { path: folder.path(), identity: "points" };
    let job = Job { journal: Some(folder_as_journal), ..Job::default() };
    let error = build(&Matrix::new(&rows, DIM).unwrap(), &options(), &job).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: ", folder.path().display())), "{error}");
}
