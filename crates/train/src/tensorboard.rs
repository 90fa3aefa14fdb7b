//! TensorBoard event files: TFRecord frames (length, masked crc32c, payload, masked crc32c) of `Event`
//! protocol buffers that hold scalar summaries.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

pub(crate) struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// A new event file in `dir` for the steps from `first_step` on.
    pub(crate) fn create(dir: &Path, first_step: u64, wall_time: f64) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))?;
        let path =
            dir.join(format!("events.out.tfevents.{:010}.anchorage.{first_step:08}", wall_time as u64));
        let file = File::create(&path).map_err(|e| Error::file(&path, e))?;
        let mut writer = Self { path, file: BufWriter::new(file) };
        let mut event = double_field(1, wall_time);
        event.extend(bytes_field(3, b"brain.Event:2"));
        writer.record(&event)?;
        Ok(writer)
    }

    /// One event with a scalar per tag.
    pub(crate) fn scalars(&mut self, step: u64, wall_time: f64, scalars: &[(&str, f64)]) -> Result<()> {
        let value = |&(tag, x): &(&str, f64)| {
            let mut value = bytes_field(1, tag.as_bytes());
            value.push(2 << 3 | 5); // simple_value, 32 bits
            value.extend((x as f32).to_le_bytes());
            bytes_field(1, &value)
        };
        let summary: Vec<u8> = scalars.iter().flat_map(value).collect();
        let mut event = double_field(1, wall_time);
        event.push(2 << 3); // step, varint
        event.extend(varint(step));
        event.extend(bytes_field(5, &summary));
        self.record(&event)
    }

    fn record(&mut self, payload: &[u8]) -> Result<()> {
        let len = (payload.len() as u64).to_le_bytes();
        let mut frame = len.to_vec();
        frame.extend(masked_crc(&len).to_le_bytes());
        frame.extend(payload);
        frame.extend(masked_crc(payload).to_le_bytes());
        self.file.write_all(&frame).and_then(|()| self.file.flush()).map_err(|e| Error::file(&self.path, e))
    }
}

/// TFRecord's checksum: crc32c rotated right by 15 bits plus a constant.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(mut x: u64) -> Vec<u8> {
    let mut bytes = vec![];
    while x >= 0x80 {
        bytes.push(x as u8 | 0x80);
        x >>= 7;
    }
    bytes.push(x as u8);
    bytes
}

fn double_field(number: u8, x: f64) -> Vec<u8> {
    let mut field = vec![number << 3 | 1];
    field.extend(x.to_le_bytes());
    field
}

fn bytes_field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    field.extend(varint(bytes.len() as u64));
    field.extend(bytes);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_carry_their_length_and_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 0, 12.5).unwrap();
        writer.scalars(300, 13.0, &[("loss", 2.5), ("learning_rate", 1e-3)]).unwrap();
        let bytes = fs::read(&writer.path).unwrap();
        let (mut at, mut payloads) = (0, vec![]);
        while at < bytes.len() {
            let header: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
            let len = u64::from_le_bytes(header) as usize;
            let crc = |range: std::ops::Range<usize>| u32::from_le_bytes(bytes[range].try_into().unwrap());
            assert_eq!(crc(at + 8..at + 12), masked_crc(&header));
            let payload = &bytes[at + 12..at + 12 + len];
            assert_eq!(crc(at + 12 + len..at + 16 + len), masked_crc(payload));
            payloads.push(payload.to_vec());
            at += 16 + len;
        }
        assert_eq!(payloads.len(), 2);
        assert!(payloads[0].ends_with(b"brain.Event:2"));
        // wall_time 13.0 (field 1), step 300 (field 2), then the summary (field 5).
        assert_eq!(payloads[1][..9], [9, 0, 0, 0, 0, 0, 0, 0x2a, 0x40]);
        assert_eq!(payloads[1][9..13], [16, 0xac, 0x02, 42]);
        assert!(payloads[1].windows(5).any(|w| w == [0x15, 0, 0, 0x20, 0x40]), "2.5 as a simple_value");
    }
}
