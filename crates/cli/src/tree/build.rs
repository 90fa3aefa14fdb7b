//! `anchorage tree build`: a tree of embeddings that were made elsewhere.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use clap::Args;
use cluster_tree::ClusterTree;
use corpus::{Format, SourceFile, SourceOptions};
use kmeans::{Job, JournalFile, Options, RowFile, Rows};

use crate::config;
use crate::progress::Progress;

#[derive(Args)]
pub(crate) struct BuildArgs {
    /// A .npy file, or one of little-endian f32 and nothing else, row after row; a path or an object store URL.
    embeddings: String,
    /// Numbers of an embedding, where the file does not tell.
    #[arg(long)]
    dim: Option<usize>,
    /// The tree to write, a safetensors file.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write the leaf of each embedding, a little-endian u32 each.
    #[arg(long, value_name = "FILE")]
    leaves: Option<PathBuf>,
    /// A key of the section [tree]; may be given several times.
    #[arg(long = "set", value_name = "tree.KEY=VALUE")]
    set: Vec<String>,
}

/// Builds the tree; what a killed build of the same file and options noted beside `out` is not done again.
pub(crate) fn build(args: &BuildArgs) -> Result<()> {
    let options = config::tree_section(&args.set)?.options();
    options.check().context("[tree]")?;
    let source = config::bare_source(&args.embeddings, Format::Txt);
    let files = corpus::list(&source)?;
    let [file] = &files[..] else {
        bail!("{}: expected one file, found {}", args.embeddings, files.len());
    };
    let identity = serde_json::to_string(file)?;
    let beside = |extension: &str| {
        let mut name = args.out.clone().into_os_string();
        name.push(extension);
        PathBuf::from(name)
    };
    let (journal, copy) = (beside(".journal"), beside(".points"));
    let local = fetched(file, &source, &copy)?;
    let is_npy = file.url.ends_with(".npy");
    let rows = match args.dim {
        _ if is_npy => RowFile::open_npy(&local)?,
        Some(dim) => RowFile::open(&local, dim)?,
        None => bail!("{}: expected --dim, the numbers of an embedding", args.embeddings),
    };
    if let Some(dim) = args.dim.filter(|&dim| dim != rows.dim()) {
        bail!("{}: expected {dim} numbers a row as --dim says, found {}", args.embeddings, rows.dim());
    }
    let (tree, leaves) = train(&rows, &options, JournalFile { path: &journal, identity: &identity })?;
    tree.save(&args.out)?;
    if let Some(path) = &args.leaves {
        let bytes: Vec<u8> = leaves.iter().flat_map(|leaf| leaf.to_le_bytes()).collect();
        crate::run::write_whole(path, &bytes)?;
    }
    kmeans::remove_journal(&journal)?;
    if copy.exists() {
        std::fs::remove_file(&copy).with_context(|| copy.display().to_string())?;
    }
    Ok(())
}

/// The file itself if it is local; of an object store, a copy at `copy`, which stays until the tree is written.
fn fetched(file: &SourceFile, source: &SourceOptions, copy: &Path) -> Result<PathBuf> {
    if !file.url.contains("://") {
        return Ok(PathBuf::from(&file.url));
    }
    // Named when it is whole; of another object it has another size, or its journal another identity.
    let kept = std::fs::metadata(copy).is_ok_and(|kept| kept.len() == file.bytes);
    if !kept {
        let mut bar = Progress::new("copy", file.bytes);
        let report = &mut |done| bar.set(done, file.bytes, || "bytes".into());
        corpus::copy(file, &source.object_store_options, copy, report)?;
        bar.finish(format!("{} bytes of {}", file.bytes, file.url));
    }
    Ok(copy.to_owned())
}

fn train(rows: &RowFile, options: &Options, journal: JournalFile) -> Result<(ClusterTree, Vec<u32>)> {
    let n = rows.len();
    let bar = Mutex::new(Progress::new("cluster", 1));
    let progress = |p: kmeans::Progress| {
        let mut bar = bar.lock().expect("no report panics");
        bar.set(p.done, p.total, || format!("steps of points, {} nodes", p.nodes));
    };
    let job = Job { order: None, journal: Some(journal), progress: &progress };
    let built = kmeans::build(rows, options, &job)?;
    let tree = built.tree;
    let used: Vec<String> = (0..tree.n_levels())
        .map(|l| format!("{} of {}", tree.counts(l).iter().filter(|&&n| n > 0).count(), tree.n_clusters(l)))
        .collect();
    let bar = bar.into_inner().expect("no report panics");
    bar.finish(format!("{n} points; clusters that hold some, by level: {}", used.join(", ")));
    Ok((tree, built.leaves))
}
