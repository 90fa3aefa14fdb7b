//! The bulk stream: blocks over a connection of their own, without the framing of HTTP/2.
//!
//! A connection begins with a ticket of 32 bytes that `OpenBulk` gave out. Then requests follow one
//! another, each answered before the next. All numbers are little-endian.
//!
//! A request is a head, then an entry per block (level u32, index u32, bytes u64). A fetch is answered
//! by a reply and, when its code is 0, the blocks, one after the other. A fetch of what has changed goes on
//! after its entries with what the caller holds of each block, u64, as `FetchRequest.held`; after the reply come
//! the versions of all blocks, u64, then those blocks whose version is not the one held. A push is answered by a reply
//! before its blocks are sent, so that a refused one is never sent, and by a second one after them. A
//! reply with another code, one of gRPC's, is followed by as many bytes of text as it says.

use cluster_tree::ClusterId;
use tonic::Code;

use crate::wire::Dtype;

/// Opens a connection.
pub(crate) const TICKET_BYTES: usize = 32;
/// Kind u8, dtype u8, zero u16, blocks u32, step u64, rank u32, zero u32.
pub(crate) const HEAD_BYTES: usize = 24;
/// Level u32, index u32, bytes u64.
pub(crate) const ENTRY_BYTES: usize = 16;
/// Of what is held, and of what is.
pub(crate) const VERSION_BYTES: usize = 8;
/// Code u16, milliseconds to wait before another try u16, bytes of text u32, step u64.
pub(crate) const REPLY_BYTES: usize = 16;
/// Longest text of a reply.
pub(crate) const MAX_TEXT: usize = 4096;

/// What a request asks for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Blocks, once step `step` has been applied.
    Fetch,
    /// To take the gradients of step `step`.
    Push,
    /// As `Fetch`, of blocks that the caller does not hold as they are. Only where `OpenBulk` says so.
    FetchChanged,
}

impl Kind {
    /// Bytes of a request beside its head, for each block.
    pub(crate) fn entry_bytes(self) -> usize {
        match self {
            Self::Fetch | Self::Push => ENTRY_BYTES,
            Self::FetchChanged => ENTRY_BYTES + VERSION_BYTES,
        }
    }
}

/// The beginning of a request.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) dtype: Dtype,
    pub(crate) n_blocks: u32,
    pub(crate) step: u64,
    pub(crate) rank: u32,
}

impl Head {
    pub(crate) fn encode(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[0] = match self.kind {
            Kind::Fetch => 1,
            Kind::Push => 2,
            Kind::FetchChanged => 3,
        };
        bytes[1] = self.dtype.message() as u8;
        bytes[4..8].copy_from_slice(&self.n_blocks.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.step.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.rank.to_le_bytes());
        bytes
    }

    /// Fails on a request that this protocol does not have, saying what is wrong.
    pub(crate) fn decode(bytes: &[u8; HEAD_BYTES]) -> Result<Self, String> {
        let kind = match bytes[0] {
            1 => Kind::Fetch,
            2 => Kind::Push,
            3 => Kind::FetchChanged,
            kind => {
                let expected = "1 (fetch), 2 (push) or 3 (fetch of what has changed)";
                return Err(format!("bulk request of kind {kind}, expected {expected}"));
            }
        };
        let dtype = match bytes[1] {
            0 => None,
            dtype => Dtype::of_message(i32::from(dtype)),
        };
        let dtype = dtype
            .ok_or_else(|| format!("bulk request of dtype {}, expected 1 (f32) or 2 (bf16)", bytes[1]))?;
        if bytes[2..4] != [0; 2] || bytes[20..24] != [0; 4] {
            return Err("bulk request with reserved bytes that are not 0".to_owned());
        }
        Ok(Self { kind, dtype, n_blocks: u32_at(bytes, 4), step: u64_at(bytes, 8), rank: u32_at(bytes, 16) })
    }
}

