//! Rows on disk: the numbers of a bank in memory, within the memory that they may take.

use std::collections::BTreeMap;
use std::path::Path;

use cluster_tree::ClusterId;
use memory_bank::{
    BankOptions, BankStore, Block, BlockSpec, BlockStore, Checkpoint, Error, Gradients, Identity, Live,
    LocalBank, Offload, OffloadOptions, Placement, Row, Shard, ShardOptions, ShardRecord, Snapshot, Step,
};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::shards::{in_memory, open, small_parts};
use crate::support::{adamw, id, options, run};

/// What rows may take. All of them take 3 MB.
const HOST_BYTES: u64 = 1 << 20;

/// Blocks of 123 and 49 KB, without their moments.
fn spec() -> BlockSpec {
    BlockSpec::ffn(2, 128, vec![40, 0, 16], vec![2, 3, 2])
}

fn identity() -> Identity {
    Identity { spec: spec(), seed: 7, hashes: BTreeMap::new() }
}

fn shard_options() -> ShardOptions {
    ShardOptions { seed: 7, adamw: adamw(), world_size: 2, staleness: 1, placement: Placement::WHOLE }
}

fn in_folder(folder: &Path) -> OffloadOptions {
    OffloadOptions { dir: folder.join("rows"), host_mib: HOST_BYTES >> 20 }
}

fn gradient(id: ClusterId, dice: &mut ChaCha8Rng) -> Block {
    let len = spec().block_len(usize::from(id.level));
    Block { id, values: (0..len).map(|_| dice.random_range(-1.0f32..1.0)).collect() }
}

/// What two ranks push in a step: of one block of the first level and up to four of the last. That is
/// nearly as much as memory holds.
fn gradients(dice: &mut ChaCha8Rng) -> [Vec<Block>; 2] {
    let coarse = [id(0, 0), id(0, 1), id(0, ClusterId::GENERIC)];
    let fine: Vec<ClusterId> = (0..12).map(|index| id(2, index)).collect();
    let n_fine = dice.random_range(0..=4);
    let chosen: Vec<ClusterId> = coarse.sample(dice, 1).chain(fine.sample(dice, n_fine)).copied().collect();
    [(), ()].map(|()| {
        let own: Vec<ClusterId> = chosen.iter().copied().filter(|_| dice.random_bool(0.8)).collect();
        own.into_iter().map(|id| gradient(id, dice)).collect()
    })
}

/// Of a row, its updates and its numbers in bits.
type State = BTreeMap<ClusterId, (u64, [Vec<u32>; 3])>;

fn state(rows: &[(ClusterId, Row)]) -> State {
    let of_row = |(id, row): &(ClusterId, Row)| {
        let bits = [&row.values, &row.m, &row.v]
            .map(|array| array.read().unwrap().iter().map(|value| value.to_bits()).collect());
        (*id, (row.steps, bits))
    };
    rows.iter().map(of_row).collect()
}

fn state_of(live: &Live) -> State {
    state(&live.snapshot(live.applied(), Step(0)).unwrap().rows)
}

/// The same bank twice, in memory and offloaded.
struct Twins {
    live: [Live; 2],
    records: [Option<ShardRecord>; 2],
    stores: [BankStore; 2],
    /// The next step of each rank.
    next: [u64; 2],
}

impl Twins {
    async fn new(folder: &Path) -> Self {
        let offload = Offload::open(&in_folder(folder)).unwrap();
        let shard = || Shard::new(spec(), shard_options()).unwrap();
        let live = [Live::new(shard()), Live::offloaded(shard(), Some(offload))];
        let stores = [open(&in_memory(), small_parts()).await, open(&in_memory(), small_parts()).await];
        Self { live, records: [None, None], stores, next: [1, 1] }
    }

    /// Two pushes of each rank, in an order of its own.
    fn train(&mut self, dice: &mut ChaCha8Rng) {
        let steps: Vec<[Vec<Block>; 2]> = (0..2).map(|_| gradients(dice)).collect();
        let orders = [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]];
        let mut sent = [0, 0];
        for &rank in orders.choose(dice).unwrap() {
            let (step, blocks) = (Step(self.next[rank]), &steps[sent[rank]][rank]);
            for live in &self.live {
                live.push(step, rank, Gradients::new(&spec(), blocks.clone()).unwrap()).unwrap();
                assert!(live.offload().is_none() || live.with(Shard::host_bytes).unwrap() <= HOST_BYTES);
            }
            (sent[rank], self.next[rank]) = (sent[rank] + 1, self.next[rank] + 1);
        }
    }

    async fn save(&mut self) -> [Checkpoint; 2] {
        let mut saved = vec![];
        for ((live, record), store) in self.live.iter().zip(&mut self.records).zip(&self.stores) {
            let snapshot = live.snapshot(live.applied(), Step(0)).unwrap();
            let written = store.write(&identity(), snapshot, record.as_ref()).await.unwrap();
            saved.push(store.commit(live.applied(), std::slice::from_ref(&written)).await.unwrap());
            *record = Some(written);
        }
        saved.try_into().unwrap()
    }

    /// Goes back, with the rows that were not updated since or without.
    async fn restore(&mut self, saved: &[Checkpoint; 2], keeps: bool) {
        let step = saved[0].step();
        for ((live, saved), store) in self.live.iter().zip(saved).zip(&self.stores) {
            let held = if keeps { live.with(|shard| shard.unchanged_since(step)).unwrap() } else { vec![] };
            let identity = identity();
            let loading = saved.load_onto(&identity, shard_options(), held, live.offload());
            let shard = loading.await.unwrap();
            assert!(live.offload().is_none() || shard.host_bytes() <= HOST_BYTES);
            store.discard_after(step).await.unwrap();
            live.replace(shard).unwrap();
        }
        self.records = [0, 1].map(|i: usize| saved[i].record(Placement::WHOLE));
        self.next = [step.0 + 1; 2];
    }
}

