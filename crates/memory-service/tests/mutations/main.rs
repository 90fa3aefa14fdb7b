//! Every parser of the wire, of a bank's files and of certificates, given damaged input: what `.ci/fuzz` does
//! at length with inputs that it finds, in seconds with inputs that are the same every time.

use std::panic::{AssertUnwindSafe, catch_unwind};

use memory_service::fuzzing::Target;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random inputs of each kind, of each target.
const N_RANDOM: usize = 400;
/// What fixed fields and varints can be at worst, and the marks of JSON, TOML and DER.
const EXTREMES: [&[u8]; 14] = [
    &[0; 8],
    &[0xff; 4],
    &[0xff; 8],
    &[0, 0, 0, 0x80],
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0xff; 11],
    &[0x84, 0xff, 0xff, 0xff, 0xff],
    b"18446744073709551615",
    b"-1",
    b"1e400",
    b"\\u0000\\n",
    b"[[[[[[[[",
    b"\"}],",
];

fn targets() -> Vec<Target> {
    memory_bank::fuzzing::targets().into_iter().chain(memory_service::fuzzing::targets()).collect()
}

/// Counts of inputs that were taken and refused.
#[derive(Default)]
struct Counts {
    taken: usize,
    refused: usize,
}

impl Counts {
    fn check(&mut self, target: &Target, bytes: &[u8]) {
        match catch_unwind(AssertUnwindSafe(|| (target.check)(bytes))) {
            Ok(true) => self.taken += 1,
            Ok(false) => self.refused += 1,
            Err(_) => panic!("{} does not hold for b\"{}\"", target.name, bytes.escape_ascii()),
        }
    }
}

/// Without this the other tests could refuse everything for a reason that has nothing to do with damage.
#[test]
fn undamaged_input_is_taken() {
    let targets = targets();
    assert_eq!(targets.len(), 9);
    for target in targets {
        for (i, seed) in target.seeds.iter().enumerate() {
            assert!((target.check)(seed), "{}: seed {i}", target.name);
        }
    }
}

#[test]
fn input_cut_anywhere_is_refused_or_whole() {
    let mut all = 0;
    for target in targets() {
        let mut counts = Counts::default();
        for seed in &target.seeds {
            // Every length, but of long manifests.
            for len in (0..seed.len()).step_by(1 + seed.len() / 4096) {
                counts.check(&target, &seed[..len]);
            }
        }
        assert!(counts.refused > 0, "{}", target.name);
        // What is cut is no JSON any more, but for the end of the last line.
        let most = if target.name == "manifest" { target.seeds.len() } else { 0 };
        if ["manifest", "record", "segment_index"].contains(&target.name) {
            assert!(counts.taken <= most, "{}: {} taken", target.name, counts.taken);
        }
        all += counts.taken + counts.refused;
    }
    assert!(all > 4000, "{all} inputs");
}

#[test]
fn damaged_input_is_refused_or_what_it_says() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut all = 0;
    for target in targets() {
        let mut counts = Counts::default();
        for _ in 0..N_RANDOM {
            let mut pick = || target.seeds[rng.random_range(0..target.seeds.len())].clone();
            let (seed, other) = (pick(), pick());
            for damage in [flip, insert, remove, repeat, overwrite, number] {
                counts.check(&target, &damage(seed.clone(), &mut rng));
            }
            let (end, start) = (rng.random_range(0..=seed.len()), rng.random_range(0..=other.len()));
            counts.check(&target, &[&seed[..end], &other[start..]].concat());
        }
        assert!(counts.refused > N_RANDOM && counts.taken > 0, "{}", target.name);
        all += counts.taken + counts.refused;
    }
    assert_eq!(all, 9 * 7 * N_RANDOM);
}

#[test]
fn noise_is_refused_or_what_it_says() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for target in targets() {
        let mut counts = Counts::default();
        for _ in 0..N_RANDOM {
            let n_bytes = rng.random_range(0..200);
            counts.check(&target, &(0..n_bytes).map(|_| rng.random()).collect::<Vec<u8>>());
        }
        assert!(counts.refused > 0, "{}", target.name);
    }
}

/// A position in bytes that are not empty.
fn at(bytes: &[u8], rng: &mut ChaCha8Rng) -> usize {
    rng.random_range(0..bytes.len())
}

fn flip(mut bytes: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    for _ in 0..rng.random_range(1..4) {
        let at = at(&bytes, rng);
        bytes[at] ^= 1 << rng.random_range(0..8);
    }
    bytes
}

fn insert(mut bytes: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let (at, n_more) = (at(&bytes, rng), rng.random_range(1..9));
    let more: Vec<u8> = (0..n_more).map(|_| rng.random()).collect();
    bytes.splice(at..at, more);
    bytes
}

fn remove(mut bytes: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let start = at(&bytes, rng);
    let end = bytes.len().min(start + rng.random_range(1..40));
    bytes.drain(start..end);
    bytes
}

fn repeat(mut bytes: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let start = at(&bytes, rng);
    let end = bytes.len().min(start + rng.random_range(1..40));
    let part = bytes[start..end].to_vec();
    bytes.splice(start..start, part);
    bytes
}

/// An extreme in the place of as many bytes.
fn overwrite(mut bytes: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let (extreme, at) = (EXTREMES[rng.random_range(0..EXTREMES.len())], at(&bytes, rng));
    let n = extreme.len().min(bytes.len() - at);
    bytes[at..at + n].copy_from_slice(&extreme[..n]);
    bytes
}

/// An extreme in the place of a number in decimal; in the place of one byte when there is none.
fn number(mut bytes: Vec<u8>, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let from = at(&bytes, rng);
    let start = (from..bytes.len()).find(|&i| bytes[i].is_ascii_digit()).unwrap_or(from);
    let n = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count().max(1);
    bytes.splice(start..start + n, EXTREMES[rng.random_range(0..EXTREMES.len())].iter().copied());
    bytes
}
