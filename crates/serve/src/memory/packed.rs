use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anchor::PackedBlock;
use cluster_tree::ClusterId;
use lru::LruCache;
use memory_bank::Encoded;
use tokio::sync::watch;

use super::{Bank, Error, PackedLevelStats, PackedStats, Result};

/// A block of a load of a bank.
type Key = (u64, ClusterId);
type Landed = std::result::Result<Arc<Vec<Arc<PackedBlock>>>, Arc<Error>>;
/// Where those who wait for a block that another request has asked for hear of it.
type Joined = watch::Receiver<Option<Landed>>;

/// The packed blocks of all banks, at most so many bytes: those of pinned levels for good, the others until those
/// used later need the room. A block that several miss at once is fetched and packed once.
pub(super) struct Packed {
    limit: u64,
    pinned_levels: Vec<usize>,
    state: Mutex<State>,
}

struct State {
    lru: LruCache<Key, Arc<PackedBlock>>,
    pinned: HashMap<Key, Arc<PackedBlock>>,
    /// Of both.
    bytes: u64,
    pinned_bytes: u64,
    flights: HashMap<Key, Joined>,
    levels: Vec<PackedLevelStats>,
}

/// What became of one block of a fetch.
pub(super) struct Got {
    pub(super) block: Arc<PackedBlock>,
    /// Whether it was packed already.
    pub(super) cached: bool,
}

impl Packed {
    pub(super) fn new(limit: u64, pinned_levels: Vec<usize>, n_levels: usize) -> Self {
        let levels = (0..n_levels).map(|level| PackedLevelStats { level, ..PackedLevelStats::default() });
        let state = State {
            lru: LruCache::unbounded(),
            pinned: HashMap::new(),
            bytes: 0,
            pinned_bytes: 0,
            flights: HashMap::new(),
            levels: levels.collect(),
        };
        Self { limit, pinned_levels, state: Mutex::new(state) }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn pinned_levels(&self) -> &[usize] {
        &self.pinned_levels
    }

    /// The packed blocks of a bank, in the order of `ids`, each of which is there once. What is missing is fetched in
    /// one request, which goes on when the caller does not.
    pub(super) async fn fetch(self: &Arc<Self>, bank: &Arc<Bank>, ids: &[ClusterId]) -> Result<Vec<Got>> {
        self.bring(bank, ids, true).await
    }

    /// Packs a block that nobody has asked for, which counts as neither found nor missing.
    pub(super) async fn fetch_ahead(self: &Arc<Self>, bank: &Arc<Bank>, id: ClusterId) -> Result<()> {
        self.bring(bank, &[id], false).await.map(|_| ())
    }

    /// Whether a block of so many bytes fits in without another having to go.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.state().bytes + bytes <= self.limit
    }

    async fn bring(self: &Arc<Self>, bank: &Arc<Bank>, ids: &[ClusterId], asked: bool) -> Result<Vec<Got>> {
        let mut found: Vec<Option<Got>> = Vec::with_capacity(ids.len());
        let (mut own, mut joined) = (vec![], Vec::<Joined>::new());
        {
            let mut state = self.state();
            for &id in ids {
                let block = state.get((bank.load(), id));
                if asked {
                    state.asked(id, block.is_some());
                }
                if block.is_none() {
                    match state.flights.get(&(bank.load(), id)) {
                        Some(flight) if joined.iter().any(|other| other.same_channel(flight)) => {}
                        Some(flight) => joined.push(flight.clone()),
                        None => own.push(id),
                    }
                }
                found.push(block.map(|block| Got { block, cached: true }));
            }
            if !own.is_empty() {
                let flight = Flight::new(self, bank, own, &mut state);
                joined.push(flight.sender.subscribe());
                tokio::spawn(flight.fly());
            }
        }
        for mut flight in joined {
            let landed = flight.wait_for(Option::is_some).await.ok().and_then(|landed| landed.clone());
            let blocks = match landed {
                Some(Ok(blocks)) => blocks,
                Some(Err(error)) => return Err(Error::Shared(error)),
                None => return Err(Error::Task("packing of memory blocks".to_owned())),
            };
            for block in blocks.iter() {
                if let Some(place) = ids.iter().position(|&id| id == block.id()) {
                    found[place].get_or_insert_with(|| Got { block: Arc::clone(block), cached: false });
                }
            }
        }
        let missing = || Error::Task("packing of memory blocks".to_owned());
        found.into_iter().map(|got| got.ok_or_else(missing)).collect()
    }