#[test]
fn rows_on_disk_have_the_bits_of_rows_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    for seed in 0..4 {
        let mut dice = ChaCha8Rng::seed_from_u64(seed);
        run(async {
            let mut twins = Twins::new(folder.path()).await;
            let offload = twins.live[1].offload().unwrap().clone();
            let mut saved = twins.save().await;
            let mut held: Vec<(Snapshot, State)> = vec![];
            let mut most_on_disk = 0;
            for _ in 0..40 {
                twins.train(&mut dice);
                let [plain, offloaded] = &twins.live;
                let expected = state_of(plain);
                assert!(state_of(offloaded) == expected, "seed {seed}, step {}", plain.applied());
                let ids = [id(2, 3), id(0, 0), id(2, 11), id(2, ClusterId::GENERIC)];
                assert_eq!(offloaded.fetch(&ids).unwrap(), plain.fetch(&ids).unwrap());
                most_on_disk = most_on_disk.max(offload.disk_bytes());
                if dice.random_bool(0.3) {
                    held.push((offloaded.snapshot(offloaded.applied(), Step(0)).unwrap(), expected));
                }
                if dice.random_bool(0.3) {
                    saved = twins.save().await;
                }
                if dice.random_bool(0.15) {
                    twins.restore(&saved, dice.random_bool(0.5)).await;
                    assert!(state_of(&twins.live[1]) == state_of(&twins.live[0]), "seed {seed}, restored");
                }
                // What a save holds stays as it was, whatever has been updated and moved since.
                if held.len() == 3 {
                    for (snapshot, expected) in held.drain(..) {
                        assert!(state(&snapshot.rows) == expected, "seed {seed}, held of {}", snapshot.step);
                    }
                }
            }
            assert!(most_on_disk > HOST_BYTES, "{most_on_disk} bytes were on disk");
            drop((twins, held));
            assert_eq!(offload.disk_bytes(), 0, "slots that nobody holds");
        });
    }
    // Nothing has a name, so nothing is left behind.
    assert_eq!(std::fs::read_dir(folder.path().join("rows")).unwrap().count(), 0);
}

/// A bank in one process saves the same files, and goes on from them.
#[test]
fn a_local_bank_offloads_too() {
    let folder = tempfile::tempdir().unwrap();
    let files = run(async {
        let mut files = vec![];
        for offload in [None, Some(in_folder(folder.path()))] {
            let root = folder.path().join(format!("offload-{}", offload.is_some()));
            let options = || BankOptions { offload: offload.clone(), ..options(1, &root) };
            let mut dice = ChaCha8Rng::seed_from_u64(1);
            let bank = LocalBank::create(spec(), options()).unwrap();
            for step in 1..=10 {
                let [blocks, _] = gradients(&mut dice);
                bank.push(Step(step), 0, blocks).await.unwrap();
            }
            bank.save(Step(10)).await.unwrap();
            let memory = root.join("00000010/memory");
            let resumed = LocalBank::resume(&memory, spec(), options()).unwrap();
            let [blocks, _] = gradients(&mut dice);
            resumed.push(Step(11), 0, blocks).await.unwrap();
            resumed.save(Step(11)).await.unwrap();
            let read = |name: &str| std::fs::read(root.join("00000011/memory").join(name)).unwrap();
            files.push(["values.safetensors", "optimizer.safetensors", "manifest.json"].map(read));
        }
        files
    });
    assert!(files[0] == files[1]);
}

#[test]
fn a_step_larger_than_the_memory_of_rows_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let live = Live::offloaded(
        Shard::new(spec(), ShardOptions { world_size: 1, ..shard_options() }).unwrap(),
        Some(Offload::open(&in_folder(folder.path())).unwrap()),
    );
    let mut dice = ChaCha8Rng::seed_from_u64(2);
    let mut push = |step, ids: &[ClusterId]| {
        let blocks = ids.iter().map(|&id| gradient(id, &mut dice)).collect();
        live.push(Step(step), 0, Gradients::new(&spec(), blocks).unwrap())
    };
    push(1, &[id(0, 0), id(2, 0)]).unwrap();
    let before = state_of(&live);
    let text = push(2, &[id(0, 0), id(0, 1), id(0, ClusterId::GENERIC)]).unwrap_err().to_string();
    assert_eq!(text, "offload.host_mib is 1, expected at least 2, for the 3 blocks of step 2");
    assert_eq!(live.applied(), Step(1));
    assert!(state_of(&live) == before);
    // A save of what there is needs no room.
    assert_eq!(live.snapshot(Step(1), Step(0)).unwrap().rows.len(), 2);
}

#[test]
fn a_folder_that_cannot_be_written_to_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("file/rows");
    std::fs::write(folder.path().join("file"), "").unwrap();
    let error = Offload::open(&OffloadOptions { dir: dir.clone(), host_mib: 1 }).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == dir), "{error}");
    let options = BankOptions {
        offload: Some(OffloadOptions { dir: dir.clone(), host_mib: 1 }),
        ..options(1, folder.path())
    };
    let text = LocalBank::create(spec(), options).err().unwrap().to_string();
    assert_eq!(text, format!("{}: Not a directory (os error 20)", dir.display()));
}
