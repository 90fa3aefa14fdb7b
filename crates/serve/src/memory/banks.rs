use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use memory_bank::{BankVersion, BlockDtype, Identity, Step, TierOptions};
use serde::Serialize;

use super::bank::BankParts;
use super::counts::Fetches;
use super::packed::Packed;
use super::sources::{Found, find};
use super::{Bank, BankSource, BankStats, Error, Reach, Result, open_tiers};

/// Longest name.
const MAX_NAME_BYTES: usize = 64;

/// The banks that are loaded, by name.
pub struct Banks {
    expected: Identity,
    reach: Reach,
    packed: Arc<Packed>,
    fetches: Arc<Fetches>,
    loaded: RwLock<BTreeMap<String, Arc<Bank>>>,
    /// One load at a time; how many there were.
    loading: tokio::sync::Mutex<u64>,
}

/// What a loaded bank is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BankInfo {
    /// Its name.
    pub name: String,
    /// Number of its load, from 1: different for all that were ever loaded.
    pub load: u64,
    /// Where it is.
    pub source: String,
    /// The last step applied.
    pub step: Step,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Hashes of what it belongs to, such as `tree` and `tokenizer`, and of its `spec`.
    pub hashes: BTreeMap<String, String>,
    /// How its blocks are held.
    pub dtype: BlockDtype,
    /// Parameters, the generic blocks not counted.
    pub n_parameters: u64,
}

impl Banks {
    /// The name of the bank of requests that name none.
    pub const DEFAULT: &'static str = "default";

    pub(super) fn new(expected: Identity, reach: Reach, packed: Arc<Packed>, fetches: Arc<Fetches>) -> Self {
        let (loaded, loading) = (RwLock::default(), tokio::sync::Mutex::new(0));
        Self { expected, reach, packed, fetches, loaded, loading }
    }

    /// What is loaded, by name.
    pub fn list(&self) -> Vec<BankInfo> {
        self.read(|loaded| loaded.values().map(|bank| bank.info().clone()).collect())
    }

    /// The bank of a name, to be held by a request until it ends.
    ///
    /// # Errors
    /// [`Error::UnknownBank`].
    pub fn get(&self, name: &str) -> Result<Arc<Bank>> {
        self.read(|loaded| loaded.get(name).cloned().ok_or_else(|| unknown(name, loaded)))
    }

    /// Opens a bank and gives it a name; one that has it already is replaced once the new one is whole, and ends
    /// with the last request that holds it. A cache on disk is in a folder of its own below that of the source,
    /// named by the bank; those of replaced banks go.
    ///
    /// # Errors
    /// On a bank that does not belong to what is served, naming both, and when it cannot be opened: then what was
    /// loaded stays.
    pub async fn load(&self, name: &str, source: BankSource) -> Result<BankInfo> {
        check_name(name)?;
        let mut loads = self.loading.lock().await;
        let Found { version, updates } = find(&source, &self.reach, &self.expected).await?;
        let spec = Arc::new(self.expected.spec.clone());
        self.check_pinned(&source.tiers)?;
        let mut opened = source.clone();
        if let Some(disk) = &mut opened.tiers.disk {
            let folder = disk_folder(name, &version, &source.tiers);
            let held = self.get(name).ok().map(|bank| disk_folder(name, bank.version(), &source.tiers));
            let (root, keep) = (disk.dir.clone(), [Some(folder.clone()), held]);
            let named = format!("{name}@");
            super::blocking(move || remove_others(&root, &named, &keep)).await?;
            disk.dir = disk.dir.join(folder);
        }
        let tiers = open_tiers(&opened, &self.reach, (version.clone(), &spec)).await?;
        *loads += 1;
        let mut hashes = version.hashes.clone();
        hashes.insert("spec".to_owned(), spec.hash());
        let info = BankInfo {
            name: name.to_owned(),
            load: *loads,
            source: source.place(),
            step: version.step,
            seed: version.seed,
            hashes,
            dtype: source.tiers.dtype,
            n_parameters: spec.bank_len(),
        };
        let (packed, fetches) = (Arc::clone(&self.packed), Arc::clone(&self.fetches));
        let has_caches = opened.tiers.ram_mib > 0 || opened.tiers.disk.is_some();
        let bank =
            BankParts { info: info.clone(), spec, version, tiers, has_caches, updates, packed, fetches };
        let bank = Arc::new(Bank::new(bank));
        bank.warm().await?;
        let replaced = self.write(|loaded| loaded.insert(name.to_owned(), bank));
        tracing::info!(bank = name, step = info.step.0, source = info.source, "loaded");
        drop(replaced);
        Ok(info)
    }