    /// Whether a block is packed or about to be.
    pub(super) fn has(&self, bank: &Bank, id: ClusterId) -> bool {
        let (state, key) = (self.state(), (bank.load(), id));
        state.pinned.contains_key(&key) || state.lru.contains(&key) || state.flights.contains_key(&key)
    }

    /// Lets the blocks of a load go.
    pub(super) fn forget(&self, load: u64) {
        let mut state = self.state();
        let gone: Vec<Key> = state.lru.iter().map(|(&key, _)| key).filter(|key| key.0 == load).collect();
        for key in gone {
            state.bytes -= state.lru.pop(&key).map_or(0, |block| block.bytes());
        }
        let pinned: u64 = state.pinned.iter().filter(|(key, _)| key.0 == load).map(|(_, b)| b.bytes()).sum();
        state.pinned.retain(|key, _| key.0 != load);
        state.pinned_bytes -= pinned;
        state.bytes -= pinned;
    }

    pub(super) fn stats(&self) -> PackedStats {
        let state = self.state();
        PackedStats {
            bytes: state.bytes,
            limit_bytes: self.limit,
            n_blocks: (state.lru.len() + state.pinned.len()) as u64,
            levels: state.levels.clone(),
        }
    }

    /// No code that can panic runs under this lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, state: &mut State, load: u64, block: &Arc<PackedBlock>) {
        let (id, bytes) = (block.id(), block.bytes());
        let pins = self.pinned_levels.contains(&usize::from(id.level));
        let pins = pins && state.pinned_bytes + bytes <= self.limit;
        if bytes > self.limit - state.pinned_bytes {
            return;
        }
        while state.bytes + bytes > self.limit
            && let Some(((_, id), oldest)) = state.lru.pop_lru()
        {
            state.bytes -= oldest.bytes();
            state.level(id).n_evictions += 1;
        }
        let before = match pins {
            true => state.pinned.insert((load, id), Arc::clone(block)),
            false => state.lru.put((load, id), Arc::clone(block)),
        };
        let before = before.map_or(0, |before| before.bytes());
        state.bytes = state.bytes + bytes - before;
        state.pinned_bytes += if pins { bytes - before } else { 0 };
    }
}

impl State {
    /// A block, which becomes the one used last.
    fn get(&mut self, key: Key) -> Option<Arc<PackedBlock>> {
        self.pinned.get(&key).or_else(|| self.lru.get(&key)).cloned()
    }

    fn level(&mut self, id: ClusterId) -> &mut PackedLevelStats {
        &mut self.levels[usize::from(id.level)]
    }

    fn asked(&mut self, id: ClusterId, hit: bool) {
        let level = self.level(id);
        *(if hit { &mut level.n_hits } else { &mut level.n_misses }) += 1;
    }
}

/// Blocks on their way, for whoever waits.
struct Flight {
    packed: Arc<Packed>,
    bank: Arc<Bank>,
    ids: Vec<ClusterId>,
    sender: watch::Sender<Option<Landed>>,
}

impl Flight {
    fn new(packed: &Arc<Packed>, bank: &Arc<Bank>, ids: Vec<ClusterId>, state: &mut State) -> Self {
        let sender = watch::Sender::new(None);
        ids.iter().for_each(|&id| drop(state.flights.insert((bank.load(), id), sender.subscribe())));
        Self { packed: Arc::clone(packed), bank: Arc::clone(bank), ids, sender }
    }

    async fn fly(self) {
        let landed = self.pack().await.map_err(Arc::new);
        if let Ok(blocks) = &landed {
            let mut state = self.packed.state();
            for block in blocks.iter() {
                state.level(block.id()).n_packed += 1;
                self.packed.hold(&mut state, self.bank.load(), block);
            }
        }
        self.sender.send_replace(Some(landed));
    }

    async fn pack(&self) -> Result<Arc<Vec<Arc<PackedBlock>>>> {
        let fetched = self.bank.fetch(&self.ids).await?;
        let (ids, spec) = (self.ids.clone(), Arc::clone(self.bank.shared_spec()));
        super::blocking(move || {
            let pack =
                |(id, block): (ClusterId, Arc<Encoded>)| Ok(Arc::new(PackedBlock::pack(id, &block, &spec)?));
            Ok(Arc::new(ids.into_iter().zip(fetched).map(pack).collect::<Result<_>>()?))
        })
        .await
    }
}

/// Also when the work has panicked: those who wait are told by the end of the channel.
impl Drop for Flight {
    fn drop(&mut self) {
        let mut state = self.packed.state();
        self.ids.iter().for_each(|&id| drop(state.flights.remove(&(self.bank.load(), id))));
    }
}
