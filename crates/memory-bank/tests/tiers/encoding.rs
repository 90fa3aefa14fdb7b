//! Encodings against plain references in double precision.

use half::bf16;
use memory_bank::{Block, BlockDtype, BlockStore, Encoded, Error, TierOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{Bank, STEP, id, some_ids};

const D_MODEL: usize = 37;

/// Rows of very different sizes, one of zeros and one of subnormal numbers among them.
fn block() -> Block {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut values = Vec::new();
    for row in 0..40 {
        let size = match row {
            4 => 0.0,
            5 => 1e-42,
            _ => 10f32.powi(row - 20),
        };
        values.extend((0..D_MODEL).map(|_| rng.random_range(-1.0f32..1.0) * size));
    }
    // Ties: halves of the scale 2 and of a bf16's last bit.
    values[..6].copy_from_slice(&[254.0, 3.0, -5.0, 1.0, -0.0, 1.0 + 1.0 / 256.0]);
    values[6..D_MODEL].iter_mut().for_each(|value| *value *= 1e20);
    Block { id: id(2, 0), values }
}

fn encode(dtype: BlockDtype, block: &Block) -> Encoded {
    Encoded::encode(dtype, D_MODEL, block).unwrap()
}

#[test]
fn int8_is_the_nearest_multiple_of_the_scale() {
    let block = block();
    let encoded = encode(BlockDtype::Int8, &block);
    let decoded = encoded.decode();
    let Encoded::Int8 { scales, values } = &encoded else { panic!("{encoded:?}") };
    assert_eq!((scales.len(), values.len()), (40, block.values.len()));
    let rows = block.values.chunks(D_MODEL).zip(values.chunks(D_MODEL)).zip(decoded.chunks(D_MODEL));
    for (((exact, integers), decoded), &scale) in rows.zip(scales) {
        let largest = exact.iter().map(|x| x.abs()).fold(0.0, f32::max);
        match largest {
            0.0 => assert_eq!(scale, 0.0),
            _ => assert_eq!(scale, (largest / 127.0).max(f32::MIN_POSITIVE)),
        }
        for ((&exact, &integer), &decoded) in exact.iter().zip(integers).zip(decoded) {
            let (exact, scale) = (f64::from(exact), f64::from(scale));
            assert_eq!(f64::from(decoded), f64::from((f64::from(integer) * scale) as f32));
            // An f32 has 24 bits of the quotient, so that much may be missing of the nearest.
            let error = (exact - f64::from(decoded)).abs();
            assert!(error <= scale * (0.5 + 127.0 / f64::from(1 << 23)), "{exact} as {decoded} of {scale}");
            let quotient = if scale > 0.0 { exact / scale } else { 0.0 };
            let is_tie = (quotient.fract().abs() - 0.5).abs() < 1e-4;
            assert!(is_tie || f64::from(integer) == quotient.round_ties_even(), "{quotient} as {integer}");
        }
    }
}

#[test]
fn int8_rounds_ties_to_even() {
    let values = [254.0, 3.0, -5.0, 1.0, -1.0, 7.0, -254.0].repeat(D_MODEL);
    let block = Block { id: id(2, 0), values };
    let Encoded::Int8 { values, .. } = encode(BlockDtype::Int8, &block) else { panic!() };
    assert_eq!(values[..7], [127, 2, -2, 0, 0, 4, -127]);
}

#[test]
fn bf16_is_what_the_half_crate_rounds_to() {
    let block = block();
    let encoded = encode(BlockDtype::Bf16, &block);
    let Encoded::Bf16(values) = &encoded else { panic!("{encoded:?}") };
    for ((&exact, &value), decoded) in block.values.iter().zip(values).zip(encoded.decode()) {
        assert_eq!(value.to_bits(), bf16::from_f32(exact).to_bits());
        assert_eq!(decoded.to_bits(), value.to_f32().to_bits());
        let error = (f64::from(exact) - f64::from(decoded)).abs();
        // Half of the last of 8 bits; of a subnormal number, half of the smallest one.
        assert!(error <= (f64::from(exact.abs()) / 256.0).max(2f64.powi(-134)), "{exact} as {decoded}");
    }
}

#[test]
fn f32_is_as_it_came() {
    let mut block = block();
    block.values[3] = f32::NAN;
    let decoded = encode(BlockDtype::F32, &block).decode();
    assert!(decoded.iter().zip(&block.values).all(|(a, b)| a.to_bits() == b.to_bits()));
}

#[test]
fn encoding_again_changes_nothing() {
    let block = block();
    let decoded = Block { id: block.id, values: encode(BlockDtype::Bf16, &block).decode() };
    assert_eq!(encode(BlockDtype::Bf16, &decoded), encode(BlockDtype::Bf16, &block));
}

#[test]
fn numbers_that_do_not_fit_are_named() {
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        let mut block = block();
        block.values[41] = wrong;
        for dtype in [BlockDtype::Bf16, BlockDtype::Int8] {
            let error = Encoded::encode(dtype, D_MODEL, &block).unwrap_err();
            let Error::Encode { position: 41, value, .. } = error else { panic!("{error}") };
            assert_eq!(value.to_bits(), wrong.to_bits());
            let text = format!(
                "block level2/0 has {wrong} at position 41, expected a magnitude of at most {} for {dtype}",
                f32::from_bits(0x7f7f_7fff)
            );
            assert_eq!(error.to_string(), text);
        }
    }
    let mut block = block();
    block.values[41] = f32::from_bits(0x7f7f_7fff);
    for dtype in [BlockDtype::Bf16, BlockDtype::Int8] {
        assert!(encode(dtype, &block).decode().iter().all(|value| value.is_finite()));
    }
}

#[tokio::test(start_paused = true)]
async fn what_encoding_loses_is_reported() {
    let bank = Bank::new().await;
    let exact = bank.local().fetch(STEP, &some_ids()).await.unwrap();
    for (dtype, expected) in [(BlockDtype::F32, 0.0), (BlockDtype::Bf16, 2e-3), (BlockDtype::Int8, 8e-3)] {
        let options = TierOptions { ram_mib: 1, dtype, ..TierOptions::default() };
        let tiered = bank.over(&options, &bank.remote());
        let found = tiered.fetch(STEP, &some_ids()).await.unwrap();
        tiered.fetch(STEP, &some_ids()).await.unwrap();
        for level in tiered.stats().levels {
            let of_level = |block: &&Block| usize::from(block.id.level) == level.level;
            let numbers = |blocks: &[Block]| -> Vec<f64> {
                blocks
                    .iter()
                    .filter(of_level)
                    .flat_map(|block| &block.values)
                    .map(|&x| f64::from(x))
                    .collect()
            };
            let (exact, found) = (numbers(&exact), numbers(&found));
            let errors: Vec<f64> = exact.iter().zip(&found).map(|(a, b)| (a - b).abs()).collect();
            let norm = |numbers: &[f64]| numbers.iter().map(|x| x * x).sum::<f64>().sqrt();
            let rms = norm(&errors) / norm(&exact);
            assert_eq!(level.max_abs_error, errors.iter().copied().fold(0.0, f64::max));
            assert!((level.relative_rms_error - rms).abs() <= 1e-12 * rms);
            assert!(rms >= expected / 4.0 && rms <= expected, "{dtype}: {rms}");
            // Once each, although they were asked for twice.
            assert_eq!(
                level.n_encoded,
                some_ids().iter().filter(|id| usize::from(id.level) == level.level).count() as u64
            );
        }
    }
}
