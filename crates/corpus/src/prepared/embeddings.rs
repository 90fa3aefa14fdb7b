//! `embeddings.bin`: one vector per window, what the stage `embed` leaves.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::files::{NewFile, map, read_json, remove, write_json};
use crate::{Error, Result};

const FILE: &str = "embeddings.bin";
const PARTIAL: &str = "embeddings.partial.json";

/// Rows between two syncs of a file being written; a killed run loses at most these.
const SYNC_ROWS: usize = 1 << 16;

/// The embeddings of all windows, mapped: row-major [n_windows, dim] f32.
pub struct Embeddings(Mmap);

impl Embeddings {
    /// The file in `dir`: little-endian f32, `[n_windows, dim]`.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join(FILE)
    }

    /// Opens the embeddings in `dir`. Fails when they are not `n_windows` rows of `dim` numbers.
    pub fn open(dir: &Path, n_windows: usize, dim: usize) -> Result<Self> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Err(Error::NotPrepared { path, stage: "embed" });
        }
        let rows = map(&path)?;
        let (expected, found) = ((n_windows * dim * 4) as u64, rows.len() as u64);
        if expected == found { Ok(Self(rows)) } else { Err(Error::Size { path, expected, found }) }
    }
}

impl Deref for Embeddings {
    type Target = [f32];

    // A map begins at a page, and its size is checked when it is opened.
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Writes embeddings row by row; goes on where a killed run of the same inputs stopped.
pub struct EmbeddingWriter {
    dir: PathBuf,
    file: NewFile,
    inputs: String,
    n_rows: usize,
    n_synced: usize,
    dim: usize,
}

/// What was on the disk when the progress was last noted.
#[derive(serde::Serialize, serde::Deserialize)]
struct Partial {
    inputs: String,
    n_rows: usize,
}

impl EmbeddingWriter {
    /// Begins, or resumes if the file being written is of the same `inputs` hash.
    pub fn open(dir: &Path, inputs: &str, dim: usize) -> Result<Self> {
        let (target, partial) = (dir.join(FILE), read_json::<Partial>(&dir.join(PARTIAL))?);
        let n_rows = partial.filter(|p| p.inputs == inputs).map_or(0, |p| p.n_rows);
        let resumed = NewFile::resume(&target, (n_rows * dim * 4) as u64)?;
        let (file, n_rows) = match resumed {
            Some(file) => (file, n_rows),
            None => (NewFile::create(&target)?, 0),
        };
        if n_rows == 0 {
            // What an earlier run of other inputs noted is not of the file that begins now.
            remove(&dir.join(PARTIAL))?;
        }
        Ok(Self { dir: dir.into(), file, inputs: inputs.into(), n_rows, n_synced: n_rows, dim })
    }

    /// Rows there are: the index of the next window to embed.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Appends whole rows.
    pub fn append(&mut self, rows: &[f32]) -> Result<()> {
        self.file.write(bytemuck::cast_slice(rows))?;
        self.n_rows += rows.len() / self.dim;
        if self.n_rows - self.n_synced >= SYNC_ROWS {
            self.file.sync()?;
            self.n_synced = self.n_rows;
            let partial = Partial { inputs: self.inputs.clone(), n_rows: self.n_rows };
            write_json(&self.dir.join(PARTIAL), &partial)?;
        }
        Ok(())
    }

    /// Puts the file in its place.
    pub fn commit(self) -> Result<()> {
        self.file.commit()?;
        remove(&self.dir.join(PARTIAL))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_a_kill_between_syncs_and_sizes_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let row = |i: usize| [i as f32, -1.0];
        let mut writer = EmbeddingWriter::open(dir, "a", 2).unwrap();
        for i in 0..SYNC_ROWS + 10 {
            writer.append(&row(i)).unwrap();
        }
        drop(writer); // killed: the rows after the sync are lost
        assert!(matches!(Embeddings::open(dir, 1, 2), Err(Error::NotPrepared { .. })));
        // Rows of other inputs, killed before their first sync but not before they reached the file.
        let mut other = EmbeddingWriter::open(dir, "other inputs", 4).unwrap();
        assert_eq!(other.n_rows(), 0);
        (0..SYNC_ROWS - 1).for_each(|_| other.append(&[7.0; 4]).unwrap());
        drop(other);
        let mut writer = EmbeddingWriter::open(dir, "a", 2).unwrap();
        assert_eq!(writer.n_rows(), 0, "the file of other inputs took its place");
        for i in 0..SYNC_ROWS + 10 {
            writer.append(&row(i)).unwrap();
        }
        drop(writer);
        let mut writer = EmbeddingWriter::open(dir, "a", 2).unwrap();
        assert_eq!(writer.n_rows(), SYNC_ROWS);
        for i in SYNC_ROWS..SYNC_ROWS + 10 {
            writer.append(&row(i)).unwrap();
        }
        writer.commit().unwrap();
        let rows = Embeddings::open(dir, SYNC_ROWS + 10, 2).unwrap();
        assert!((0..SYNC_ROWS + 10).all(|i| rows[2 * i..2 * i + 2] == row(i)));
        let error = Embeddings::open(dir, 3, 2).err().unwrap().to_string();
        assert!(error.contains("embeddings.bin"), "{error}");
    }
}
