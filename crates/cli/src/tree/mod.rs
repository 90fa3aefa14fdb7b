//! `anchorage tree`: the cluster tree of a prepared corpus looked at, measured against labels, and edited.

mod add;
mod build;
mod edit;
mod inspect;
mod page;
mod purity;
mod survey;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use cluster_tree::{ClusterId, ClusterTree};
use corpus::Embeddings;
use eval::tree_page::TreePage;
use kmeans::Matrix;

use crate::config::Config;
use crate::prepare::{Prepared, Windows};
use survey::Survey;

/// The tree that a command is about.
#[derive(Args)]
pub(crate) struct Of {
    /// A run's configuration, one TOML, or the folder of a run.
    run: PathBuf,
    /// Overrides a key; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

/// Where an edited tree goes; without either, what would change is only told.
#[derive(Args)]
pub(crate) struct Target {
    /// Write the new tree to this file.
    #[arg(long, value_name = "FILE", conflicts_with = "write")]
    out: Option<PathBuf>,
    /// Replace the tree of the prepared corpus; the old one is kept beside it.
    #[arg(long)]
    write: bool,
}

#[derive(Subcommand)]
pub(crate) enum TreeCommand {
    /// Build a tree of embeddings that were made elsewhere, larger than memory if need be; a killed build goes on.
    Build(build::BuildArgs),
    /// Sizes and balance by level, one cluster in detail, or a page to browse.
    Inspect {
        #[command(flatten)]
        of: Of,
        /// A cluster by its path: what it is about, its children, and its nearest and farthest texts.
        #[arg(long, value_name = "PATH")]
        cluster: Option<String>,
        /// Write the tree as one page; without a name to tree.html beside it.
        #[arg(long, value_name = "FILE", num_args = 0..=1)]
        html: Option<Option<PathBuf>>,
        /// One line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// How well the clusters agree with the documents' labels, by level.
    Purity {
        #[command(flatten)]
        of: Of,
        /// One line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Divide a leaf in two by k-means; the second half takes an empty slot under its parent.
    Split {
        #[command(flatten)]
        of: Of,
        /// The leaf, by its path.
        #[arg(required_unless_present = "over", conflicts_with = "over")]
        leaf: Option<String>,
        /// Divide every leaf that holds more than this share of its parent, 0 to 1.
        #[arg(long, value_name = "SHARE")]
        over: Option<f64>,
        #[command(flatten)]
        target: Target,
    },
    /// Make one leaf of two under the same parent, which frees a slot.
    Merge {
        #[command(flatten)]
        of: Of,
        /// A leaf, by its path.
        first: String,
        /// Another under the same parent.
        second: String,
        #[command(flatten)]
        target: Target,
    },
    /// Route new documents through the tree as it is: a path each, and how new they are to it.
    Add {
        #[command(flatten)]
        of: Of,
        /// Files of documents, as in corpus.files.
        #[arg(required = true)]
        files: Vec<String>,
        /// A line of JSON for each document, and one for all.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        target: Target,
    },
}

pub(crate) fn run(command: TreeCommand) -> Result<()> {
    match command {
        TreeCommand::Build(args) => build::build(&args),
        TreeCommand::Inspect { of, cluster, html, json } => {
            let opened = Opened::open(&of)?;
            let id = cluster.map(|text| opened.cluster(&text)).transpose()?;
            let survey = Survey::new(&opened)?;
            inspect::inspect(&opened, &survey, id, json)?;
            html.map_or(Ok(()), |file| page::write(&opened, &survey, file))
        }
        TreeCommand::Purity { of, json } => purity::purity(&Opened::open(&of)?, json),
        TreeCommand::Split { of, leaf, over, target } => {
            let opened = Opened::open(&of)?;
            match (leaf, over) {
                (Some(leaf), _) => edit::split(&opened, &leaf, &target),
                (None, Some(share)) => edit::split_over(&opened, share, &target),
                (None, None) => bail!("tree split: expected a leaf or --over SHARE, found neither"),
            }
        }
        TreeCommand::Merge { of, first, second, target } => {
            edit::merge(&Opened::open(&of)?, [&first, &second], &target)
        }
        TreeCommand::Add { of, files, json, target } => add::add(&Opened::open(&of)?, files, json, &target),
    }
}

/// What the clusters of a run are about, from its prepared corpus.
///
/// # Errors
/// When the corpus is gone, or has another tree than `hash` by now.
pub(crate) fn page_of(run: &Path, hash: &str) -> Result<TreePage> {
    let opened = Opened::open(&Of { run: run.to_owned(), set: vec![] })?;
    let found = opened.tree.hash();
    if found != hash {
        bail!("{}: expected the tree {hash}, found {found}", opened.prepared.tree().display());
    }
    page::page(&opened, &Survey::new(&opened)?)
}

/// A prepared corpus as these commands use it.
struct Opened {
    config: Config,
    prepared: Prepared,
    tree: ClusterTree,
    windows: Windows,
    /// Row-major, `[n_windows, D]`.
    embeddings: Embeddings,
}

impl Opened {
    fn open(of: &Of) -> Result<Self> {
        let folder = of.run.is_dir().then_some(of.run.as_path());
        let path = folder.map_or(of.run.clone(), |folder| folder.join("config.toml"));
        let config = Config::load(&path, &of.set)?;
        let prepared = Prepared::of(&config);
        let windows = Windows::open(&prepared)?;
        if !corpus::stage_is_finished(&prepared.dir, "cluster")? {
            bail!(
                "{}: expected the stage cluster to be finished: run `anchorage prepare`",
                prepared.dir.display()
            );
        }
        let tree = ClusterTree::load(&prepared.tree())?;
        let own = folder.map(|folder| folder.join("tree.safetensors")).filter(|own| own.exists());
        if let Some(own) = own
            && ClusterTree::load(&own)?.hash() != tree.hash()
        {
            eprintln!(
                "note: {} has another tree than {}, which is shown",
                own.display(),
                prepared.tree().display()
            );
        }
        let embeddings = Embeddings::open(&prepared.dir, windows.store.n_windows(), tree.dim())?;
        Ok(Self { config, prepared, tree, windows, embeddings })
    }

    /// The leaf of every window, as the stage `pack` assigns it.
    fn leaves(&self) -> Result<Vec<u32>> {
        let rows = Matrix::new(&self.embeddings, self.tree.dim())?;
        Ok(kmeans::assign(&self.tree, &rows, self.config.tree.beam)?)
    }

    fn row(&self, window: usize) -> &[f32] {
        &self.embeddings[window * self.tree.dim()..][..self.tree.dim()]
    }

    /// The share of its parent that k-means lets a cluster of `level` have.
    fn cap(&self, level: usize) -> f64 {
        self.config.tree.options().share(self.tree.branching(level))
    }

    fn branching(&self) -> Vec<usize> {
        (0..self.tree.n_levels()).map(|level| self.tree.branching(level)).collect()
    }

    /// The clusters from level 0 down to this one, as `"3/49"`.
    fn path(&self, id: ClusterId) -> String {
        let mut path = id.index.to_string();
        let mut cluster = id;
        while let Ok(Some(parent)) = self.tree.parent(cluster) {
            path = format!("{}/{path}", parent.index);
            cluster = parent;
        }
        path
    }

    /// The cluster that `text`, such as `"3/49"`, names.
    fn cluster(&self, text: &str) -> Result<ClusterId> {
        let n_levels = self.tree.n_levels();
        let indices: Option<Vec<u32>> = text.split('/').map(|part| part.parse().ok()).collect();
        let Some(indices) = indices.filter(|indices| indices.len() <= n_levels) else {
            bail!("{text:?} is not a cluster: expected 1 to {n_levels} indices such as \"3\" or \"3/49\"");
        };
        let level = indices.len() - 1;
        let id = ClusterId { level: level as u8, index: indices[level] };
        if id.index as usize >= self.tree.n_clusters(level) {
            let last = self.tree.n_clusters(level) - 1;
            bail!("no cluster {text}: level {} has the indices 0 to {last}", level + 1);
        }
        let path = self.path(id);
        if path != text {
            bail!("no cluster {text}: cluster {} of level {} is {path}", id.index, level + 1);
        }
        Ok(id)
    }

    /// The leaf that `text` names.
    fn leaf(&self, text: &str) -> Result<u32> {
        let id = self.cluster(text)?;
        if usize::from(id.level) + 1 != self.tree.n_levels() {
            bail!("{text} is not a leaf: expected {} indices, found {}", self.tree.n_levels(), id.level + 1);
        }
        Ok(id.index)
    }
}

/// A share in percent, with a digit behind the point.
fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}
