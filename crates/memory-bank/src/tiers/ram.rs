use std::collections::HashMap;
use std::sync::Arc;

use cluster_tree::ClusterId;
use lru::LruCache;

use crate::tiers::Encoded;

/// Blocks in RAM: those of pinned levels for good, the others until those used later need the room.
pub(crate) struct Ram {
    pinned_levels: Vec<usize>,
    pinned: HashMap<ClusterId, Arc<Encoded>>,
    pinned_bytes: u64,
    lru: LruCache<ClusterId, Arc<Encoded>>,
    lru_bytes: u64,
    /// Most bytes of blocks that are not pinned: what all of those that are leave of the limit.
    room: u64,
}

impl Ram {
    /// `room` is what the limit leaves beside all blocks of the pinned levels.
    pub(crate) fn new(room: u64, pinned_levels: Vec<usize>) -> Self {
        let (pinned, lru) = (HashMap::new(), LruCache::unbounded());
        Self { pinned_levels, pinned, pinned_bytes: 0, lru, lru_bytes: 0, room }
    }

    /// Bytes of the blocks held.
    pub(crate) fn bytes(&self) -> u64 {
        self.pinned_bytes + self.lru_bytes
    }

    /// A block, which becomes the one used last.
    pub(crate) fn get(&mut self, id: ClusterId) -> Option<Arc<Encoded>> {
        self.pinned.get(&id).or_else(|| self.lru.get(&id)).cloned()
    }

    /// Holds a block, unless it is larger than all the room, and returns those that had to go.
    pub(crate) fn insert(&mut self, id: ClusterId, block: Arc<Encoded>) -> Vec<ClusterId> {
        let bytes = block.bytes();
        if self.pinned_levels.contains(&usize::from(id.level)) {
            let before = self.pinned.insert(id, block).map_or(0, |before| before.bytes());
            self.pinned_bytes += bytes - before;
            return Vec::new();
        }
        if let Some(before) = self.lru.pop(&id) {
            self.lru_bytes -= before.bytes();
        }
        if bytes > self.room {
            return Vec::new();
        }
        let mut evicted = Vec::new();
        while self.lru_bytes + bytes > self.room
            && let Some((id, oldest)) = self.lru.pop_lru()
        {
            self.lru_bytes -= oldest.bytes();
            evicted.push(id);
        }
        self.lru_bytes += bytes;
        self.lru.put(id, block);
        evicted
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const LIMIT: u64 = 1000;
    /// Numbers of a block, by level; level 0 is pinned, and one block of level 3 is too much.
    const LENS: [usize; 4] = [25, 1, 37, 230];

    /// All blocks of level 0: two clusters and no generic one.
    const PINNED: u64 = 2 * 4 * 25;

    fn block(level: u8) -> Arc<Encoded> {
        Arc::new(Encoded::F32(vec![f32::from(level); LENS[usize::from(level)]]))
    }

    /// The same in a plain list, oldest first.
    #[derive(Default)]
    struct Model(Vec<ClusterId>);

    impl Model {
        fn bytes(&self) -> u64 {
            self.0.iter().map(|id| 4 * LENS[usize::from(id.level)] as u64).sum()
        }

        fn get(&mut self, id: ClusterId) -> bool {
            let place = self.0.iter().position(|&held| held == id);
            if let Some(place) = place {
                let id = self.0.remove(place);
                self.0.push(id);
            }
            place.is_some()
        }

        fn insert(&mut self, id: ClusterId) -> Vec<ClusterId> {
            self.0.retain(|&held| held != id);
            if 4 * LENS[usize::from(id.level)] as u64 > LIMIT - PINNED {
                return Vec::new();
            }
            self.0.push(id);
            let mut evicted = Vec::new();
            while self.bytes() > LIMIT - PINNED {
                evicted.push(self.0.remove(0));
            }
            evicted
        }
    }

    #[test]
    fn never_holds_more_than_its_limit_and_evicts_as_a_plain_list_does() {
        for seed in 0..20 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (mut ram, mut model) = (Ram::new(LIMIT - PINNED, vec![0]), Model::default());
            let (mut pinned, mut n_evicted) = ([false; 2], 0);
            for _ in 0..2000 {
                let level = rng.random_range(0..4u8);
                let index = rng.random_range(0..if level == 0 { 2 } else { 30 });
                let id = ClusterId { level, index };
                let inserts = rng.random_bool(0.5);
                match (inserts, level) {
                    (true, 0) => {
                        assert!(ram.insert(id, block(level)).is_empty());
                        pinned[index as usize] = true;
                    }
                    (true, _) => {
                        let evicted = ram.insert(id, block(level));
                        assert_eq!(evicted, model.insert(id), "seed {seed}");
                        n_evicted += evicted.len();
                    }
                    (false, 0) => assert_eq!(ram.get(id).is_some(), pinned[index as usize]),
                    (false, _) => assert_eq!(ram.get(id).is_some(), model.get(id), "seed {seed}"),
                }
                let n_pinned = pinned.iter().filter(|&&pinned| pinned).count() as u64;
                assert_eq!(ram.bytes(), model.bytes() + n_pinned * 100);
                assert!(ram.bytes() <= LIMIT);
            }
            assert!(n_evicted > 100, "{n_evicted}");
        }
    }

    #[test]
    fn what_is_read_stays_shared() {
        let mut ram = Ram::new(LIMIT, vec![]);
        let (id, held) = (ClusterId { level: 1, index: 0 }, block(1));
        ram.insert(id, held.clone());
        assert!(Arc::ptr_eq(&held, &ram.get(id).unwrap()));
    }
}
