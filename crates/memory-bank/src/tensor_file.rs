//! Safetensors files whose every byte but the data is known from shapes alone. So a header is not
//! parsed when it is read: it is compared with the one that must be there.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::Error;
use crate::error::one_line;

// Values are written and mapped as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "bank files are little-endian");

/// Data starts at a multiple of this, so that rows of a mapped file suit any vector width.
pub(crate) const ALIGNMENT: u64 = 64;
/// Bytes of a header shown in a message on either side of the first that differs.
const EXCERPT: usize = 24;

/// Name, type and shape of one tensor of a file.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
}

impl Tensor {
    pub(crate) fn bytes(&self) -> u64 {
        // All types here are of whole bytes. Counted in bits, the largest bank would overflow.
        self.shape.iter().product::<u64>() * (self.dtype.bitsize() / 8) as u64
    }
}

/// The bytes before the data: the header's length, the header, and spaces up to the alignment.
pub(crate) fn header(tensors: &[Tensor]) -> Vec<u8> {
    header_with(tensors, None)
}

/// As [`header`], with a text of the file's metadata.
pub(crate) fn header_with(tensors: &[Tensor], metadata: Option<(&str, String)>) -> Vec<u8> {
    let mut entries = Map::new();
    if let Some((key, text)) = metadata {
        entries.insert("__metadata__".into(), json!({ key: text }));
    }
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let dtype = tensor.dtype.to_string();
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let text = Value::Object(entries).to_string();
    let padded = (text.len() + 8).next_multiple_of(ALIGNMENT as usize);
    let mut bytes = (padded as u64 - 8).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    // A width of a format would panic above 65,535: the header of 255 levels is longer.
    bytes.resize(padded, b' ');
    bytes
}

/// Fails on a file that does not start with this header, and shows where it differs.
pub(crate) fn check_header(path: &Path, expected: &[u8], start: &[u8]) -> crate::Result<()> {
    let found = &start[..expected.len().min(start.len())];
    if found == expected {
        return Ok(());
    }
    let length = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if length(found) != length(expected) {
        let bytes = |bytes: &[u8]| format!("{} bytes", length(bytes));
        return Err(mismatch(path, "header length", bytes(expected), bytes(found)));
    }
    let differs = |(a, b): (&u8, &u8)| a != b;
    let at = found.iter().zip(expected).position(differs).unwrap_or(found.len());
    let excerpt = |bytes: &[u8]| {
        let range = at.saturating_sub(EXCERPT).max(8)..(at + EXCERPT).min(bytes.len());
        format!("`{}`", String::from_utf8_lossy(&bytes[range]).escape_debug())
    };
    Err(mismatch(path, &format!("header at byte {at}"), excerpt(expected), excerpt(found)))
}

/// Maps a whole file to be read.
#[allow(unsafe_code)]
pub(crate) fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only, and the files of a bank are never changed in place: a save
    // writes files of new names, or a new folder, and renames them. Truncating a bank's file by
    // other means while it is open is outside of what this crate can guard against.
    unsafe { Mmap::map(file) }
}

pub(crate) fn io_error(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}

pub(crate) fn mismatch(path: &Path, what: &str, expected: impl ToString, found: impl ToString) -> Error {
    let (expected, found) = (one_line(&expected.to_string()), one_line(&found.to_string()));
    Error::Mismatch { path: path.to_owned(), what: what.to_owned(), expected, found }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> Vec<Tensor> {
        let tensor = |name: &str, dtype, shape| Tensor { name: name.to_owned(), dtype, shape };
        vec![tensor("a", Dtype::U32, vec![3]), tensor("b", Dtype::F32, vec![3, 2])]
    }

    #[test]
    fn a_header_is_that_of_the_safetensors_library() {
        let mut bytes = header(&tensors());
        assert_eq!(bytes.len() as u64 % ALIGNMENT, 0);
        bytes.extend([0; 36]);
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("b").unwrap().shape(), [3, 2]);
    }

    /// What can be wrong with a header is refused all alike, with what is there and what should be.
    #[test]
    fn a_hostile_header_is_refused_without_being_parsed() {
        let header = header(&tensors());
        let path = Path::new("x.safetensors");
        check_header(path, &header, &header).unwrap();
        check_header(path, &header, &[&header[..], b"data"].concat()).unwrap();
        for length in [0, 1, 1 << 40, u64::MAX] {
            let start = [&length.to_le_bytes(), &header[8..]].concat();
            let text = check_header(path, &header, &start).unwrap_err().to_string();
            let expected = header.len() - 8;
            assert_eq!(
                text,
                format!("x.safetensors: header length is {length} bytes, expected {expected} bytes")
            );
        }
        let text = String::from_utf8(header[8..].to_vec()).unwrap();
        let hostile = [
            ("overlapping", text.replace("[12,36]", "[0,24] ")),
            ("out of bounds", text.replace("[12,36]", "[12,99]")),
            ("overflowing", text.replace("[3,2]", "[9223372036854775807,9]")),
            ("of no size", text.replace("[3,2]", "[0,2]")),
            ("twice", text.replace("\"b\"", "\"a\"")),
            ("of another type", text.replace("F32", "F64")),
            ("deep", "[".repeat(text.len())),
        ];
        for (what, text) in hostile {
            let mut start = header[..8].to_vec();
            start.extend(text.bytes().take(header.len() - 8));
            let text = check_header(path, &header, &start).unwrap_err().to_string();
            assert!(text.starts_with("x.safetensors: header at byte "), "{what}: {text}");
        }
        for at in 8..header.len() {
            let mut start = header.clone();
            start[at] = 0xff;
            let text = check_header(path, &header, &start).unwrap_err().to_string();
            assert!(text.contains(&format!("header at byte {at} is ")), "{text}");
            assert!(check_header(path, &header, &header[..at]).is_err());
        }
        check_header(path, &header, &[]).unwrap_err();
    }
}
