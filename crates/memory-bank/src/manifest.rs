use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::segment::{Layout, Part};
use crate::tensor_file::mismatch;
use crate::{BlockSpec, Error, Placement, Result, Step};

/// The `format` of a bank's manifest.
pub const FORMAT: &str = "anchorage.bank.v2";

pub(crate) const MANIFEST: &str = "manifest.json";

/// Largest manifest: that of some 80,000 segments.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// Largest step: JSON readers that know only doubles count as far.
const MAX_STEP: u64 = 1 << 53;
/// Longest path of a file below its bank.
const MAX_PATH_BYTES: usize = 255;

/// What a bank is, whatever step it is at and however it is divided: banks of another identity are not
/// restored from, merged with or saved beside each other.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The sizes of the blocks.
    pub spec: BlockSpec,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
}

/// What a bank's files hold at one step. It is the last file written: without it there is no save.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// The sizes of the blocks.
    pub spec: BlockSpec,
    /// The last step applied.
    pub step: Step,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
    /// Shards that wrote it. A bank is restored to any number.
    pub n_shards: usize,
    /// Blocks updated at least once, per level, the generic one included. The others are not stored:
    /// they are [`crate::init_block`].
    pub touched: Vec<u64>,
    /// By shard, and from old to new: of a block that is in several, the last one counts.
    pub segments: Vec<Segment>,
}

/// The blocks that one shard wrote in one save.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// The shard.
    pub shard: usize,
    /// The step that was saved.
    pub step: Step,
    /// Blocks, per level.
    pub rows: Vec<u64>,
    /// The file of weights.
    pub values: FileRecord,
    /// The file of moments and numbers of updates.
    pub optimizer: FileRecord,
}

/// One file of a bank.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Path below the bank's folder.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// SHA-256, in hex, of the whole file.
    pub sha256: String,
    /// Size of the start of the file that says which blocks it has, with their checksums.
    pub index_bytes: u64,
    /// SHA-256, in hex, of that start.
    pub index_sha256: String,
}

/// What one shard has written for a step, and what it goes on from: its part of a manifest.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// The bank.
    pub identity: Identity,
    /// The step that is saved.
    pub step: Step,
    /// The shard.
    pub shard: usize,
    /// Shards of the bank.
    pub n_shards: usize,
    /// Blocks of the shard updated at least once, per level.
    pub touched: Vec<u64>,
    /// From old to new.
    pub segments: Vec<Segment>,
}

/// How far to check a bank's files.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Verify {
    /// The manifest, the sizes of the files, and which blocks they hold.
    Sizes,
    /// The SHA-256 of the files and the checksum of every block too, which reads all of them.
    Full,
}

impl Segment {
    pub(crate) fn file(&self, part: Part) -> &FileRecord {
        match part {
            Part::Values => &self.values,
            Part::Optimizer => &self.optimizer,
        }
    }

    /// Whether it holds the same blocks, wherever its files are.
    pub(crate) fn same_content(&self, other: &Self) -> bool {
        let content = |segment: &Self| {
            let sums = [Part::Values, Part::Optimizer].map(|part| segment.file(part).sha256.clone());
            (segment.shard, segment.step, segment.rows.clone(), sums)
        };
        content(self) == content(other)
    }
}

/// Whether two lists of segments hold the same blocks.
pub(crate) fn same_segments<'a>(
    ours: impl IntoIterator<Item = &'a Segment>,
    theirs: impl IntoIterator<Item = &'a Segment>,
) -> bool {
    let (mut ours, mut theirs) = (ours.into_iter(), theirs.into_iter());
    loop {
        match (ours.next(), theirs.next()) {
            (None, None) => return true,
            (Some(ours), Some(theirs)) if ours.same_content(theirs) => {}
            _ => return false,
        }
    }
}