    /// Takes a name away; the bank ends with the last request that holds it.
    ///
    /// # Errors
    /// [`Error::UnknownBank`].
    pub fn unload(&self, name: &str) -> Result<()> {
        let unloaded = self.write(|loaded| loaded.remove(name).ok_or_else(|| unknown(name, loaded)));
        tracing::info!(bank = name, "unloaded");
        unloaded.map(drop)
    }

    pub(super) fn stats(&self) -> Vec<BankStats> {
        let banks: Vec<Arc<Bank>> = self.read(|loaded| loaded.values().cloned().collect());
        let stats = |bank: Arc<Bank>| BankStats { name: bank.info().name.clone(), tiers: bank.tier_stats() };
        banks.into_iter().map(stats).collect()
    }

    /// Fails when the packed blocks of pinned levels are more than all that may be held.
    fn check_pinned(&self, tiers: &TierOptions) -> Result<()> {
        let spec = &self.expected.spec;
        let bytes = |&level: &usize| (spec.n_blocks(level) as u64 + 1) * tiers.dtype.block_bytes(spec, level);
        let pinned: u64 = self.packed.pinned_levels().iter().map(bytes).sum();
        if pinned <= self.packed.limit() {
            return Ok(());
        }
        let (levels, found) = (self.packed.pinned_levels(), self.packed.limit() >> 20);
        let expected = format!("at least {} for pinned levels {levels:?}", pinned.div_ceil(1 << 20));
        Err(Error::Setting { name: "packed_mib", expected, found: found.to_string() })
    }

    fn read<T>(&self, work: impl FnOnce(&BTreeMap<String, Arc<Bank>>) -> T) -> T {
        work(&self.loaded.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, work: impl FnOnce(&mut BTreeMap<String, Arc<Bank>>) -> T) -> T {
        work(&mut self.loaded.write().unwrap_or_else(PoisonError::into_inner))
    }
}

fn unknown(name: &str, loaded: &BTreeMap<String, Arc<Bank>>) -> Error {
    Error::UnknownBank { name: name.to_owned(), loaded: loaded.keys().cloned().collect() }
}

fn check_name(name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let is_fine = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain);
    if is_fine && name.bytes().any(|byte| byte != b'.') {
        return Ok(());
    }
    Err(Error::BankName { found: name.chars().take(2 * MAX_NAME_BYTES).collect() })
}

/// Name of the folder of a bank's cache: of a step, a seed and a dtype it is the same from start to start.
fn disk_folder(name: &str, version: &BankVersion, tiers: &TierOptions) -> String {
    format!("{name}@{}-{}-{}", version.step.0, version.seed, tiers.dtype)
}

/// Removes the caches of a bank's name but for those to keep.
fn remove_others(root: &Path, named: &str, keep: &[Option<String>]) -> Result<()> {
    let io = |source| Error::Io { path: root.to_owned(), source };
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io)?,
    };
    for entry in entries {
        let entry = entry.map_err(io)?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.starts_with(named) && !keep.iter().flatten().any(|kept| *kept == file) {
            fs::remove_dir_all(entry.path()).map_err(io)?;
        }
    }
    Ok(())
}
