//! What must hold of the parsers of a bank's files, whatever bytes they are given. For fuzzers and tests
//! alone: every function panics when something does not hold, and returns whether it takes the bytes.

use std::collections::BTreeMap;
use std::path::Path;

use crate::bank_store::of_records;
use crate::checkpoint::check_index;
use crate::manifest::sha256;
use crate::segment::{Layout, LevelIndex, Part, block_bytes};
use crate::{BlockSpec, Error, FileRecord, Identity, Manifest, Placement, Segment, ShardRecord, Step};

/// A parser, and bytes that it takes.
pub struct Target {
    /// The name of the fuzz target too.
    pub name: &'static str,
    /// The function of this module, or of one like it.
    pub check: fn(&[u8]) -> bool,
    /// Bytes that it takes, to begin with.
    pub seeds: Vec<Vec<u8>>,
}

const PLACE: &str = "bank/file";
const PARTS: [Part; 2] = [Part::Values, Part::Optimizer];
/// Longest message that an error may have, whatever is in a file.
const MAX_MESSAGE: usize = 16 << 10;

/// All of this module.
pub fn targets() -> Vec<Target> {
    let tall = BlockSpec { n_layers: 1, d_model: 1, width: vec![1; 255], branching: vec![1; 255], ..spec() };
    // A level of nearly as many bytes as can be counted.
    let vast =
        BlockSpec { n_layers: 1, d_model: 1, width: vec![1 << 28], branching: vec![1 << 30], ..spec() };
    let manifests = [
        shards(spec(), &[2, 0, 9]),
        shards(spec(), &[0, 0, 1]),
        shards(tall, &[1; 255]),
        shards(vast, &[1 << 30]),
    ]
    .map(|records| of_records(Path::new(PLACE), Step(7), &records).map(|manifest| manifest.to_json()));
    let records = [[1, 0, 2], [0, 0, 13]].map(|rows: [u64; 3]| serde_json::to_vec(&shards(spec(), &rows)));
    vec![
        Target { name: "manifest", check: manifest, seeds: manifests.into_iter().flatten().collect() },
        Target { name: "record", check: record, seeds: records.into_iter().flatten().collect() },
        Target { name: "segment_index", check: segment_index, seeds: indices() },
    ]
}

/// A manifest: refused with the file and the reason, or its sizes can be counted and it is written as it
/// was read.
pub fn manifest(bytes: &[u8]) -> bool {
    match Manifest::parse(Path::new(PLACE), bytes) {
        Err(error) => refused(&error),
        Ok(manifest) => {
            check_manifest(&manifest);
            true
        }
    }
}

/// The records of a commit, or one of them.
pub fn record(bytes: &[u8]) -> bool {
    let all = serde_json::from_slice::<Vec<ShardRecord>>(bytes);
    let Ok(records) = all.or_else(|_| serde_json::from_slice(bytes).map(|record| vec![record])) else {
        return false;
    };
    let text = serde_json::to_vec(&records).unwrap_or_default();
    assert_eq!(serde_json::from_slice::<Vec<ShardRecord>>(&text).ok().as_ref(), Some(&records));
    let step = records.first().map_or(Step(1), |record| record.step);
    match of_records(Path::new(PLACE), step, &records) {
        Err(error) => refused(&error),
        Ok(manifest) => {
            check_manifest(&manifest);
            true
        }
    }
}

/// The index of a segment, of a bank of three levels. Four bytes before it say which file it is of, whose
/// shard, and how many rows its manifest counts.
pub fn segment_index(bytes: &[u8]) -> bool {
    let Some((&[mode, shards, coarse, fine], rest)) = bytes.split_first_chunk() else { return false };
    let spec = spec();
    let part = PARTS[usize::from(mode & 1)];
    let layout = Layout::new(&spec, part, &[u64::from(coarse % 4), 0, u64::from(fine % 14)]);
    let n_shards = 1 + usize::from(shards % 3);
    let placement = Placement { shard: usize::from(shards / 3) % n_shards, n_shards };
    // So that what comes after the header is reached, and that it has the length for it.
    let mut start = if mode & 2 == 0 { Vec::new() } else { layout.header.clone() };
    start.extend_from_slice(rest);
    if mode & 4 != 0 {
        start.resize(layout.index_bytes as usize, 0);
    }
    let path = Path::new(PLACE);
    let read =
        |expected: &str| check_index(&layout, &spec, placement, (path, expected), &start).map_err(refuse);
    assert!(read("another hash").is_err());
    let Ok(index) = read(&sha256(&start)) else { return false };
    let rows = |level: &LevelIndex| level.rows.len() as u64;
    let columns: u64 =
        index.iter().map(|level| rows(level) * (4 + 4 * layout.n_tensors() as u64 + 8 * part as u64)).sum();
    let written = layout.write(&index);
    let meant = layout.header.len() + columns as usize;
    // The manifest's hash is for the padding.
    assert_eq!((written.len(), &written[..meant]), (start.len(), &start[..meant]));
    for (level, found) in index.iter().enumerate() {
        assert!(found.rows.is_sorted_by(|a, b| a < b));
        for &row in &found.rows {
            let id = spec.id_of_row(level, row as usize);
            assert!(placement.owns(id) && spec.row(id).is_ok_and(|found| found == row as usize));
        }
    }
    true
}