/// Appends the entry of a block.
pub(crate) fn encode_entry(id: ClusterId, n_bytes: usize, to: &mut Vec<u8>) {
    to.extend(u32::from(id.level).to_le_bytes());
    to.extend(id.index.to_le_bytes());
    to.extend((n_bytes as u64).to_le_bytes());
}

/// The blocks of a request, with the bytes that the other side takes each to have. Fails on a level that
/// no tree has.
pub(crate) fn decode_entries(bytes: &[u8]) -> Result<Vec<(ClusterId, u64)>, String> {
    let entry = |entry: &[u8]| {
        let level = u32_at(entry, 0);
        let level =
            u8::try_from(level).map_err(|_| format!("level {level} of a block, expected 0 to 255"))?;
        Ok((ClusterId { level, index: u32_at(entry, 4) }, u64_at(entry, 8)))
    };
    bytes.chunks_exact(ENTRY_BYTES).map(entry).collect()
}

/// Versions of blocks, one after the other.
pub(crate) fn decode_versions(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(VERSION_BYTES).map(|version| u64_at(version, 0)).collect()
}

/// The inverse of [`decode_versions`], appended.
pub(crate) fn encode_versions(versions: impl IntoIterator<Item = u64>, to: &mut Vec<u8>) {
    to.extend(versions.into_iter().flat_map(u64::to_le_bytes));
}

/// The beginning of an answer.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Reply {
    pub(crate) code: Code,
    /// Milliseconds to wait before another try; 0 says nothing about it.
    pub(crate) retry_ms: u16,
    /// Bytes of text that follow.
    pub(crate) n_text: u32,
    /// The last step applied.
    pub(crate) applied: u64,
}

impl Reply {
    pub(crate) fn encode(self) -> [u8; REPLY_BYTES] {
        let mut bytes = [0; REPLY_BYTES];
        bytes[..2].copy_from_slice(&(self.code as u16).to_le_bytes());
        bytes[2..4].copy_from_slice(&self.retry_ms.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.n_text.to_le_bytes());
        bytes[8..].copy_from_slice(&self.applied.to_le_bytes());
        bytes
    }

    /// Fails on a code that gRPC does not have, on more text than a reply has, and on text of a reply that
    /// has none: what follows it would be taken for blocks.
    pub(crate) fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<Self, String> {
        let n_text = u32_at(bytes, 4);
        if n_text as usize > MAX_TEXT {
            return Err(format!("bulk reply with {n_text} bytes of text, expected at most {MAX_TEXT}"));
        }
        let found = u16_at(bytes, 0);
        let code = Code::from_i32(i32::from(found));
        if code as u16 != found {
            return Err(format!("bulk reply of code {found}, expected one of gRPC's, 0 to 16"));
        }
        if code == Code::Ok && n_text > 0 {
            return Err(format!("bulk reply of code 0 with {n_text} bytes of text, expected none"));
        }
        Ok(Self { code, retry_ms: u16_at(bytes, 2), n_text, applied: u64_at(bytes, 8) })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever took such a reply for a good one would read its text as the beginning of a block.
    #[test]
    fn a_reply_is_refused_that_nobody_sends() {
        let good = Reply { code: Code::NotFound, retry_ms: 300, n_text: 9, applied: 7 };
        assert_eq!(Reply::decode(&good.encode()), Ok(good));
        let refused = |edit: &dyn Fn(&mut [u8; REPLY_BYTES])| {
            let mut bytes = good.encode();
            edit(&mut bytes);
            Reply::decode(&bytes).unwrap_err()
        };
        let code = "bulk reply of code 17, expected one of gRPC's, 0 to 16";
        assert_eq!(refused(&|bytes| bytes[0] = 17), code);
        let text = "bulk reply of code 0 with 9 bytes of text, expected none";
        assert_eq!(refused(&|bytes| bytes[0] = 0), text);
        assert!(refused(&|bytes| bytes[6] = 1).starts_with("bulk reply with 65545 bytes of text"));
    }
}
