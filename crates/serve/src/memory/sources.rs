use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{
    Access, BankStore, BankVersion, BlockSpec, Checkpoint, Identity, Manifest, MappedBank, Step, StoreBank,
    StoreOptions, TierOptions, TierSource, Tiered,
};
use memory_service::security::ReloadingTls;
use memory_service::{RemoteBank, RemoteOptions};

use super::{Error, Result};

/// Where a bank is read from: behind its caches a folder on this machine, then shards, then an object store; at
/// least one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BankSource {
    /// The `memory` folder of a checkpoint.
    pub folder: Option<PathBuf>,
    /// The step to read; without it that of the folder, the newest of the store, or the shards' own.
    pub step: Option<Step>,
    /// Caches, shards and store.
    pub tiers: TierOptions,
}

/// How shards and object stores are reached, wherever they are.
#[derive(Clone, Default)]
pub struct Reach {
    /// The bank's name there.
    pub bank: String,
    /// Certificates for shards.
    pub tls: Option<Arc<ReloadingTls>>,
    /// A bearer token for shards.
    pub token: Option<String>,
    /// Whether blocks may come over bulk streams.
    pub bulk: bool,
    /// Settings of object stores, as `object_store` names them.
    pub store: Vec<(String, String)>,
}

impl BankSource {
    /// The source that a text names: a URL with `://` an object store, `host:port,…` shards, and anything else the
    /// `memory` folder of a checkpoint. Caches are those of `tiers`.
    pub fn parse(text: &str, tiers: &TierOptions) -> Self {
        let tiers = TierOptions { shards: vec![], store: None, ..tiers.clone() };
        let is_address = |part: &str| {
            let port = part.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
            matches!(port, Some(Ok(_))) && !part.contains('/')
        };
        match text {
            url if url.contains("://") => {
                let tiers = TierOptions { store: Some(url.to_owned()), ..tiers };
                Self { tiers, ..Self::default() }
            }
            shards if shards.split(',').all(is_address) => {
                let shards = shards.split(',').map(str::to_owned).collect();
                Self { tiers: TierOptions { shards, ..tiers }, ..Self::default() }
            }
            folder => Self { folder: Some(folder.into()), tiers, ..Self::default() },
        }
    }

    /// What messages call it.
    pub(super) fn place(&self) -> String {
        let folder = self.folder.iter().map(|folder| folder.display().to_string());
        let shards = (!self.tiers.shards.is_empty()).then(|| self.tiers.shards.join(","));
        let places: Vec<String> = folder.chain(shards).chain(self.tiers.store.clone()).collect();
        if places.is_empty() { "source".to_owned() } else { places.join(", ") }
    }
}

impl Reach {
    /// How the shards of a bank are reached to be read from.
    pub fn shards(
        &self,
        shards: &[String],
        spec: &BlockSpec,
        hashes: &BTreeMap<String, String>,
    ) -> RemoteOptions {
        let identity = memory_service::Identity::new(&self.bank, spec, hashes.clone());
        let (tls, token, bulk) = (self.tls.clone(), self.token.clone(), self.bulk);
        RemoteOptions { tls, token, bulk, ..RemoteOptions::new(shards.to_vec(), spec.clone(), identity) }
    }

    async fn open_store(&self, url: &str) -> Result<BankStore> {
        let options = StoreOptions { access: Access::Read, ..StoreOptions::default() };
        Ok(BankStore::open_url(url, &self.store, &self.bank, options).await?)
    }
}

/// Opens the tiers of a bank of this version, and fetches its pinned levels.
///
/// # Errors
/// When a source holds another bank, naming both, when there is none, and on options that it cannot have.
pub async fn open_tiers(
    source: &BankSource,
    reach: &Reach,
    (version, spec): (BankVersion, &BlockSpec),
) -> Result<Tiered> {
    let expected = Identity { spec: spec.clone(), seed: version.seed, hashes: version.hashes.clone() };
    let mut sources = vec![];
    if let Some(folder) = &source.folder {
        let bank = open_folder(folder).await?;
        check_same(&source.place(), &expected, bank.manifest())?;
        check_step(&folder.display().to_string(), version.step, bank.manifest().step)?;
        sources.push(TierSource::new("run", Arc::new(bank)));
    }
    if !source.tiers.shards.is_empty() {
        let options = reach.shards(&source.tiers.shards, spec, &version.hashes);
        sources.push(TierSource::new("shards", Arc::new(RemoteBank::connect(options).await?)));
    }
    if let Some(url) = &source.tiers.store {
        let checkpoint = reach.open_store(url).await?.checkpoint(version.step).await?;
        checkpoint.check_same(&expected)?;
        sources.push(TierSource::new("store", Arc::new(StoreBank::new(checkpoint))));
    }
    if sources.is_empty() {
        let expected = "in a folder, on shards or in a store".to_owned();
        return Err(Error::NoBank { place: source.place(), expected });
    }
    let tiered = Tiered::open(&source.tiers, version, sources)?;
    tiered.warm().await?;
    Ok(tiered)
}

