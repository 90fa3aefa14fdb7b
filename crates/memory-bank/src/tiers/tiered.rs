use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cluster_tree::ClusterId;
use rayon::prelude::*;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::schedule::setting;
use crate::tiers::disk::{Disk, DiskAnswer};
use crate::tiers::encoded::ErrorSums;
use crate::tiers::ledger::{Ledger, Timing};
use crate::tiers::ram::Ram;
use crate::tiers::{BlockDtype, Encoded, TierOptions, TierSource, TierState, TieredStats};
use crate::{Block, BlockSpec, BlockStore, Error, Result, Step};

/// Bytes of pinned blocks asked for at once, as f32, unless one block is larger.
const WARM_BYTES: usize = 256 << 20;

/// The bank that is read, as it is after a step. Caches are of this bank and no other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BankVersion {
    /// The last step applied. Sources may be asked for it, and must not go beyond it.
    pub step: Step,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
}

/// A bank read through tiers: RAM, a local disk, then its sources. A clone is another handle to the
/// same tiers. Pushes and saves are refused.
///
/// Every block goes through [`TierOptions::dtype`], also one that is answered straight from a source,
/// so its bits do not depend on the tier. A tier that fails, or that has been slower than the next, is
/// passed over; a fetch fails when all of them do. Blocks that are missing at the same time are
/// asked for once, those of one fetch in one request.
#[derive(Clone)]
pub struct Tiered {
    inner: Arc<Inner>,
}

struct Inner {
    spec: BlockSpec,
    version: BankVersion,
    dtype: BlockDtype,
    pinned_levels: Vec<usize>,
    tiers: Vec<Tier>,
    cache: Mutex<Cache>,
    ledger: Mutex<Ledger>,
    states: watch::Sender<Vec<TierState>>,
    start: Instant,
}

/// A tier below RAM.
enum Tier {
    Disk(Arc<Disk>),
    Source(TierSource),
}

/// What is in RAM, and what is on its way there.
struct Cache {
    ram: Option<Ram>,
    flights: HashMap<ClusterId, Joined>,
}

type Found = HashMap<ClusterId, Arc<Encoded>>;
type Landed = std::result::Result<Arc<Found>, Arc<Error>>;
/// Where those who wait for another fetch's blocks hear of them.
type Joined = watch::Receiver<Option<Landed>>;

