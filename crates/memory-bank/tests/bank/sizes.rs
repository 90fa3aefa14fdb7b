use cluster_tree::ClusterId;
use memory_bank::{BlockSpec, init_block};

use crate::support::{id, spec};

fn paper_spec(n_layers: usize, d_model: usize, width: [usize; 4]) -> BlockSpec {
    let (width, branching) = (width.to_vec(), vec![16; 4]);
    let spec = BlockSpec::ffn(n_layers, d_model, width, branching);
    spec.validate().unwrap();
    spec
}

/// The sizes that the paper prints (section 3, appendix A.6 with its erratum corrected): layers, d,
/// widths, c0, fetch, bank.
const PAPER: [(usize, usize, [usize; 4], u64, u64, u64); 7] = [
    (35, 512, [256, 64, 16, 0], 53_760, 18_063_360, 4_624_220_160),
    (35, 512, [256, 64, 16, 4], 53_760, 18_278_400, 18_717_081_600),
    (24, 1024, [512, 128, 32, 0], 73_728, 49_545_216, 12_683_575_296),
    (24, 2048, [768, 256, 16, 0], 147_456, 153_354_240, 21_139_292_160),
    (18, 640, [512, 128, 32, 0], 34_560, 23_224_320, 5_945_425_920),
    (24, 896, [512, 128, 32, 0], 64_512, 43_352_064, 11_098_128_384),
    (16, 2048, [768, 256, 16, 0], 98_304, 102_236_160, 14_092_861_440),
];

#[test]
fn the_sizes_are_those_of_the_paper() {
    for (n_layers, d_model, width, unit, fetch, bank) in PAPER {
        let spec = paper_spec(n_layers, d_model, width);
        assert_eq!((spec.unit(), spec.fetch_len(), spec.bank_len()), (unit, fetch, bank), "{spec:?}");
    }
}

#[test]
fn the_bank_rounds_to_the_printed_digits() {
    let printed = ["4.624", "18.717", "12.684", "21.139", "5.945", "11.098", "14.093"];
    let bf16_gigabytes = ["9.25", "37.4", "25.4", "42.3"];
    let billions = PAPER.map(|row| paper_spec(row.0, row.1, row.2).bank_len() as f64 / 1e9);
    for (bank, printed) in billions.iter().zip(printed) {
        assert_eq!(format!("{bank:.3}"), printed);
    }
    for (bank, printed) in billions.iter().zip(bf16_gigabytes) {
        let decimals = printed.split('.').nth(1).unwrap().len();
        assert_eq!(format!("{:.decimals$}", 2.0 * bank), printed);
    }
}

#[test]
fn two_levels_of_256_are_a_config_away() {
    let spec = BlockSpec::ffn(35, 512, vec![256, 4], vec![256, 256]);
    assert_eq!((spec.n_blocks(0), spec.n_blocks(1)), (256, 65_536));
    assert_eq!(spec.bank_len(), 53_760 * (256 * 256 + 65_536 * 4));
}

#[test]
fn rows_follow_the_index_and_the_generic_block_is_last() {
    let spec = spec();
    assert_eq!(spec.levels().collect::<Vec<_>>(), [0, 2]);
    assert_eq!((spec.block_len(0), spec.block_len(2), spec.fetch_len()), (90, 60, 150));
    assert_eq!(spec.row(id(2, 11)).unwrap(), 11);
    assert_eq!(spec.row(id(2, ClusterId::GENERIC)).unwrap(), 12);
    let error = |level, index| spec.check(id(level, index)).unwrap_err().to_string();
    assert_eq!(error(2, 12), "no block level2/12: level 2 has 12 blocks");
    assert_eq!(error(1, 0), "no block level1/0: level 1 has 0 blocks");
    assert_eq!(error(1, ClusterId::GENERIC), "no block level1/generic: level 1 has 0 blocks");
    assert_eq!(error(3, 0), "no block level3/0: level 3 has 0 blocks");
}

