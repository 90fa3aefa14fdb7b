//! Nodes that are done, in a file: what a killed build goes on from.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::build::JournalFile;
use crate::node::{NodeId, Trained};
use crate::options::Options;
use crate::rows::Rows;
use crate::{Error, Result};

/// Changes whenever records come to mean something else.
const FORMAT: &str = "anchorage.kmeans.journal.v1";

/// A file of records, each its length and CRC-32C before it: first what the build is of, then one per node.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    done: HashMap<NodeId, Trained>,
}

impl Journal {
    /// Reads the nodes of a killed build of the same points and options; else begins anew.
    pub(crate) fn open(to: JournalFile, rows: &dyn Rows, order: &[u32], options: &Options) -> Result<Self> {
        let JournalFile { path, identity } = to;
        let io = |source| Error::Io { path: path.into(), source };
        // The bytes that a build may hold do not change what it makes.
        let options = Options { host_bytes: 0, ..options.clone() };
        // Labels are by position in the order.
        let order = order.iter().fold(0, |crc, row| crc32c::crc32c_append(crc, &row.to_le_bytes()));
        let head = format!("{FORMAT} {identity} {} {} {order:08x} {options:?}", rows.len(), rows.dim());
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        file.try_lock().map_err(|source| io(source.into()))?;
        let (mut done, mut whole) = (HashMap::new(), 0);
        let mut reader = BufReader::new(&mut file);
        if read_record(&mut reader).map_err(io)?.as_deref() == Some(head.as_bytes()) {
            whole = record_bytes(head.len());
            while let Some(record) = read_record(&mut reader).map_err(io)? {
                let Some((id, trained)) = decode(&record) else { break };
                whole += record_bytes(record.len());
                done.insert(id, trained);
            }
        }
        // What a kill cut short goes.
        file.set_len(whole).map_err(io)?;
        file.seek(std::io::SeekFrom::End(0)).map_err(io)?;
        let mut journal = Self { path: path.into(), file, done };
        if whole == 0 {
            journal.write(head.as_bytes())?;
        }
        Ok(journal)
    }

    /// What a node was trained to before, once.
    pub(crate) fn take(&mut self, id: NodeId) -> Option<Trained> {
        self.done.remove(&id)
    }

    pub(crate) fn append(&mut self, id: NodeId, trained: &Trained) -> Result<()> {
        self.write(&encode(id, trained))
    }

    fn write(&mut self, record: &[u8]) -> Result<()> {
        let mut head = [0; 12];
        head[..8].copy_from_slice(&(record.len() as u64).to_le_bytes());
        head[8..].copy_from_slice(&crc32c::crc32c(record).to_le_bytes());
        let written = self.file.write_all(&head).and_then(|()| self.file.write_all(record));
        written.map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

fn record_bytes(len: usize) -> u64 {
    len as u64 + 12
}

/// The next record; none at the end, and none where it is cut short or not what was written.
fn read_record(reader: &mut BufReader<&mut File>) -> std::io::Result<Option<Vec<u8>>> {
    let (mut len, mut crc) = ([0; 8], [0; 4]);
    for part in [&mut len[..], &mut crc[..]] {
        match reader.read_exact(part) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
    }
    let mut record = vec![];
    let len = u64::from_le_bytes(len);
    reader.by_ref().take(len).read_to_end(&mut record)?;
    let whole = record.len() as u64 == len && crc32c::crc32c(&record) == u32::from_le_bytes(crc);
    Ok(whole.then_some(record))
}

fn encode(id: NodeId, trained: &Trained) -> Vec<u8> {
    let numbers = [id.level, id.index, trained.centroids.len(), trained.counts.len(), trained.labels.len()];
    let mut bytes: Vec<u8> = numbers.iter().flat_map(|&n| (n as u64).to_le_bytes()).collect();
    bytes.extend(trained.centroids.iter().flat_map(|x| x.to_le_bytes()));
    bytes.extend(trained.counts.iter().flat_map(|x| x.to_le_bytes()));
    bytes.extend(trained.labels.iter().flat_map(|x| x.to_le_bytes()));
    bytes
}

fn decode(bytes: &[u8]) -> Option<(NodeId, Trained)> {
    let (numbers, bytes) = bytes.split_at_checked(40)?;
    let number = |i: usize| u64::from_le_bytes(numbers.as_chunks::<8>().0[i]) as usize;
    let [level, index, n_centroids, n_counts, n_labels] = std::array::from_fn(number);
    if bytes.len() != n_centroids * 4 + n_counts * 8 + n_labels * 4 {
        return None;
    }
    let (centroids, bytes) = bytes.split_at(n_centroids * 4);
    let (counts, labels) = bytes.split_at(n_counts * 8);
    let trained = Trained {
        centroids: centroids.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
        counts: counts.as_chunks::<8>().0.iter().map(|&x| u64::from_le_bytes(x)).collect(),
        labels: labels.as_chunks::<4>().0.iter().map(|&x| u32::from_le_bytes(x)).collect(),
    };
    Some((NodeId { level, index }, trained))
}

/// Removes the journal of a build that is done, if there is one.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove_journal(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(Error::Io { path: path.into(), source }),
        _ => Ok(()),
    }
}