impl Tiered {
    /// Opens the tiers over the sources of a bank, the fastest first. Fails on options that the bank
    /// cannot have, on no sources or sources of different sizes, and on a disk folder that is another
    /// bank's, that another process holds, or that cannot be opened.
    pub fn open(options: &TierOptions, version: BankVersion, sources: Vec<TierSource>) -> Result<Self> {
        let Some(first) = sources.first() else {
            return Err(setting("sources", "at least one", "none"));
        };
        let spec = first.spec().clone();
        if let Some(other) = sources.iter().find(|source| *source.spec() != spec) {
            let expected = format!("{spec:?}, as of source {}", first.name());
            return Err(setting("spec", &expected, format!("{:?} of source {}", other.spec(), other.name())));
        }
        options.validate(&spec)?;
        let (dtype, pinned_levels) = (options.dtype, options.pinned_levels.clone());
        let open = |disk| Disk::open(disk, &version, &spec, dtype).map(|disk| Tier::Disk(Arc::new(disk)));
        let mut tiers: Vec<Tier> = options.disk.iter().map(open).collect::<Result<_>>()?;
        let n_caches = tiers.len();
        tiers.extend(sources.into_iter().map(Tier::Source));
        let room = options.ram_bytes() - options.pinned_bytes(&spec);
        let ram = (options.ram_mib > 0).then(|| Ram::new(room, pinned_levels.clone()));
        let ledger = Ledger::new(spec.clone(), tiers.iter().map(Tier::name).collect(), n_caches);
        let states = watch::Sender::new(ledger.states());
        let inner = Inner {
            spec,
            version,
            dtype,
            pinned_levels,
            tiers,
            cache: Mutex::new(Cache { ram, flights: HashMap::new() }),
            ledger: Mutex::new(ledger),
            states,
            start: Instant::now(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Fetches the blocks of the pinned levels, so that no one waits for them later.
    ///
    /// # Errors
    /// Those of [`BlockStore::fetch`].
    pub async fn warm(&self) -> Result<()> {
        let spec = &self.inner.spec;
        for &level in &self.inner.pinned_levels {
            let ids: Vec<ClusterId> =
                (0..=spec.n_blocks(level)).map(|row| spec.id_of_row(level, row)).collect();
            let n_at_once = (WARM_BYTES / (spec.block_len(level) * size_of::<f32>())).max(1);
            for ids in ids.chunks(n_at_once) {
                self.fetch_shared(self.inner.version.step, ids).await?;
            }
        }
        Ok(())
    }

    /// As [`BlockStore::fetch`], of blocks as the caches hold them, and shared with RAM.
    ///
    /// # Errors
    /// Those of [`BlockStore::fetch`].
    pub async fn fetch_shared(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Arc<Encoded>>> {
        let inner = &*self.inner;
        inner.check(after, ids)?;
        let unique: BTreeSet<ClusterId> = ids.iter().copied().collect();
        let mut missing: Vec<ClusterId> = unique.into_iter().collect();
        inner.ledger().asked(&missing);
        let mut found = Found::new();
        while !missing.is_empty() {
            let (flight, joined) = inner.look_up(&missing, &mut found);
            if let Some(flight) = flight {
                let landed = flight.fly().await?;
                take(&mut found, &missing, &landed);
            }
            for mut joined in joined {
                // Whoever was to land it may have gone: then its blocks are asked for again.
                let landed = joined.wait_for(Option::is_some).await.ok().and_then(|landed| landed.clone());
                match landed {
                    Some(Ok(landed)) => take(&mut found, &missing, &landed),
                    Some(Err(source)) => return Err(Error::Shared { source }),
                    None => {}
                }
            }
            missing.retain(|id| !found.contains_key(id));
        }
        Ok(ids.iter().map(|id| Arc::clone(&found[id])).collect())
    }

    /// What the tiers have done so far.
    pub fn stats(&self) -> TieredStats {
        let held = self.inner.tiers.iter().map(|tier| match tier {
            Tier::Disk(disk) => disk.bytes(),
            Tier::Source(_) => 0,
        });
        let held: Vec<u64> = held.collect();
        let ram_bytes = self.inner.cache().ram.as_ref().map(Ram::bytes);
        self.inner.ledger().stats(ram_bytes, &held)
    }

    /// Tells when a tier is bypassed, used again or dropped: the states of the tiers below RAM, in the
    /// order of [`TieredStats::tiers`].
    pub fn states(&self) -> watch::Receiver<Vec<TierState>> {
        self.inner.states.subscribe()
    }
}

impl BlockStore for Tiered {
    fn spec(&self) -> &BlockSpec {
        &self.inner.spec
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        let shared = self.fetch_shared(after, ids).await?;
        let ids = ids.to_vec();
        let block = |(id, shared)| Block { id, values: Encoded::into_values(shared) };
        blocking(move || Ok(ids.into_par_iter().zip(shared).map(block).collect())).await
    }

    async fn push(&self, step: Step, _rank: usize, _grads: Vec<Block>) -> Result<()> {
        Err(Error::ReadOnly { action: "push", step, applied: self.inner.version.step })
    }

    async fn save(&self, step: Step) -> Result<()> {
        Err(Error::ReadOnly { action: "save", step, applied: self.inner.version.step })
    }
}

impl Inner {
    fn check(&self, after: Step, ids: &[ClusterId]) -> Result<()> {
        let applied = self.version.step;
        if after > applied {
            return Err(Error::NotReached { after, applied });
        }
        ids.iter().try_for_each(|&id| self.spec.check(id))
    }

    /// Takes what RAM has. The rest is on its way for others, or becomes a flight of its own.
    fn look_up(&self, ids: &[ClusterId], found: &mut Found) -> (Option<Flight<'_>>, Vec<Joined>) {
        let asked = Instant::now();
        let (mut own, mut joined) = (Vec::new(), Vec::<Joined>::new());
        let mut cache = self.cache();
        for &id in ids {
            if let Some(block) = cache.ram.as_mut().and_then(|ram| ram.get(id)) {
                found.insert(id, block);
            } else if let Some(flight) = cache.flights.get(&id) {
                if !joined.iter().any(|other| other.same_channel(flight)) {
                    joined.push(flight.clone());
                }
            } else {
                own.push(id);
            }
        }
        let flight = (!own.is_empty()).then(|| {
            let sender = watch::Sender::new(None);
            own.iter().for_each(|&id| drop(cache.flights.insert(id, sender.subscribe())));
            Flight { inner: self, ids: own, sender }
        });
        let has_ram = cache.ram.is_some();
        drop(cache);
        if has_ram {
            let hits = ids.iter().map(|&id| (id, found.contains_key(&id)));
            self.ledger().ram_answered(self.since(asked), hits);
        }
        (flight, joined)
    }

    /// Asks tier after tier for blocks that are not in RAM, until all are there.
    async fn fetch_below(&self, ids: &[ClusterId]) -> Result<Below> {
        let route = self.ledger().routing.route(self.start.elapsed());
        let (mut found, mut fresh, mut failed) = (Found::new(), Vec::new(), Vec::new());
        let (mut missing, mut error) = (ids.to_vec(), None);
        for &tier in &route.order {
            let asked = Instant::now();
            let answer = match &self.tiers[tier] {
                Tier::Disk(disk) => self.read(tier, disk, &missing).await,
                Tier::Source(source) => self.pull(tier, source, &missing).await,
            };
            match answer {
                Ok(blocks) => {
                    if let Tier::Source(_) = self.tiers[tier] {
                        fresh.extend(blocks.iter().cloned());
                    }
                    found.extend(blocks);
                    missing.retain(|id| !found.contains_key(id));
                }
                Err(source) => {
                    failed.push((tier, asked));
                    error = Some(source);
                }
            }
            if missing.is_empty() {
                for (tier, asked) in failed {
                    self.ledger().answered_for(tier, self.since(asked), ids);
                }
                self.report();
                let disk = self.disk().filter(|&(tier, _)| route.uses(tier));
                return Ok(Below { found, fresh, disk });
            }
        }
        self.report();
        // A source has every block or fails, so with blocks missing there is an error.
        Err(error.unwrap_or(Error::Unfinished))
    }

    /// What the disk has of some blocks. A disk that fails is dropped.
    async fn read(&self, tier: usize, disk: &Arc<Disk>, ids: &[ClusterId]) -> Result<Vec<Held>> {
        let (asked, wanted, disk) = (Instant::now(), ids.to_vec(), Arc::clone(disk));
        match blocking(move || disk.read(&wanted)).await {
            Ok(DiskAnswer { found, damaged }) => {
                let hit: BTreeSet<ClusterId> = found.iter().map(|&(id, _)| id).collect();
                let hits = ids.iter().map(|&id| (id, hit.contains(&id)));
                let mut ledger = self.ledger();
                ledger.answered(tier, self.since(asked), hits);
                ledger.damaged(tier, &damaged);
                Ok(found)
            }
            Err(error) => {
                let mut ledger = self.ledger();
                ledger.failed(tier, &error);
                ledger.dropped(tier, &error);
                Err(error)
            }
        }
    }

    /// Blocks from a source, encoded.
    async fn pull(&self, tier: usize, source: &TierSource, ids: &[ClusterId]) -> Result<Vec<Held>> {
        let asked = Instant::now();
        let pulled = match source.fetch(self.version.step, ids).await {
            Ok(blocks) => {
                let timing = self.since(asked);
                self.ledger().answered(tier, timing, ids.iter().map(|&id| (id, true)));
                self.encode(blocks).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = &pulled {
            self.ledger().failed(tier, error);
        }
        pulled
    }

    async fn encode(&self, blocks: Vec<Block>) -> Result<Vec<Held>> {
        let (dtype, row_len) = (self.dtype, self.spec.row_len());
        let encode = move |block: Block| {
            let id = block.id;
            if dtype == BlockDtype::F32 {
                return Ok(((id, Arc::new(Encoded::F32(block.values))), ErrorSums::default()));
            }
            let encoded = Encoded::encode(dtype, row_len, &block)?;
            let error = ErrorSums::of(&block.values, &encoded);
            Ok(((id, Arc::new(encoded)), error))
        };
        let encoded: Vec<(Held, ErrorSums)> =
            blocking(move || blocks.into_par_iter().map(encode).collect()).await?;
        let mut ledger = self.ledger();
        encoded.iter().for_each(|((id, _), error)| ledger.encoded(*id, *error));
        Ok(encoded.into_iter().map(|(held, _)| held).collect())
    }

    /// Keeps on disk what came from a source. A disk that fails, as a full one does, is dropped.
    async fn keep(&self, tier: usize, disk: Arc<Disk>, blocks: Vec<Held>) {
        let written = blocking(move || disk.write(&blocks)).await;
        match written {
            Ok(evicted) => self.ledger().evicted(tier, &evicted),
            Err(error) => {
                self.ledger().dropped(tier, &error);
                self.report();
            }
        }
    }

    fn disk(&self) -> Option<(usize, Arc<Disk>)> {
        self.tiers.iter().enumerate().find_map(|(tier, found)| match found {
            Tier::Disk(disk) => Some((tier, Arc::clone(disk))),
            Tier::Source(_) => None,
        })
    }

    fn report(&self) {
        let now = self.ledger().states();
        self.states.send_if_modified(|states| {
            let changed = *states != now;
            *states = now;
            changed
        });
    }

    fn since(&self, asked: Instant) -> Timing {
        Timing { now: self.start.elapsed(), took: asked.elapsed() }
    }

    /// No code that can panic runs under this lock, nor under the next.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tier {
    fn name(&self) -> String {
        match self {
            Self::Disk(_) => "disk".to_owned(),
            Self::Source(source) => source.name().to_owned(),
        }
    }
}

type Held = (ClusterId, Arc<Encoded>);

/// What the tiers below RAM have answered.
struct Below {
    found: Found,
    /// What of it came from a source.
    fresh: Vec<Held>,
    /// Where to keep that.
    disk: Option<(usize, Arc<Disk>)>,
}

/// Blocks that one fetch asks for and others may wait for. When that fetch is dropped before they
/// land, those who wait are told, and ask themselves.
struct Flight<'a> {
    inner: &'a Inner,
    ids: Vec<ClusterId>,
    sender: watch::Sender<Option<Landed>>,
}

impl Flight<'_> {
    async fn fly(self) -> Result<Arc<Found>> {
        let inner = self.inner;
        let (landed, disk, fresh) = match inner.fetch_below(&self.ids).await {
            Ok(Below { found, fresh, disk }) => (Ok(Arc::new(found)), disk, fresh),
            Err(error) => (Err(Arc::new(error)), None, Vec::new()),
        };
        self.land(&landed);
        if let Some((tier, disk)) = disk
            && !fresh.is_empty()
        {
            inner.keep(tier, disk, fresh).await;
        }
        landed.map_err(|error| Arc::try_unwrap(error).unwrap_or_else(|source| Error::Shared { source }))
    }

    /// Puts the blocks into RAM, and hands them to those who wait.
    fn land(self, landed: &Landed) {
        let mut evicted = Vec::new();
        if let (Some(ram), Ok(found)) = (&mut self.inner.cache().ram, landed) {
            for id in &self.ids {
                evicted
                    .extend(found.get(id).into_iter().flat_map(|block| ram.insert(*id, Arc::clone(block))));
            }
        }
        self.inner.ledger().ram_evicted(&evicted);
        self.sender.send_replace(Some(landed.clone()));
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut cache = self.inner.cache();
        self.ids.iter().for_each(|id| drop(cache.flights.remove(id)));
    }
}

/// Copies what is wanted from one map to another.
fn take(found: &mut Found, wanted: &[ClusterId], from: &Found) {
    let wanted = wanted.iter().filter_map(|&id| from.get(&id).map(|block| (id, Arc::clone(block))));
    found.extend(wanted);
}

/// Runs work that reads, copies or computes much, so that the runtime's own threads stay free.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|source| Error::Task { source })?
}
