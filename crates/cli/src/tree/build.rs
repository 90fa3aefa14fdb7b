//! `anchorage tree build`: a tree of embeddings that were made elsewhere.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use corpus::{SourceFile, SourceOptions};
use kmeans::{Built, JournalFile, RowFile, Rows};

use crate::config;
use crate::prepare::grow_tree;
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
    let source = config::bare_source(&args.embeddings);
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
    if args.dim.is_none() && !file.url.ends_with(".npy") {
        bail!("{}: expected a .npy file, or --dim, the numbers of an embedding", args.embeddings);
    }
    // The copy of another object, or of another state of it, has another name.
    let copy = beside(&format!(".points-{}", &corpus::hash_inputs(&[&identity])[..16]));
    let local = fetched(file, &source, &copy)?;
    let rows = match (args.dim, RowFile::is_npy(&local)?) {
        (Some(dim), false) => RowFile::open(&local, dim)?,
        (_, _) => RowFile::open_npy(&local)?,
    };
    if let Some(dim) = args.dim.filter(|&dim| dim != rows.dim()) {
        bail!("{}: expected {dim} numbers a row as --dim says, found {}", args.embeddings, rows.dim());
    }
    let path = beside(".journal");
    let journal = JournalFile { path: &path, identity: &identity };
    let (Built { tree, leaves }, summary) = grow_tree(&rows, &options, None, journal)?;
    tree.save(&args.out)?;
    if let Some(path) = &args.leaves {
        let bytes: Vec<u8> = leaves.iter().flat_map(|leaf| leaf.to_le_bytes()).collect();
        crate::run::write_whole(path, &bytes)?;
    }
    kmeans::remove_journal(&path)?;
    eprintln!("{:>18}: {} points; clusters that hold some, by level: {summary}", "cluster", rows.len());
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
    // It has its name only when it is whole.
    if !copy.exists() {
        let mut bar = Progress::new("copy", file.bytes);
        let report = &mut |done| bar.set(done, file.bytes, || "bytes".into());
        corpus::copy(file, &source.object_store_options, copy, report)?;
        bar.finish(format!("{} bytes of {}", file.bytes, file.url));
    }
    Ok(copy.to_owned())
}
