use std::collections::{BTreeSet, HashMap};

use cluster_tree::ClusterId;

use crate::Step;

/// Blocks kept between reads, in a bounded number of bytes.
///
/// Who validates reads the same blocks in the same order time and again. Under such an order a cache that
/// makes room by age of use (LRU) has, once it is full, none of what comes next. So a newcomer takes the place
/// only of what was not read in this round or the one before, and is not kept when there is none; a round is
/// all reads after the same step.
pub struct Kept<V> {
    limit: u64,
    bytes: u64,
    round: u64,
    step: Step,
    entries: HashMap<ClusterId, Entry<V>>,
    /// By the round in which they were read last.
    by_age: BTreeSet<(u64, ClusterId)>,
}

struct Entry<V> {
    value: V,
    bytes: u64,
    round: u64,
}

impl<V> Kept<V> {
    /// At most `limit` bytes.
    pub fn new(limit: u64) -> Self {
        let (entries, by_age) = (HashMap::new(), BTreeSet::new());
        Self { limit, bytes: 0, round: 0, step: Step(0), entries, by_age }
    }

    /// Bytes kept.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is kept of a block that is read after `step`.
    pub fn get(&mut self, step: Step, id: ClusterId) -> Option<&V> {
        if step != self.step {
            (self.step, self.round) = (step, self.round + 1);
        }
        let entry = self.entries.get_mut(&id)?;
        self.by_age.remove(&(entry.round, id));
        entry.round = self.round;
        self.by_age.insert((entry.round, id));
        Some(&entry.value)
    }

    /// Keeps a block that was read in this round, if it finds room; it takes the place of what was kept of it.
    pub fn put(&mut self, id: ClusterId, bytes: u64, value: V) {
        self.remove(id);
        if bytes > self.limit {
            return;
        }
        while self.bytes + bytes > self.limit {
            match self.by_age.first() {
                Some(&(round, oldest)) if round + 1 < self.round => self.remove(oldest),
                _ => return,
            }
        }
        self.bytes += bytes;
        self.by_age.insert((self.round, id));
        self.entries.insert(id, Entry { value, bytes, round: self.round });
    }

    fn remove(&mut self, id: ClusterId) {
        if let Some(Entry { bytes, round, .. }) = self.entries.remove(&id) {
            self.bytes -= bytes;
            self.by_age.remove(&(round, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(index: u32) -> ClusterId {
        ClusterId { level: 0, index }
    }

    /// Hits of a round that reads these blocks, of 10 bytes each.
    fn read(kept: &mut Kept<u32>, step: u64, blocks: std::ops::Range<u32>) -> usize {
        let hits = |index: u32| match kept.get(Step(step), id(index)).copied() {
            Some(found) => {
                assert_eq!(found, index);
                true
            }
            None => {
                kept.put(id(index), 10, index);
                false
            }
        };
        blocks.map(hits).filter(|&is_hit| is_hit).count()
    }

    #[test]
    fn what_is_read_in_turns_stays_in_part_and_what_is_read_no_more_goes() {
        let mut kept = Kept::new(45);
        // A fifth has no room, and takes none of the others'.
        assert_eq!((read(&mut kept, 1, 0..6), kept.bytes()), (0, 40));
        for step in 2..5 {
            assert_eq!((read(&mut kept, step, 0..6), kept.bytes()), (4, 40));
        }
        // Others: in the second round the old ones are two rounds old.
        assert_eq!(read(&mut kept, 5, 10..13), 0);
        assert_eq!(read(&mut kept, 6, 10..13), 0);
        assert_eq!((read(&mut kept, 7, 10..13), kept.bytes()), (3, 40));
        // One that is larger than all the room is not kept, and what was kept of it goes.
        kept.put(id(10), 46, 10);
        assert_eq!(kept.get(Step(7), id(10)), None);
        assert_eq!(kept.bytes(), 30);
    }
}
