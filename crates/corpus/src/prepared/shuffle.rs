//! Orders that look random and are computed, not stored.

/// Rounds of the permutation; four make it look random to any short test, two more cost nothing.
const ROUNDS: u64 = 6;

/// A 64-bit value whose every bit depends on every bit of `x` (the finaliser of splitmix64).
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A hash of two values that is not symmetric in them.
pub(super) fn mix2(a: u64, b: u64) -> u64 {
    mix(mix(a.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ b)
}

/// The image of `index` under a permutation of `0..n` chosen by `key`; `index` must be below `n`.
///
/// A Feistel network permutes the next power of four; walking its cycle until it comes back below `n`
/// permutes `0..n` itself, in fewer than four steps on average.
pub(super) fn permute(index: u64, n: u64, key: u64) -> u64 {
    debug_assert!(index < n);
    let half_bits = (u64::BITS - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mut index = index;
    loop {
        index = feistel(index, half_bits, key);
        if index < n {
            return index;
        }
    }
}

/// A permutation of `0..4^half_bits`, whatever the round function.
fn feistel(index: u64, half_bits: u32, key: u64) -> u64 {
    let mask = (1 << half_bits) - 1;
    let (mut left, mut right) = (index >> half_bits, index & mask);
    for round in 0..ROUNDS {
        (left, right) = (right, left ^ (mix2(mix2(key, round), right) & mask));
    }
    left << half_bits | right
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutes_every_size() {
        for n in [1, 2, 3, 4, 5, 16, 17, 255, 1000, 1024, 1025] {
            for key in 0..3 {
                let mut seen: Vec<u64> = (0..n).map(|index| permute(index, n, key)).collect();
                seen.sort_unstable();
                assert!(seen.iter().copied().eq(0..n), "n {n}, key {key}");
            }
        }
        let last = u64::MAX - 1;
        assert!(permute(last, u64::MAX, 1) < u64::MAX);
    }

    #[test]
    fn the_order_looks_random_and_depends_on_the_key() {
        let n = 10_000;
        let order = |key| (0..n).map(|index| permute(index, n, key)).collect::<Vec<u64>>();
        let (one, two) = (order(1), order(2));
        // Equal places between random permutations: 1 expected, 10 all but impossible.
        assert!(one.iter().zip(&two).filter(|(a, b)| a == b).count() < 10);
        assert!(one.iter().enumerate().filter(|(i, x)| *i as u64 == **x).count() < 10);
        // Neighbours of a random order lie n / 3 apart on average, with a deviation of 24.
        let apart: u64 = one.windows(2).map(|pair| pair[0].abs_diff(pair[1])).sum::<u64>() / (n - 1);
        assert!((n / 3 - 150..n / 3 + 150).contains(&apart), "{apart}");
    }
}