/// What is known of a bank before its tiers are opened.
pub(super) struct Found {
    pub(super) version: BankVersion,
    /// Steps that updated each block, where that is told; what is not in it was never updated.
    pub(super) updates: Option<HashMap<ClusterId, u64>>,
}

/// The version of a source's bank. Fails unless it belongs to `expected`, whose seed alone may be another.
pub(super) async fn find(source: &BankSource, reach: &Reach, expected: &Identity) -> Result<Found> {
    let checkpoint = match (&source.folder, &source.tiers.store) {
        (Some(folder), _) => Some(Checkpoint::open_folder(folder).await?),
        // Shards alone go on without a store.
        (None, Some(url)) => {
            let store = reach.open_store(url).await?;
            let found = match source.step {
                Some(step) => Some(store.checkpoint(step).await?),
                None => store.latest().await?,
            };
            let expected = || format!("{:?} with a step that was saved", reach.bank);
            Some(found.ok_or_else(|| Error::NoBank { place: url.clone(), expected: expected() })?)
        }
        (None, None) => None,
    };
    if let Some(checkpoint) = checkpoint {
        let manifest = checkpoint.manifest();
        check_same(&source.place(), expected, manifest)?;
        check_step(&source.place(), source.step.unwrap_or(manifest.step), manifest.step)?;
        let version =
            BankVersion { step: manifest.step, seed: manifest.seed, hashes: manifest.hashes.clone() };
        let updates = Some(checkpoint.updates().await?.into_iter().collect());
        return Ok(Found { version, updates });
    }
    if source.tiers.shards.is_empty() {
        let expected = "in a folder, on shards or in a store".to_owned();
        return Err(Error::NoBank { place: source.place(), expected });
    }
    let options = reach.shards(&source.tiers.shards, &expected.spec, &expected.hashes);
    let applied = RemoteBank::connect(options).await?.applied().await?;
    let step = source.step.or(applied.first().copied()).unwrap_or(Step(0));
    for (shard, found) in source.tiers.shards.iter().zip(applied) {
        check_step(shard, step, found)?;
    }
    let version = BankVersion { step, seed: expected.seed, hashes: expected.hashes.clone() };
    Ok(Found { version, updates: None })
}

async fn open_folder(folder: &Path) -> Result<MappedBank> {
    let folder = folder.to_owned();
    super::blocking(move || Ok(MappedBank::open(&folder)?)).await
}

fn check_step(place: &str, expected: Step, found: Step) -> Result<()> {
    match expected == found {
        true => Ok(()),
        false => Err(Error::OtherStep { place: place.to_owned(), expected, found }),
    }
}

/// Fails on a bank of another spec or other hashes, naming both.
fn check_same(place: &str, expected: &Identity, found: &Manifest) -> Result<()> {
    let other = |what: String, expected: String, found: String| {
        Err(Error::OtherBank { place: place.to_owned(), what, expected, found })
    };
    if expected.spec != found.spec {
        return other("spec".into(), format!("{:?}", expected.spec), format!("{:?}", found.spec));
    }
    let keys: BTreeSet<&String> = expected.hashes.keys().chain(found.hashes.keys()).collect();
    for key in keys {
        let text = |hashes: &BTreeMap<String, String>| hashes.get(key).cloned().unwrap_or("missing".into());
        let (expected, found) = (text(&expected.hashes), text(&found.hashes));
        if expected != found {
            return other(format!("hash of {key}"), expected, found);
        }
    }
    Ok(())
}
