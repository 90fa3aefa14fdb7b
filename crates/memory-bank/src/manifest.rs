use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::tensor_file::{io_error, mismatch};
use crate::{BlockSpec, Error, Result, Step};

/// The `format` of a bank's manifest.
pub const FORMAT: &str = "anchorage.bank.v1";

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const VALUES: &str = "values.safetensors";
pub(crate) const OPTIMIZER: &str = "optimizer.safetensors";

/// What a bank's folder holds. It is the last file written.
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
    /// Blocks updated at least once, per level, the generic one included.
    pub touched: Vec<u64>,
    /// Every other file of the folder, by name.
    pub files: BTreeMap<String, FileRecord>,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
}

/// One file of a bank.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Size.
    pub bytes: u64,
    /// SHA-256, in hex, of the file's full content, holes read as the zeros that they are.
    pub sha256: String,
}

/// How far to check a bank's files.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Verify {
    /// The manifest and the sizes of the files.
    Sizes,
    /// The SHA-256 of the files too, which reads all of them.
    Full,
}

/// Checks the files of a bank's folder against its manifest, and returns it. Fails on a file that
/// is missing or of another size or hash, and on a manifest that is not one.
pub fn verify(folder: &Path, verify: Verify) -> Result<Manifest> {
    let manifest = Manifest::read(folder)?;
    for name in [VALUES, OPTIMIZER] {
        let path = folder.join(name);
        let Some(record) = manifest.files.get(name) else {
            return Err(mismatch(&folder.join(MANIFEST), &format!("entry of {name}"), "present", "missing"));
        };
        let n_bytes = fs::metadata(&path).map_err(|source| io_error(&path, source))?.len();
        if n_bytes != record.bytes {
            let (expected, found) = (format!("{} bytes", record.bytes), format!("{n_bytes} bytes"));
            return Err(mismatch(&path, "size", expected, found));
        }
        if verify == Verify::Full {
            let found = sha256(&path)?;
            if found != record.sha256 {
                return Err(mismatch(&path, "sha256", &record.sha256, found));
            }
        }
    }
    Ok(manifest)
}

impl Manifest {
    /// Reads the manifest of a bank's folder.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let bytes = fs::read(&path).map_err(|source| io_error(&path, source))?;
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|source| json_error(&path, source))?;
        if manifest.format != FORMAT {
            return Err(mismatch(&path, "format", FORMAT, manifest.format));
        }
        if manifest.touched.len() != manifest.spec.n_levels() {
            let (expected, found) = (manifest.spec.n_levels(), manifest.touched.len());
            return Err(mismatch(&path, "number of levels in touched", expected, found));
        }
        let unfit = |error| mismatch(&path, "spec", "one that makes a bank", format!("unfit ({error})"));
        manifest.spec.validate().map_err(unfit)?;
        Ok(manifest)
    }

    /// Writes the manifest into a folder that is still under its temporary name.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(MANIFEST);
        let mut text = serde_json::to_vec_pretty(self).map_err(|source| json_error(&path, source))?;
        text.push(b'\n');
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        written.map_err(|source| io_error(&path, source))
    }

    /// Fails when the bank is of another spec or seed, or belongs to another tree, tokenizer or anchor.
    pub(crate) fn check_same(
        &self,
        folder: &Path,
        spec: &BlockSpec,
        seed: u64,
        hashes: &BTreeMap<String, String>,
    ) -> Result<()> {
        let path = folder.join(MANIFEST);
        if self.spec != *spec {
            return Err(mismatch(&path, "spec", format!("{spec:?}"), format!("{:?}", self.spec)));
        }
        if self.seed != seed {
            return Err(mismatch(&path, "seed", seed, self.seed));
        }
        let keys: BTreeSet<&String> = hashes.keys().chain(self.hashes.keys()).collect();
        for key in keys {
            let (expected, found) = (hashes.get(key), self.hashes.get(key));
            if expected != found {
                let text = |hash: Option<&String>| hash.cloned().unwrap_or("missing".to_owned());
                return Err(mismatch(&path, &format!("hash of {key}"), text(expected), text(found)));
            }
        }
        Ok(())
    }
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|source| io_error(path, source))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(|source| io_error(path, source))? {
            0 => return Ok(hex(&hasher.finalize())),
            n_bytes => hasher.update(&buffer[..n_bytes]),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn json_error(path: &Path, source: serde_json::Error) -> Error {
    Error::Json { path: path.to_owned(), part: "manifest", source }
}
