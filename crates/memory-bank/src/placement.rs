use cluster_tree::ClusterId;

use crate::schedule::setting;
use crate::{Error, Result};

/// Most shards a bank may have.
pub const MAX_SHARDS: usize = 4096;

/// Which part of a bank a shard owns: the blocks whose [`owner`] is `shard`, of `n_shards`.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// This shard, from 0.
    pub shard: usize,
    /// Shards of the bank.
    pub n_shards: usize,
}

impl Placement {
    /// The only shard of a bank.
    pub const WHOLE: Self = Self { shard: 0, n_shards: 1 };

    /// Fails on a shard that is not one of `n_shards`, and on more than [`MAX_SHARDS`].
    pub fn validate(self) -> Result<()> {
        if !(1..=MAX_SHARDS).contains(&self.n_shards) {
            return Err(setting("n_shards", &format!("1 to {MAX_SHARDS}"), self.n_shards));
        }
        if self.shard >= self.n_shards {
            return Err(setting("shard", &format!("below n_shards {}", self.n_shards), self.shard));
        }
        Ok(())
    }

    /// Whether the shard owns a block.
    pub fn owns(self, id: ClusterId) -> bool {
        owner(id, self.n_shards) == self.shard
    }

    /// Fails on a block that another shard owns.
    pub fn check(self, id: ClusterId) -> Result<()> {
        let owner = owner(id, self.n_shards);
        if owner == self.shard {
            return Ok(());
        }
        Err(Error::NotOwned { id, owner, shard: self.shard, n_shards: self.n_shards })
    }
}

/// The shard that owns a block: the one with the largest weight for it (rendezvous hashing, Thaler &
/// Ravishankar 1998). From n to n + 1 shards, one block in n + 1 moves, and only to the new shard.
///
/// # Panics
/// If there are no shards.
pub fn owner(id: ClusterId, n_shards: usize) -> usize {
    assert!(n_shards > 0, "a bank has at least one shard");
    let block = mix(u64::from(id.level) << 32 | u64::from(id.index));
    let weight = |shard: &usize| mix(block ^ mix(*shard as u64 + 1));
    (0..n_shards).max_by_key(weight).unwrap_or_default()
}

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit of `x` moves half of all bits.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> impl Iterator<Item = ClusterId> {
        let clusters = (0..40_000).map(|index| ClusterId { level: (index % 4) as u8, index });
        clusters.chain((0..4).map(|level| ClusterId { level, index: ClusterId::GENERIC }))
    }

    #[test]
    fn shards_own_equal_parts() {
        for n_shards in [1, 2, 3, 8, 17] {
            let mut counts = vec![0.0; n_shards];
            ids().for_each(|id| counts[owner(id, n_shards)] += 1.0);
            let mean = 40_004.0 / n_shards as f64;
            assert!(counts.iter().all(|count| (count / mean - 1.0f64).abs() < 0.06), "{counts:?}");
        }
    }

    #[test]
    fn one_more_shard_takes_its_part_and_nothing_else_moves() {
        for n_shards in [1, 2, 5, 16] {
            let moved: Vec<ClusterId> =
                ids().filter(|&id| owner(id, n_shards) != owner(id, n_shards + 1)).collect();
            assert!(moved.iter().all(|&id| owner(id, n_shards + 1) == n_shards));
            let part = moved.len() as f64 * (n_shards + 1) as f64 / 40_004.0;
            assert!((part - 1.0).abs() < 0.06, "{part} of the expected part moved");
        }
    }

    /// A checkpoint names its owners by nothing but this function.
    #[test]
    fn owners_never_change() {
        let owners: Vec<usize> = (0..16).map(|index| owner(ClusterId { level: 3, index }, 5)).collect();
        assert_eq!(owners, [2, 4, 0, 1, 3, 3, 2, 3, 1, 0, 4, 2, 4, 4, 4, 3]);
    }
}
