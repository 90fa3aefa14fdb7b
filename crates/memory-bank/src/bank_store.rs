use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cluster_tree::ClusterId;
use futures::stream::{self, StreamExt};
use object_store::ObjectStore;
use object_store::path::Path as StorePath;

use crate::files::{Files, Parts};
use crate::manifest::{MANIFEST, MAX_MANIFEST_BYTES, same_segments, sha256};
use crate::schedule::setting;
use crate::segment::block_bytes;
use crate::tensor_file::{io_error, mismatch};
use crate::write::{Target, divide, stem, write_rows};
use crate::{
    BlockSpec, Checkpoint, Error, FORMAT, Identity, Manifest, Placement, Result, Row, Segment, ShardRecord,
    Snapshot, Step, probe,
};

/// Attempts to write a manifest where a torn one is found.
const COMMIT_ATTEMPTS: usize = 3;
/// Segments written at the same time: each has a thread for each of its files that hashes them.
const SEGMENTS: usize = 2;
/// Longest name of a bank.
const MAX_NAME_BYTES: usize = 64;

/// What a bank in a store may be asked.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Access {
    /// To be read only: nothing is ever written.
    Read,
    /// To be saved to: the store is probed when the bank is opened.
    Write,
}

/// How a bank is kept in a store.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct StoreOptions {
    /// Whether it may be written.
    pub access: Access,
    /// Bytes of every part of an upload but the last. S3 wants at least 5 MiB, and at most 10,000 parts.
    pub part_bytes: usize,
    /// Parts of one file sent at the same time.
    pub parts_in_flight: usize,
    /// Saves that a shard's blocks may be spread over, before all of them are written anew.
    pub max_chain: usize,
    /// Bytes of weights in one file, unless one block is larger.
    pub max_segment_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        let access = Access::Write;
        Self { access, part_bytes: 8 << 20, parts_in_flight: 8, max_chain: 16, max_segment_bytes: 1 << 30 }
    }
}

/// The saves of one bank in an object store, `<root>/<bank>/<step>/…`. A clone is another handle.
///
/// A save has two phases. Every shard [writes](Self::write) its blocks under names of its own and hands
/// out a record; then whoever has all records [commits](Self::commit) them: one manifest, which a step
/// has once and which is written last. What has no manifest does not exist. So a save that was killed
/// anywhere leaves the one before it whole, and is simply done again.
///
/// A request that fails is repeated as often as the store's own settings say (`object_store`'s are
/// bounded), and nothing here repeats it beyond that. The functions need a tokio runtime.
#[derive(Clone, Debug)]
pub struct BankStore {
    pub(crate) files: Files,
    pub(crate) options: StoreOptions,
    /// The bank's folder if it is on this machine.
    pub(crate) folder: Option<Arc<PathBuf>>,
}

impl BankStore {
    /// A bank below `root` in a store; it need not be there yet.
    ///
    /// # Errors
    /// On a name other than 1 to 64 of `a` to `z`, `0` to `9`, `.`, `_` and `-`, and, if it is to be
    /// written, on a store that does not keep what conditional writes promise.
    pub async fn open(
        store: Arc<dyn ObjectStore>,
        root: &StorePath,
        bank: &str,
        options: StoreOptions,
    ) -> Result<Self> {
        check_name(bank)?;
        options.validate()?;
        let prefix = root.clone().join(bank);
        let shown = PathBuf::from(format!("{store}/{prefix}"));
        Self { files: Files::new(store, prefix, shown), options, folder: None }.probed().await
    }

    /// A bank below a URL such as `s3://bucket/banks`, `file:///banks`, or a local folder. `settings` are
    /// those of the store, as `object_store` names them. A local bank is on the disk when a function
    /// returns.
    ///
    /// # Errors
    /// As [`BankStore::open`], and on symbolic links below a local root.
    pub async fn open_url(
        url: &str,
        settings: &[(String, String)],
        bank: &str,
        options: StoreOptions,
    ) -> Result<Self> {
        check_name(bank)?;
        options.validate()?;
        let unfit = |found: String| setting("store", "a folder or a URL of an object store", found);
        let parsed = match url.contains("://") {
            true => url::Url::parse(url).map_err(|error| unfit(format!("{url} ({error})")))?,
            false => return Self::open_local(Path::new(url), bank, options).await,
        };
        if parsed.scheme() == "file" {
            let root = parsed.to_file_path().map_err(|()| unfit(url.to_owned()))?;
            return Self::open_local(&root, bank, options).await;
        }
        let place = PathBuf::from(url.trim_end_matches('/')).join(bank);
        let (store, root) = object_store::parse_url_opts(&parsed, settings.iter().cloned())
            .map_err(|source| Error::Store { place: place.clone(), source: Box::new(source) })?;
        let files = Files::new(Arc::from(store), root.join(bank), place);
        Self { files, options, folder: None }.probed().await
    }