/// Fails on a message that does not begin with the file, is not one line, or has no bound.
fn refused(error: &Error) -> bool {
    let text = error.to_string();
    let reason = text.strip_prefix(PLACE).and_then(|rest| rest.strip_prefix(": "));
    assert!(reason.is_some_and(|reason| !reason.is_empty()), "{text:?}");
    is_line(&text);
    false
}

fn refuse(error: Error) {
    refused(&error);
}

/// Fails on a message that is not one line, or too long a one.
pub fn is_line(text: &str) {
    assert!(!text.is_empty() && !text.contains(char::is_control), "{text:?}");
    assert!(text.len() <= MAX_MESSAGE, "a message of {} bytes", text.len());
}

fn check_manifest(manifest: &Manifest) {
    let (path, spec) = (Path::new(PLACE), &manifest.spec);
    assert_eq!(Manifest::parse(path, &manifest.to_json()).ok().as_ref(), Some(manifest));
    assert!(manifest.check_same(path, &manifest.identity()).is_ok() && manifest.same_content(manifest));
    for segment in &manifest.segments {
        for part in PARTS {
            let layout = Layout::new(spec, part, &segment.rows);
            // By arithmetic that cannot overflow.
            let mut bytes = u128::from(layout.index_bytes);
            for (level, &n) in segment.rows.iter().enumerate().filter(|&(_, &n)| n > 0) {
                for tensor in 0..layout.n_tensors() {
                    let last = layout.range(level, tensor, n as usize - 1..n as usize);
                    assert_eq!(last.end - last.start, block_bytes(spec, level));
                    bytes += u128::from(n) * u128::from(block_bytes(spec, level));
                    assert_eq!(u128::from(last.end), bytes);
                }
            }
            let file = segment.file(part);
            assert_eq!((bytes, layout.index_bytes), (u128::from(file.bytes), file.index_bytes));
            assert!(!file.path.starts_with('/') && file.path.split('/').all(|name| name != ".."));
        }
    }
}

/// Levels with memory, and one without.
fn spec() -> BlockSpec {
    BlockSpec::ffn(2, 5, vec![3, 0, 2], vec![2, 3, 2])
}

/// The records of two shards that have saved step 7, the first in two segments.
fn shards(spec: BlockSpec, rows: &[u64]) -> Vec<ShardRecord> {
    let file = |part, name: &str| {
        let layout = Layout::new(&spec, part, rows);
        let (sha256, index_sha256) = ("5a".repeat(32), "c3".repeat(32));
        let (bytes, index_bytes) = (layout.bytes, layout.index_bytes);
        FileRecord { path: format!("{name}.safetensors"), bytes, sha256, index_bytes, index_sha256 }
    };
    let segment = |shard: usize, step| Segment {
        shard,
        step: Step(step),
        rows: rows.to_vec(),
        values: file(Part::Values, &format!("{step:08}/{shard}-values")),
        optimizer: file(Part::Optimizer, &format!("{step:08}/{shard}-optimizer")),
    };
    let identity = Identity {
        spec: spec.clone(),
        seed: u64::MAX,
        hashes: BTreeMap::from([("tree".to_owned(), "a1".to_owned())]),
    };
    let record = |shard: usize| ShardRecord {
        identity: identity.clone(),
        step: Step(7),
        shard,
        n_shards: 2,
        // As many are counted once as one level may have.
        touched: if shard == 0 { rows.to_vec() } else { vec![0; rows.len()] },
        segments: if shard == 0 { vec![segment(0, 3), segment(0, 7)] } else { vec![segment(1, 7)] },
    };
    vec![record(0), record(1)]
}

/// An index of each file, whole and from its header on.
fn indices() -> Vec<Vec<u8>> {
    let level = |part, rows: Vec<u32>| {
        let steps = if part == Part::Values { Vec::new() } else { vec![5; rows.len()] };
        let n_tensors = if part == Part::Values { 1 } else { 2 };
        LevelIndex { checksums: vec![vec![0x1234_5678; rows.len()]; n_tensors], steps, rows }
    };
    let seed = |part: Part| {
        let layout = Layout::new(&spec(), part, &[2, 0, 3]);
        let index = vec![level(part, vec![0, 2]), level(part, Vec::new()), level(part, vec![1, 11, 12])];
        let bytes = layout.write(&index);
        let n_header = layout.header.len();
        let after = [&[part as u8 | 2, 0, 2, 3], &bytes[n_header..]].concat();
        [[&[part as u8, 0, 2, 3], &bytes[..]].concat(), after]
    };
    PARTS.into_iter().flat_map(seed).collect()
}