impl Manifest {
    /// Parses and checks a manifest; `path` is what messages call it.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|source| Error::Json {
            path: path.to_owned(),
            part: "manifest",
            source,
        })?;
        manifest.check(path)?;
        Ok(manifest)
    }

    /// The manifest as it is written.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        // A value of numbers, texts and lists always has a JSON form.
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// What the bank is.
    pub fn identity(&self) -> Identity {
        Identity { spec: self.spec.clone(), seed: self.seed, hashes: self.hashes.clone() }
    }

    /// The segments of one shard, from old to new.
    pub(crate) fn segments_of(&self, shard: usize) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(move |segment| segment.shard == shard)
    }

    /// Whether it says the same as another but for the names of files.
    pub(crate) fn same_content(&self, other: &Self) -> bool {
        let head = |manifest: &Self| Self { segments: Vec::new(), ..manifest.clone() };
        head(self) == head(other) && same_segments(&self.segments, &other.segments)
    }

    /// Fails when the bank is of another spec or seed, or belongs to another tree, tokenizer or anchor.
    pub fn check_same(&self, path: &Path, identity: &Identity) -> Result<()> {
        if self.spec != identity.spec {
            let (expected, found) = (format!("{:?}", identity.spec), format!("{:?}", self.spec));
            return Err(mismatch(path, "spec", expected, found));
        }
        if self.seed != identity.seed {
            return Err(mismatch(path, "seed", identity.seed, self.seed));
        }
        let keys: BTreeSet<&String> = identity.hashes.keys().chain(self.hashes.keys()).collect();
        for key in keys {
            let (expected, found) = (identity.hashes.get(key), self.hashes.get(key));
            if expected != found {
                let text = |hash: Option<&String>| hash.cloned().unwrap_or("missing".to_owned());
                return Err(mismatch(path, &format!("hash of {key}"), text(expected), text(found)));
            }
        }
        Ok(())
    }

    /// Fails on what no writer of this crate writes, so that sizes computed from it do not overflow and
    /// paths do not leave the bank.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        if self.format != FORMAT {
            return Err(mismatch(path, "format", FORMAT, &self.format));
        }
        let unfit = |error| mismatch(path, "spec", "one that makes a bank", format!("unfit ({error})"));
        self.spec.validate().map_err(unfit)?;
        if self.step.0 > MAX_STEP {
            return Err(mismatch(path, "step", format!("at most {MAX_STEP}"), self.step));
        }
        let whole = Placement { shard: 0, n_shards: self.n_shards };
        let unfit = |error: Error| mismatch(path, "number of shards", "one that a bank has", error);
        whole.validate().map_err(unfit)?;
        check_counts(&self.spec, path, "touched", &self.touched)?;
        let mut paths = BTreeSet::new();
        let mut before: Option<&Segment> = None;
        for (place, segment) in self.segments.iter().enumerate() {
            let what = |field: &str| format!("{field} of segment {place}");
            if segment.shard >= self.n_shards {
                return Err(mismatch(
                    path,
                    &what("shard"),
                    format!("below {}", self.n_shards),
                    segment.shard,
                ));
            }
            if let Some(before) = before.filter(|before| before.shard > segment.shard) {
                return Err(mismatch(
                    path,
                    &what("shard"),
                    format!("at least {}", before.shard),
                    segment.shard,
                ));
            }
            let oldest = before.filter(|before| before.shard == segment.shard).map_or(0, |s| s.step.0);
            if !(oldest..=self.step.0).contains(&segment.step.0) {
                let expected = format!("{oldest} to {}", self.step);
                return Err(mismatch(path, &what("step"), expected, segment.step));
            }
            check_counts(&self.spec, path, &what("rows"), &segment.rows)?;
            for part in [Part::Values, Part::Optimizer] {
                let file = segment.file(part);
                check_path(path, &file.path)?;
                if !paths.insert(file.path.as_str()) {
                    return Err(mismatch(path, &format!("times that {} is named", file.path), 1, 2));
                }
                let layout = Layout::new(&self.spec, part, &segment.rows);
                for (what, expected, found) in [
                    ("bytes", layout.bytes, file.bytes),
                    ("index bytes", layout.index_bytes, file.index_bytes),
                ] {
                    if expected != found {
                        return Err(mismatch(path, &format!("{what} of {}", file.path), expected, found));
                    }
                }
            }
            before = Some(segment);
        }
        Ok(())
    }
}

/// Fails unless there is a count for each level, at most its blocks and the generic one.
fn check_counts(spec: &BlockSpec, path: &Path, what: &str, counts: &[u64]) -> Result<()> {
    if counts.len() != spec.n_levels() {
        return Err(mismatch(path, &format!("number of levels in {what}"), spec.n_levels(), counts.len()));
    }
    for (level, &count) in counts.iter().enumerate() {
        let most = if spec.width[level] > 0 { spec.n_blocks(level) as u64 + 1 } else { 0 };
        if count > most {
            return Err(mismatch(path, &format!("{what}, level {level}"), format!("at most {most}"), count));
        }
    }
    Ok(())
}

/// Fails on a path that is not one below the bank's folder, in plain characters.
fn check_path(path: &Path, found: &str) -> Result<()> {
    let is_plain = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        !matches!(part, "" | "." | "..") && part.bytes().all(plain)
    };
    if found.len() <= MAX_PATH_BYTES && found.split('/').all(is_plain) {
        return Ok(());
    }
    let expected = "one below the bank's folder, of letters, digits, '.', '_' and '-'";
    Err(mismatch(path, "path of a file", expected, found.escape_debug()))
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