    async fn open_local(root: &Path, bank: &str, options: StoreOptions) -> Result<Self> {
        let folder = root.join(bank);
        if options.access == Access::Write {
            std::fs::create_dir_all(&folder).map_err(|source| io_error(&folder, source))?;
            for made in [&folder, root] {
                atomic_file::sync_parent(made).map_err(|source| io_error(made, source))?;
            }
        }
        refuse_links(&folder)?;
        let files = Files::local(&folder)?;
        Self { files, options, folder: Some(Arc::new(folder)) }.probed().await
    }

    async fn probed(self) -> Result<Self> {
        if self.options.access == Access::Write {
            probe::probe(&self.files, &unique()).await?;
        }
        Ok(self)
    }

    /// The steps that were saved, ascending.
    pub async fn steps(&self) -> Result<Vec<Step>> {
        let listed = self.files.list().await?;
        let mut steps: Vec<Step> = listed.iter().filter_map(|(path, _)| step_of_manifest(path)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The save of a step, opened. Fails if there is none, and on one that is damaged.
    pub async fn checkpoint(&self, step: Step) -> Result<Checkpoint> {
        Checkpoint::open(self.files.clone(), &manifest_path(step)).await
    }

    /// The newest save, opened. A manifest cut short is a save that did not finish, and is passed over;
    /// any other damage is an error.
    pub async fn latest(&self) -> Result<Option<Checkpoint>> {
        for step in self.steps().await?.into_iter().rev() {
            if let Some(manifest) = self.manifest(step).await? {
                let place = self.files.place(&manifest_path(step));
                return Checkpoint::of(self.files.clone(), place, manifest).await.map(Some);
            }
        }
        Ok(None)
    }

    /// Writes a shard's blocks of a step; nobody sees them before [`BankStore::commit`].
    ///
    /// `snapshot` is of the whole shard, `snapshot(Step(0))`. `base` is the record of the shard's last
    /// committed save, or [`Checkpoint::record`] of what it was restored from: then only blocks updated
    /// after it are written, unless they would leave more dead bytes than live ones or too long a chain.
    /// A base that is no longer there, or not the shard's own any more, is not built on.
    pub async fn write(
        &self,
        identity: &Identity,
        snapshot: Snapshot,
        base: Option<&ShardRecord>,
    ) -> Result<ShardRecord> {
        self.check_access()?;
        let Snapshot { step, placement, mut rows } = snapshot;
        let spec = &identity.spec;
        let mut touched = vec![0; spec.n_levels()];
        for (id, _) in &rows {
            spec.check(*id)?;
            touched[usize::from(id.level)] += 1;
        }
        let mut segments = Vec::new();
        if let Some((since, kept)) = self.base(identity, (step, placement), base).await? {
            let is_new = |row: &Row| row.last > since;
            if self.options.builds_on(spec, &kept, &rows, is_new) {
                rows.retain(|(_, row)| is_new(row));
                segments = kept;
            }
        }
        let unique = unique();
        let size = |(id, _): &(ClusterId, Row)| block_bytes(spec, usize::from(id.level));
        let ranges = divide(rows.iter().map(size), self.options.max_segment_bytes);
        let mut rows = rows.into_iter();
        let mut writes = Vec::new();
        for (part, range) in ranges.into_iter().enumerate() {
            let target = self.target(stem(step, placement, &unique, part), placement.shard, step);
            writes.push(write_rows(spec, target, rows.by_ref().take(range.len()).collect()));
        }
        // One that fails lets the others end: an upload is either finished or aborted.
        let written: Vec<Result<Segment>> = stream::iter(writes).buffered(SEGMENTS).collect().await;
        segments.extend(written.into_iter().collect::<Result<Vec<_>>>()?);
        let Placement { shard, n_shards } = placement;
        Ok(ShardRecord { identity: identity.clone(), step, shard, n_shards, touched, segments })
    }

    /// Makes the saves of all shards the save of a step. The manifest follows from the records alone, so
    /// it may be called again, and by several at once. Fails if the records are not those of all shards
    /// for one step of one bank, if a file that they name is missing or not what they say, and if there
    /// is a save of the step with other content, which stays as it is.
    pub async fn commit(&self, step: Step, records: &[ShardRecord]) -> Result<Checkpoint> {
        self.check_access()?;
        let path = manifest_path(step);
        let place = self.files.place(&path);
        let manifest = of_records(&place, step, records)?;
        // What is to be named for good is looked at first.
        let checkpoint = Checkpoint::of(self.files.clone(), place.clone(), manifest).await?;
        checkpoint.optimizer().await?;
        let text = checkpoint.manifest().to_json();
        for _ in 0..COMMIT_ATTEMPTS {
            let created = self.files.create(&path, text.clone().into()).await;
            // Its answer may have been lost after it was done: what counts is what is there.
            match (self.manifest(step).await, created) {
                (Ok(Some(found)), _) if found.same_content(checkpoint.manifest()) => {
                    return Checkpoint::of(self.files.clone(), place, found).await;
                }
                (Ok(Some(found)), _) => {
                    let (expected, found) = (sha256(&text), sha256(&found.to_json()));
                    return Err(Error::Committed { path: place, expected, found });
                }
                (_, Err(error)) | (Err(error), _) => return Err(error),
                // Cut short, so nobody's: a store that was killed while it wrote.
                (Ok(None), Ok(_)) => self.files.remove(&path).await?,
            }
        }
        Err(mismatch(&place, "manifest after it was written", "whole", "cut short"))
    }

    /// Forgets the saves of later steps, the newest first: a run that goes back to `step` will save them
    /// anew, and differently perhaps. Their files go with the next [`BankStore::keep`].
    pub async fn discard_after(&self, step: Step) -> Result<Vec<Step>> {
        self.check_access()?;
        let later: Vec<Step> = self.steps().await?.into_iter().filter(|&saved| saved > step).collect();
        for &step in later.iter().rev() {
            self.files.remove(&manifest_path(step)).await?;
        }
        Ok(later)
    }

    /// The manifest of a step: `None` if it is not there or cut short.
    pub(crate) async fn manifest(&self, step: Step) -> Result<Option<Manifest>> {
        let path = manifest_path(step);
        let bytes = match self.files.read_small(&path, MAX_MANIFEST_BYTES).await {
            Err(Error::Store { source, .. }) if matches!(*source, object_store::Error::NotFound { .. }) => {
                return Ok(None);
            }
            read => read?,
        };
        match Manifest::parse(&self.files.place(&path), &bytes) {
            Err(Error::Json { source, .. }) if source.is_eof() => Ok(None),
            parsed => parsed.map(Some),
        }
    }

    pub(crate) fn check_access(&self) -> Result<()> {
        match self.options.access {
            Access::Write => Ok(()),
            Access::Read => Err(setting("access", "Write, to change a bank", "Read")),
        }
    }

    pub(crate) fn target(&self, stem: String, shard: usize, step: Step) -> Target<'_> {
        let StoreOptions { part_bytes, parts_in_flight, .. } = self.options;
        let parts = Parts { bytes: part_bytes, in_flight: parts_in_flight };
        Target { files: &self.files, stem, shard, step, parts }
    }

    /// The step and the segments that a save may build on.
    async fn base(
        &self,
        identity: &Identity,
        (step, Placement { shard, n_shards }): (Step, Placement),
        base: Option<&ShardRecord>,
    ) -> Result<Option<(Step, Vec<Segment>)>> {
        let Some(base) = base.filter(|base| base.step <= step) else { return Ok(None) };
        let Some(manifest) = self.manifest(base.step).await? else { return Ok(None) };
        let is_own = manifest.identity() == *identity
            && (manifest.n_shards, base.shard, base.n_shards) == (n_shards, shard, n_shards)
            && same_segments(manifest.segments_of(shard), &base.segments);
        Ok(is_own.then(|| (base.step, manifest.segments_of(shard).cloned().collect())))
    }
}

impl StoreOptions {
    fn validate(&self) -> Result<()> {
        let counts = [
            ("part_bytes", self.part_bytes),
            ("parts_in_flight", self.parts_in_flight),
            ("max_chain", self.max_chain),
        ];
        match counts.into_iter().find(|&(_, count)| count == 0) {
            Some((field, count)) => Err(setting(field, "at least 1", count)),
            None => Ok(()),
        }
    }

