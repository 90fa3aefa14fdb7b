//! The cache on disk: restarts, damage, other banks, and disks that fail.

use std::fs;
use std::path::Path;

use cluster_tree::ClusterId;
use memory_bank::{
    BankVersion, BlockDtype, BlockStore, DiskOptions, Step, TierOptions, TierSource, TierState, Tiered,
};

use crate::support::{Bank, DTYPES, STEP, disk, fetch, id, n_hits, some_ids, spec, tier, version};

/// Bytes of a block of level 2 in f32, and of an entry of an index.
const BLOCK: usize = 1152;
const ENTRY: usize = 12;

fn level2(indices: impl Iterator<Item = u32>) -> Vec<ClusterId> {
    indices.map(|index| id(2, index)).collect()
}

#[tokio::test(start_paused = true)]
async fn blocks_outlive_the_process() {
    let (bank, ids) = (Bank::new().await, some_ids());
    for dtype in DTYPES {
        let (dir, remote) = (tempfile::tempdir().unwrap(), bank.remote());
        let first = fetch(&bank.over(&disk(dir.path(), dtype), &remote), &ids).await;
        assert_eq!(remote.requests().len(), 1);
        for _ in 0..2 {
            let tiered = bank.over(&disk(dir.path(), dtype), &remote);
            assert_eq!(fetch(&tiered, &ids).await, first);
            assert!(tier(&tiered, "disk").held_bytes > 0);
        }
        assert!(remote.requests().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn the_disk_holds_no_more_than_its_limit_and_what_was_used_last() {
    let bank = Bank::new().await;
    let (dir, remote) = (tempfile::tempdir().unwrap(), bank.remote());
    let tiered = bank.over(&disk(dir.path(), BlockDtype::F32), &remote);
    // Level 0 has all of its 5 slots; this many are left for level 2.
    let n_slots = ((1 << 20) - 5 * (2 * BLOCK + ENTRY)) / (BLOCK + ENTRY);
    let n = n_slots as u32;
    for start in (0..1024).step_by(128) {
        tiered.fetch(STEP, &level2(start..start + 128)).await.unwrap();
        // Used again, so it stays.
        tiered.fetch(STEP, &[id(2, 0)]).await.unwrap();
    }
    tiered.fetch(STEP, &[id(0, 0)]).await.unwrap();
    let stats = tier(&tiered, "disk");
    assert_eq!(stats.levels[1].n_evictions, u64::from(1024 - n));
    assert_eq!(stats.held_bytes as usize, (n_slots + 2) * BLOCK);
    let bytes = |name: &str| fs::metadata(dir.path().join(name)).unwrap().len();
    let files = ["level0.blocks", "level0.index", "level2.blocks", "level2.index"];
    assert!(files.into_iter().map(bytes).sum::<u64>() <= 1 << 20);
    remote.requests();
    tiered.fetch(STEP, &level2(900..1024)).await.unwrap();
    tiered.fetch(STEP, &[id(2, 0), id(0, 0)]).await.unwrap();
    assert!(remote.requests().is_empty());
    // With fewer slots than before, blocks beyond them are gone, and the others are right.
    drop(tiered);
    let smaller = TierOptions { dtype: BlockDtype::F32, ..disk(dir.path(), BlockDtype::F32) };
    let mut wide = smaller.clone();
    wide.disk = Some(DiskOptions { dir: dir.path().to_owned(), mib: 9 });
    for options in [wide, smaller] {
        let tiered = bank.over(&options, &remote);
        let all = level2(0..1024);
        assert_eq!(fetch(&tiered, &all).await, fetch(&*bank.local(), &all).await);
        assert!(n_hits(&tiered, "disk") >= u64::from(n), "{}", n_hits(&tiered, "disk"));
    }
    assert!(files.into_iter().map(bytes).sum::<u64>() <= 1 << 20);
}

/// Changes one file of a cache that holds some blocks of level 2, and returns the blocks found to be
/// damaged, and those found missing, when they are read again.
async fn damage(bank: &Bank, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> (u64, u64) {
    let (dir, remote, ids) = (tempfile::tempdir().unwrap(), bank.remote(), level2(10..14));
    let expected = fetch(&bank.over(&disk(dir.path(), BlockDtype::F32), &remote), &ids).await;
    let path = dir.path().join(name);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    remote.requests();
    let tiered = bank.over(&disk(dir.path(), BlockDtype::F32), &remote);
    assert_eq!(fetch(&tiered, &ids).await, expected, "{name}");
    assert_eq!(remote.requests().concat().len() as u64, 4 - n_hits(&tiered, "disk"));
    let level = tier(&tiered, "disk").levels[1];
    // All of them are right again, now and after one more restart.
    assert_eq!(fetch(&tiered, &ids).await, expected);
    drop(tiered);
    let tiered = bank.over(&disk(dir.path(), BlockDtype::F32), &remote);
    assert_eq!(fetch(&tiered, &ids).await, expected);
    assert!(remote.requests().is_empty());
    assert_eq!(tier(&tiered, "disk").levels[1].n_damaged, 0);
    (level.n_damaged, level.n_misses)
}

#[tokio::test(start_paused = true)]
async fn damaged_blocks_are_seen_and_read_again() {
    let bank = Bank::new().await;
    assert_eq!(damage(&bank, "level2.blocks", |_| {}).await, (0, 0));
    assert_eq!(damage(&bank, "level2.blocks", |bytes| bytes[BLOCK + 5] ^= 1).await, (1, 1));
    // Half of a slot was written.
    let torn = |bytes: &mut Vec<u8>| bytes[BLOCK / 2..BLOCK].fill(0);
    assert_eq!(damage(&bank, "level2.blocks", torn).await, (1, 1));
    // The file ends in the middle of the third slot.
    assert_eq!(damage(&bank, "level2.blocks", |bytes| bytes.truncate(5 * BLOCK / 2)).await, (2, 2));
    assert_eq!(damage(&bank, "level2.blocks", Vec::clear).await, (4, 4));
    // An entry that is not whole is a free slot.
    assert_eq!(damage(&bank, "level2.index", |bytes| bytes[ENTRY] ^= 4).await, (0, 1));
    assert_eq!(damage(&bank, "level2.index", |bytes| bytes.truncate(ENTRY + 7)).await, (0, 3));
    // One block in two slots: the first is read.
    let twice = |bytes: &mut Vec<u8>| bytes.copy_within(..ENTRY, ENTRY);
    assert_eq!(damage(&bank, "level2.index", twice).await.1, 1);
    // Two slots changed places.
    let swapped = |bytes: &mut Vec<u8>| bytes[..2 * ENTRY].rotate_left(ENTRY);
    assert_eq!(damage(&bank, "level2.index", swapped).await, (2, 2));
}

fn open_error(bank: &Bank, dir: &Path, version: BankVersion) -> String {
    let sources = vec![TierSource::new("local", bank.local())];
    let error = Tiered::open(&disk(dir, BlockDtype::F32), version, sources).err().unwrap().to_string();
    error.strip_prefix(&format!("{}/", dir.display())).unwrap_or(&error).to_owned()
}

#[tokio::test(start_paused = true)]
async fn the_folder_of_another_bank_is_refused() {
    let (bank, dir) = (Bank::new().await, tempfile::tempdir().unwrap());
    let tiered = bank.over(&disk(dir.path(), BlockDtype::F32), &bank.remote());
    assert_eq!(
        open_error(&bank, dir.path(), version()),
        format!("{}: holder is another process, expected this process alone", dir.path().display())
    );
    let before = fetch(&tiered, &some_ids()).await;
    drop(tiered);
    let error = |version| open_error(&bank, dir.path(), version);
    assert_eq!(error(BankVersion { step: Step(1), ..version() }), "bank.json: step is 2, expected 1");
    assert_eq!(error(BankVersion { seed: 8, ..version() }), "bank.json: seed is 7, expected 8");
    let with = |key: &str, hash: &str| {
        let mut version = version();
        version.hashes.insert(key.to_owned(), hash.to_owned());
        version
    };
    assert_eq!(error(with("tree", "ff")), "bank.json: hash of tree is a1, expected ff");
    assert_eq!(error(with("anchor", "cc")), "bank.json: hash of anchor is missing, expected cc");
    assert_eq!(
        error(BankVersion { hashes: Default::default(), ..version() }),
        "bank.json: hash of tree is a1, expected missing"
    );

    let path = dir.path().join("bank.json");
    let (text, hash) = (fs::read_to_string(&path).unwrap(), spec().hash());
    fs::write(&path, text.replace(&hash, "00")).unwrap();
    assert_eq!(error(version()), format!("bank.json: spec is 00, expected {hash}"));
    fs::write(&path, text.replace("tier.v1", "tier.v0")).unwrap();
    assert_eq!(error(version()), "bank.json: format is anchorage.tier.v0, expected anchorage.tier.v1");
    fs::write(&path, "{").unwrap();
    assert!(error(version()).starts_with("bank.json: owner is corrupt: EOF"));

    // None of these touched what is there.
    fs::write(&path, text).unwrap();
    let remote = bank.remote();
    assert_eq!(fetch(&bank.over(&disk(dir.path(), BlockDtype::F32), &remote), &some_ids()).await, before);
    assert!(remote.requests().is_empty());
}

#[tokio::test(start_paused = true)]
async fn blocks_of_another_dtype_go() {
    let (bank, dir) = (Bank::new().await, tempfile::tempdir().unwrap());
    let remote = bank.remote();
    for dtype in DTYPES {
        let tiered = bank.over(&disk(dir.path(), dtype), &remote);
        tiered.fetch(STEP, &some_ids()).await.unwrap();
        assert_eq!(remote.requests().len(), 1);
        assert_eq!(n_hits(&tiered, "disk"), 0);
    }
}

#[tokio::test(start_paused = true)]
#[cfg(target_os = "linux")]
async fn a_full_disk_is_dropped_and_fetches_go_on() {
    let (bank, dir) = (Bank::new().await, tempfile::tempdir().unwrap());
    for full in ["level2.blocks", "level2.index"] {
        let dir = dir.path().join(full);
        fs::create_dir(&dir).unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.join(full)).unwrap();
        let remote = bank.remote();
        let tiered = bank.over(&disk(&dir, BlockDtype::F32), &remote);
        let mut states = tiered.states();
        states.mark_unchanged();
        for _ in 0..3 {
            assert_eq!(fetch(&tiered, &some_ids()).await, fetch(&*bank.local(), &some_ids()).await);
        }
        assert!(states.has_changed().unwrap());
        let reason =
            format!("{}: No space left on device (os error 28)", dir.join("level2.blocks").display());
        let dropped = TierState::Dropped { reason };
        assert_eq!(*states.borrow(), [dropped.clone(), TierState::Used]);
        assert_eq!(tier(&tiered, "disk").state, dropped);
        assert_eq!(tier(&tiered, "disk").n_requests, 1);
        assert_eq!(remote.requests().len(), 3);
    }
}

#[tokio::test(start_paused = true)]
#[cfg(target_os = "linux")]
async fn a_disk_that_cannot_be_read_is_dropped_and_fetches_go_on() {
    use std::os::fd::AsRawFd;

    let (bank, dir) = (Bank::new().await, tempfile::tempdir().unwrap());
    let (remote, options) = (bank.remote(), disk(dir.path(), BlockDtype::F32));
    drop(bank.over(&options, &remote).fetch(STEP, &some_ids()).await.unwrap());
    // A pipe opens as a file does, and cannot be read at an offset.
    let (pipe, _writer) = std::io::pipe().unwrap();
    let blocks = dir.path().join("level2.blocks");
    fs::remove_file(&blocks).unwrap();
    std::os::unix::fs::symlink(format!("/proc/self/fd/{}", pipe.as_raw_fd()), &blocks).unwrap();
    let tiered = bank.over(&options, &remote);
    for _ in 0..2 {
        assert_eq!(fetch(&tiered, &some_ids()).await, fetch(&*bank.local(), &some_ids()).await);
    }
    let stats = tier(&tiered, "disk");
    let reason = format!("{}: Illegal seek (os error 29)", blocks.display());
    assert_eq!((stats.n_failures, stats.last_error.as_ref()), (1, Some(&reason)));
    assert_eq!(stats.state, TierState::Dropped { reason });
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_cannot_be_opened_is_an_error() {
    let (bank, dir) = (Bank::new().await, tempfile::tempdir().unwrap());
    let file = dir.path().join("file");
    fs::write(&file, "where the folder should be").unwrap();
    let sources = vec![TierSource::new("local", bank.local())];
    let error = Tiered::open(&disk(&file, BlockDtype::F32), version(), sources).err().unwrap();
    assert!(error.to_string().starts_with(&format!("{}: ", file.display())), "{error}");
}