#[test]
fn a_spec_that_makes_no_bank_is_refused() {
    let error = |change: &dyn Fn(&mut BlockSpec)| {
        let mut spec = spec();
        change(&mut spec);
        spec.validate().unwrap_err().to_string()
    };
    assert_eq!(error(&|spec| spec.n_layers = 0), "n_layers is 0, expected at least 1");
    assert_eq!(error(&|spec| spec.d_model = 0), "d_model is 0, expected at least 1");
    assert_eq!(error(&|spec| spec.width.clear()), "width is 0 levels, expected 1 to 255 levels");
    assert_eq!(error(&|spec| spec.width.fill(0)), "width is [0, 0, 0], expected a level wider than 0");
    let text = "branching is 4 levels, expected 3 levels, as in width";
    assert_eq!(error(&|spec| spec.branching.push(2)), text);
    let text = "branching is [2, 0, 2], expected at least 1 at every level";
    assert_eq!(error(&|spec| spec.branching[1] = 0), text);
    assert!(error(&|spec| spec.branching = vec![1 << 11; 3]).contains("expected less than 2^32 blocks"));
    assert!(error(&|spec| spec.d_model = usize::MAX).contains("2^60 parameters"));
}

#[test]
fn the_hash_of_a_spec_covers_every_size() {
    let hash = |change: &dyn Fn(&mut BlockSpec)| {
        let mut spec = spec();
        change(&mut spec);
        spec.hash()
    };
    let plain = hash(&|_| ());
    assert_eq!(plain, hash(&|_| ()));
    assert_ne!(plain, hash(&|spec| spec.n_layers = 3));
    assert_ne!(plain, hash(&|spec| spec.d_model = 6));
    assert_ne!(plain, hash(&|spec| spec.width[2] = 3));
    assert_ne!(plain, hash(&|spec| spec.branching[2] = 3));
}

#[test]
fn initial_weights_are_a_pure_function_of_seed_and_id() {
    let spec = spec();
    let block = init_block(&spec, 7, id(2, 4));
    assert_eq!(block, init_block(&spec, 7, id(2, 4)));
    let others = [(8, id(2, 4)), (7, id(2, 5)), (7, id(2, ClusterId::GENERIC))];
    for (seed, other) in others {
        assert_ne!(block, init_block(&spec, seed, other));
    }
    let mut same_sizes = spec.clone();
    same_sizes.width[0] = 2;
    assert_ne!(init_block(&same_sizes, 7, id(0, 4)), block, "levels differ");
    // Another tree around the same block changes nothing.
    same_sizes.branching = vec![16; 3];
    assert_eq!(init_block(&same_sizes, 7, id(2, 4)), block);
    assert!(init_block(&spec, 7, id(1, 0)).is_empty());
}

#[test]
fn initial_weights_are_truncated_normal_and_m3_is_zero() {
    let (n_layers, d_model, r) = (4, 64, 128);
    let spec = BlockSpec::ffn(n_layers, d_model, vec![r], vec![2]);
    let block = init_block(&spec, 1, id(0, 1));
    let matrix_len = r * d_model;
    let mut weights = Vec::new();
    for layer in block.chunks_exact(3 * matrix_len) {
        weights
            .extend(layer[..2 * matrix_len].iter().map(|&value| f64::from(value) * (d_model as f64).sqrt()));
        assert!(layer[2 * matrix_len..].iter().all(|value| value.to_bits() == 0));
    }
    let n = weights.len() as f64; // 65,536 standard normals cut at 3
    let mean = weights.iter().sum::<f64>() / n;
    let variance = weights.iter().map(|weight| weight * weight).sum::<f64>() / n;
    let share = |limit: f64| weights.iter().filter(|weight| weight.abs() <= limit).count() as f64 / n;
    assert!(mean.abs() < 0.015, "{mean}");
    // The variance of a standard normal cut at 3 is 1 − 6φ(3)/(2Φ(3) − 1) = 0.9733.
    assert!((variance - 0.9733).abs() < 0.02, "{variance}");
    assert!((share(1.0) - 0.6827 / 0.9973).abs() < 0.007, "{}", share(1.0));
    assert!((share(2.0) - 0.9545 / 0.9973).abs() < 0.004, "{}", share(2.0));
    assert!(share(3.0001) == 1.0 && share(2.5) < 1.0);
    let repeats = weights.windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert!(repeats < 3, "{repeats}");
}