    /// Whether a save of the new rows beside those kept is better than one of all rows.
    fn builds_on(
        &self,
        spec: &BlockSpec,
        kept: &[Segment],
        rows: &[(ClusterId, Row)],
        is_new: impl Fn(&Row) -> bool,
    ) -> bool {
        let mut saves: Vec<Step> = kept.iter().map(|segment| segment.step).collect();
        saves.dedup();
        let bytes = |new_only: bool| -> u64 {
            let counted = rows.iter().filter(|(_, row)| !new_only || is_new(row));
            counted.map(|(id, _)| block_bytes(spec, usize::from(id.level))).sum()
        };
        let level_bytes = |(level, n): (usize, &u64)| n.saturating_mul(block_bytes(spec, level));
        let kept_bytes = kept.iter().flat_map(|segment| segment.rows.iter().enumerate().map(level_bytes));
        let stored = kept_bytes.fold(bytes(true), u64::saturating_add);
        let live = bytes(false);
        saves.len() < self.max_chain && stored.saturating_sub(live) <= live
    }
}

/// The manifest that records make.
pub(crate) fn of_records(place: &Path, step: Step, records: &[ShardRecord]) -> Result<Manifest> {
    let Some(first) = records.first() else {
        return Err(mismatch(place, "number of records", "one for each shard", 0));
    };
    let mut by_shard: Vec<&ShardRecord> = records.iter().collect();
    by_shard.sort_by_key(|record| record.shard);
    for (shard, record) in by_shard.iter().enumerate() {
        let what = |what: &str| format!("{what} in the record of shard {}", record.shard);
        if record.n_shards != records.len() {
            return Err(mismatch(place, &what("number of shards"), records.len(), record.n_shards));
        }
        if record.shard != shard {
            return Err(mismatch(place, "shard of the next record", shard, record.shard));
        }
        if record.step != step {
            return Err(mismatch(place, &what("step"), step, record.step));
        }
        if record.identity != first.identity {
            let text = |record: &ShardRecord| format!("{:?}", record.identity);
            return Err(mismatch(place, &what("bank"), text(first), text(record)));
        }
        if record.touched.len() != first.identity.spec.n_levels() {
            let expected = first.identity.spec.n_levels();
            return Err(mismatch(place, &what("levels"), expected, record.touched.len()));
        }
        if let Some(segment) = record.segments.iter().find(|segment| segment.shard != shard) {
            return Err(mismatch(place, &what("shard of a segment"), shard, segment.shard));
        }
    }
    let Identity { spec, seed, hashes } = first.identity.clone();
    let touched = |level| by_shard.iter().fold(0u64, |sum, record| sum.saturating_add(record.touched[level]));
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        touched: (0..spec.n_levels()).map(touched).collect(),
        spec,
        step,
        seed,
        hashes,
        n_shards: records.len(),
        segments: by_shard.iter().flat_map(|record| record.segments.clone()).collect(),
    };
    manifest.check(place)?;
    Ok(manifest)
}

