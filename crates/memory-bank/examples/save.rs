//! How long it takes to save a bank of so many MiB of weights and moments into a folder, to restore it,
//! and to open it mapped: `cargo run --release -p memory-bank --example save -- FOLDER [MIB] [RUNS]`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use cluster_tree::ClusterId;
use memory_bank::{
    AdamW, BankStore, BlockSpec, Identity, MappedBank, Placement, Row, Schedule, Shard, ShardOptions, Step,
    StoreOptions, init_block,
};

fn spec(mib: usize) -> BlockSpec {
    // Blocks of 3 MiB of weights, and 6 MiB of moments.
    let (width, branching) = (vec![32], vec![mib.div_ceil(9)]);
    BlockSpec::ffn(16, 512, width, branching)
}

fn shard(spec: &BlockSpec, options: ShardOptions) -> Shard {
    let row = |index| {
        let id = ClusterId { level: 0, index };
        let values = init_block(spec, 1, id);
        let moments = |scale: f32| values.iter().map(|value| value * scale).collect::<Vec<f32>>();
        let (m, v) = (moments(0.1), moments(0.01));
        (id, Row { m: m.into(), v: v.into(), values: values.into(), steps: 1, last: Step(1) })
    };
    let rows = (0..spec.n_blocks(0) as u32).map(row);
    Shard::with_rows(spec.clone(), options, Step(1), rows).expect("a shard")
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let folder = args.first().expect("a folder");
    let number =
        |place: usize, default| args.get(place).map_or(default, |text| text.parse().expect("a number"));
    let (mib, runs) = (number(1, 1024), number(2, 3));
    let spec = spec(mib);
    let schedule = Schedule { peak: 0.1, floor: 0.1, warmup_steps: 0, total_steps: 1 };
    let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None };
    let options = ShardOptions { seed: 1, adamw, world_size: 1, staleness: 0, placement: Placement::WHOLE };
    let shard = shard(&spec, options);
    let identity = Identity { spec, seed: 1, hashes: BTreeMap::new() };
    for run in 0..runs {
        let bank = format!("save-{run}");
        let store = BankStore::open_url(folder, &[], &bank, StoreOptions::default()).await.expect("a store");
        let start = Instant::now();
        let record = store.write(&identity, shard.snapshot(Step(0)), None).await.expect("a write");
        let written = start.elapsed().as_secs_f64();
        let checkpoint = store.commit(Step(1), &[record]).await.expect("a commit");
        let saved = start.elapsed().as_secs_f64();
        let files = checkpoint.manifest().segments.iter().flat_map(|s| [&s.values, &s.optimizer]);
        let bytes: u64 = files.map(|file| file.bytes).sum();
        let start = Instant::now();
        MappedBank::open_step(&Path::new(folder).join(&bank), Step(1)).expect("a bank");
        let opened = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let restored = checkpoint.load(&identity, options).await.expect("a shard");
        let loaded = start.elapsed().as_secs_f64();
        assert_eq!(restored, shard);
        println!(
            "{bytes} bytes: written {written:.3} s, saved {saved:.3} s ({:.2} GB/s), mapped {:.2} ms, restored {loaded:.3} s",
            bytes as f64 / saved / 1e9,
            opened * 1e3
        );
        std::fs::remove_dir_all(Path::new(folder).join(&bank)).expect("to remove it");
    }
}
