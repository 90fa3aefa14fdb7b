//! Our side of bench/kmeans: answers each line of its input by a line of JSON.
//!
//! `bench FOLDER [--threads N]`; FOLDER holds points.f32, queries.f32 (`[N, 384]`) and start16.f32, start256.f32. Lines:
//! `lloyd K`, `tree`, `file BYTES`, `memory` (the tree of large.f32, of a file or in memory), `route WIDTH`, `batch`.

use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use cluster_tree::{ClusterId, ClusterTree};
use kmeans::{Job, Matrix, Options, RowFile, Rows, build, lloyd};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const DIM: usize = 384;

struct Bench {
    folder: PathBuf,
    points: Vec<f32>,
    queries: Vec<f32>,
    tree: Option<ClusterTree>,
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("expected a folder")?);
    let threads = match (args.next().as_deref(), args.next()) {
        (Some("--threads"), Some(n)) => n.parse()?,
        _ => 2,
    };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let mut bench = Bench { folder, points: vec![], queries: vec![], tree: None };
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        // Builds of the large file tell how much memory they take, and so load nothing else.
        if !matches!(words[..], ["memory"] | ["file", _]) && bench.points.is_empty() {
            bench.points = read(&bench.folder.join("points.f32"))?;
            bench.queries = read(&bench.folder.join("queries.f32"))?;
        }
        let before = cpu_s();
        let mut answer = match words[..] {
            ["lloyd", k] => bench.lloyd(k)?,
            ["tree"] => bench.tree()?,
            ["memory"] => bench.memory()?,
            ["file", bytes] => bench.file(bytes.parse()?)?,
            ["batch"] => bench.batch()?,
            ["route", width] => bench.route(width.parse()?)?,
            _ => return Err(format!("{line}: not a command").into()),
        };
        answer["cpu_s"] = json!(cpu_s() - before);
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<f32>> {
    let bytes = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect())
}

impl Bench {
    fn lloyd(&self, k: &str) -> Result<Value> {
        let start = read(&self.folder.join(format!("start{k}.f32")))?;
        let rows = Matrix::new(&self.points, DIM)?;
        let began = Instant::now();
        let centroids = lloyd(&rows, &start, 20)?;
        let seconds = began.elapsed().as_secs_f64();
        let path = self.folder.join(format!("ours{k}.f32"));
        fs::write(&path, centroids.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(json!({ "seconds": seconds, "centroids": path }))
    }

    fn tree(&mut self) -> Result<Value> {
        let rows = Matrix::new(&self.points, DIM)?;
        let options = Options::default();
        let began = Instant::now();
        let built = build(&rows, &options, &Job::default())?;
        let seconds = began.elapsed().as_secs_f64();
        let tree = built.tree;
        let objective: f64 = built
            .leaves
            .iter()
            .zip(self.points.chunks_exact(DIM))
            .map(|(&leaf, row)| {
                let centroid = tree.centroid(ClusterId { level: 3, index: leaf }).expect("a leaf");
                row.iter().zip(centroid).map(|(&x, &c)| f64::from(x - c).powi(2)).sum::<f64>()
            })
            .sum();
        let mut largest_over = 0f64;
        let mut parents = vec![(self.points.len() / DIM) as u64];
        for level in 0..4 {
            for (node, counts) in tree.counts(level).chunks_exact(16).enumerate() {
                let limit = options.limit(16, parents[node] as usize);
                let largest = counts.iter().max().copied().unwrap_or(0);
                largest_over = largest_over.max(largest as f64 / limit.max(1) as f64);
            }
            parents = tree.counts(level).to_vec();
        }
        let used = tree.counts(3).iter().filter(|&&n| n > 0).count();
        self.write_leaves(&tree)?;
        self.tree = Some(tree);
        Ok(json!({
            "seconds": seconds, "objective": objective, "largest_share_of_cap": largest_over, "leaves": used,
        }))
    }

    /// Centroids of the leaves, zeros for empty ones.
    fn write_leaves(&self, tree: &ClusterTree) -> Result<()> {
        let mut bytes = vec![];
        for index in 0..tree.n_leaves() as u32 {
            let centroid = tree.centroid(ClusterId { level: 3, index })?;
            bytes.extend(centroid.iter().flat_map(|x| x.to_le_bytes()));
        }
        Ok(fs::write(self.folder.join("leaves.f32"), bytes)?)
    }

    fn large_options(&self) -> Options {
        // The paper's steps over fresh points.
        Options { points_per_iteration: Some(6400), ..Options::default() }
    }

    fn memory(&self) -> Result<Value> {
        let values = read(&self.folder.join("large.f32"))?;
        let rows = Matrix::new(&values, DIM)?;
        let began = Instant::now();
        let built = build(&rows, &self.large_options(), &Job::default())?;
        Ok(json!({
            "seconds": began.elapsed().as_secs_f64(), "points": rows.len(), "tree": built.tree.hash(),
        }))
    }

    fn file(&self, host_bytes: u64) -> Result<Value> {
        let rows = RowFile::open(&self.folder.join("large.f32"), DIM)?;
        let options = Options { host_bytes, ..self.large_options() };
        let began = Instant::now();
        let built = build(&rows, &options, &Job::default())?;
        Ok(json!({
            "seconds": began.elapsed().as_secs_f64(), "points": rows.len(), "tree": built.tree.hash(),
            "peak_mb": peak_mb(),
        }))
    }

    /// Queries a second of one thread, and the leaves found.
    fn route(&self, width: usize) -> Result<Value> {
        let tree = self.tree.as_ref().ok_or("route: no tree yet")?;
        let began = Instant::now();
        let found: Vec<u32> = self
            .queries
            .chunks_exact(DIM)
            .map(|query| Ok(tree.nearest_leaf(query, width)?.leaf().index))
            .collect::<Result<_>>()?;
        let seconds = began.elapsed().as_secs_f64();
        let path = self.folder.join(format!("route{width}.u32"));
        fs::write(&path, found.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(json!({ "per_s": found.len() as f64 / seconds, "found": path }))
    }
}

impl Bench {
    /// The same of a batch at once, greedily, on one thread.
    fn batch(&self) -> Result<Value> {
        let tree = self.tree.as_ref().ok_or("batch: no tree yet")?;
        let queries = Matrix::new(&self.queries, DIM)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
        let began = Instant::now();
        let found = pool.install(|| kmeans::assign(tree, &queries, 1))?;
        Ok(json!({ "per_s": found.len() as f64 / began.elapsed().as_secs_f64() }))
    }
}

/// Seconds of processor time that this process has used, all threads together.
fn cpu_s() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15, in hundredths of a second; those up to the second may hold blanks.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// The most memory that this process has held.
fn peak_mb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) / 1024
}