/// Where a step's manifest is, below the bank's folder.
pub(crate) fn manifest_path(step: Step) -> String {
    format!("{:08}/{MANIFEST}", step.0)
}

/// The step whose manifest a path is.
pub(crate) fn step_of_manifest(path: &str) -> Option<Step> {
    let step = Step(path.split_once('/')?.0.parse().ok()?);
    (manifest_path(step) == path).then_some(step)
}

fn check_name(bank: &str) -> Result<()> {
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    let fits = (1..=MAX_NAME_BYTES).contains(&bank.len()) && !matches!(bank, "." | "..");
    if fits && bank.bytes().all(plain) {
        return Ok(());
    }
    let expected = "1 to 64 of a to z, 0 to 9, '.', '_' and '-', and not '.' or '..'";
    Err(setting("bank", expected, bank.escape_debug()))
}

/// A link below the root would lead a bank's name to somewhere else.
fn refuse_links(folder: &Path) -> Result<()> {
    let refuse = |path: &Path| match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => Err(mismatch(path, "kind", "a folder", "a symbolic link")),
        Ok(_) => Ok(()),
        Err(source) => Err(io_error(path, source)),
    };
    refuse(folder)?;
    for entry in std::fs::read_dir(folder).map_err(|source| io_error(folder, source))? {
        match refuse(&entry.map_err(|source| io_error(folder, source))?.path()) {
            // Another shard begins as well: what it tries the store with comes and goes.
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            refused => refused?,
        }
    }
    Ok(())
}

/// Characters that no other call of this or another process gets: the hash maps of the standard library
/// are seeded by the system's randomness.
pub(crate) fn unique() -> String {
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}
