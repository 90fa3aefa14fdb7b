//! Messages on the wire. Those without blocks are prost's; the two that carry blocks are encoded from
//! the bank's memory and decoded without a copy of their payload, in the same bytes as prost's.

use std::marker::PhantomData;

use bytes::{Buf, BufMut, Bytes};
use cluster_tree::ClusterId;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use prost::Message;
use prost::encoding::{self, WireType, decode_key, decode_varint, encode_key, encode_varint};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::proto::{BlockId, PushHead};

/// Bytes of a block that one message carries: below the 4 MiB that other gRPC clients take.
pub(crate) const PIECE_BYTES: usize = 1 << 20;

/// The call whose messages do without a codec where they can.
pub(crate) const FETCH_PATH: &str = "/memory.v1.MemoryService/Fetch";

/// Bytes that a message may have beside its payload.
const MAX_HEAD_BYTES: usize = 1 << 20;

/// Largest message that either side takes: a head with many ids, or a piece of another implementation.
pub(crate) const MAX_MESSAGE_BYTES: usize = (4 << 20) + MAX_HEAD_BYTES;

/// The numbers of a message, as they are in memory.
#[derive(Clone, PartialEq, Debug)]
pub enum Payload {
    /// As they go over the wire.
    Bytes(Bytes),
    /// Numbers in f32 that are rounded to bf16 as they are encoded.
    Rounded(Bytes),
}

impl Payload {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Rounded(bytes) => bytes.len() / 2,
        }
    }

    pub(crate) fn put(&self, buf: &mut impl BufMut) {
        match self {
            Self::Bytes(bytes) => buf.put_slice(bytes),
            Self::Rounded(bytes) => {
                let mut rounded = [bf16::ZERO; 1024];
                for part in bytes.chunks(4 * rounded.len()) {
                    // Of f32 arrays, cut at multiples of their size.
                    let part: &[f32] = bytemuck::cast_slice(part);
                    let rounded = &mut rounded[..part.len()];
                    rounded.convert_from_f32_slice(part);
                    buf.put_slice(bytemuck::cast_slice(rounded));
                }
            }
        }
    }
}

impl Default for Payload {
    fn default() -> Self {
        Self::Bytes(Bytes::new())
    }
}

/// `FetchResponse` of the protocol: a piece of a block.
#[derive(Clone, PartialEq, Debug)]
pub struct FetchPiece {
    /// The block.
    pub id: ClusterId,
    /// Of the whole block on the wire.
    pub total_bytes: u64,
    /// Of the block, that come before this piece.
    pub offset: u64,
    /// Of the block, when the caller says what it holds; 0 otherwise.
    pub version: u64,
    /// The piece; empty, with no bytes in all, of a block that the caller holds.
    pub payload: Payload,
}

/// `PushRequest` of the protocol: a head, or a piece of a gradient.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct PushPiece {
    /// In the first message, and in no other.
    pub head: Option<PushHead>,
    /// The place of the block among those of the head.
    pub block: u32,
    /// Of the block, that come before this piece.
    pub offset: u64,
    /// The piece.
    pub payload: Payload,
}

/// A message that this side sends.
pub(crate) trait Encode {
    /// The most bytes that it takes.
    fn most_bytes(&self) -> usize;

    /// Appends the message.
    fn put(&self, buf: &mut impl BufMut);
}

/// A message that this side receives.
pub(crate) trait Decode: Sized {
    /// Reads the whole of `buf`.
    fn get(buf: &mut impl Buf) -> Result<Self, prost::DecodeError>;
}

impl<M: Message> Encode for M {
    fn most_bytes(&self) -> usize {
        self.encoded_len()
    }

    fn put(&self, buf: &mut impl BufMut) {
        self.encode_raw(buf);
    }
}

impl<M: Message + Default> Decode for M {
    fn get(buf: &mut impl Buf) -> Result<Self, prost::DecodeError> {
        M::decode(buf)
    }
}

impl Encode for FetchPiece {
    fn most_bytes(&self) -> usize {
        self.payload.len() + MAX_KEYS_BYTES
    }

    fn put(&self, buf: &mut impl BufMut) {
        let id = block_id(self.id);
        let numbers = [self.total_bytes, self.offset, self.version];
        Fields { message: Some(&id), numbers, payload: &self.payload }.put(buf);
    }
}

impl Decode for FetchPiece {
    fn get(buf: &mut impl Buf) -> Result<Self, prost::DecodeError> {
        let (id, [total_bytes, offset, version], payload) = get_fields::<BlockId, 3>(buf)?;
        let id = cluster_id(id.unwrap_or_default()).ok_or_else(|| wrong("level is above 255"))?;
        Ok(Self { id, total_bytes, offset, version, payload: Payload::Bytes(payload) })
    }
}

impl Encode for PushPiece {
    fn most_bytes(&self) -> usize {
        self.head.as_ref().map_or(0, Message::encoded_len) + self.payload.len() + MAX_KEYS_BYTES
    }

    fn put(&self, buf: &mut impl BufMut) {
        let numbers = [u64::from(self.block), self.offset];
        Fields { message: self.head.as_ref(), numbers, payload: &self.payload }.put(buf);
    }
}

impl Decode for PushPiece {
    fn get(buf: &mut impl Buf) -> Result<Self, prost::DecodeError> {
        let (head, [block, offset], payload) = get_fields::<PushHead, 2>(buf)?;
        let block = u32::try_from(block).map_err(|_| wrong("block is above 32 bits"))?;
        Ok(Self { head, block, offset, payload: Payload::Bytes(payload) })
    }
}

/// Tag of the payload in both messages; the message is 1, the numbers are 2 and those after it.
const PAYLOAD: u32 = 15;

/// More than keys, lengths and numbers take, and the id of a block with them.
const MAX_KEYS_BYTES: usize = 64;

/// What both messages that carry blocks are made of.
struct Fields<'a, M, const N: usize> {
    message: Option<&'a M>,
    numbers: [u64; N],
    payload: &'a Payload,
}

impl<M: Message, const N: usize> Fields<'_, M, N> {
    fn put(&self, buf: &mut impl BufMut) {
        if let Some(message) = self.message {
            encoding::message::encode(1, message, buf);
        }
        for (tag, number) in (2..).zip(self.numbers) {
            if number != 0 {
                encoding::uint64::encode(tag, &number, buf);
            }
        }
        if self.payload.len() > 0 {
            encode_key(PAYLOAD, WireType::LengthDelimited, buf);
            encode_varint(self.payload.len() as u64, buf);
            self.payload.put(buf);
        }
    }
}

/// As prost decodes: of a number or a payload that comes again the last one wins, a message that comes
/// again is added to what is there, and an unknown field is skipped.
fn get_fields<M: Message + Default, const N: usize>(
    buf: &mut impl Buf,
) -> Result<(Option<M>, [u64; N], Bytes), prost::DecodeError> {
    let (mut message, mut numbers, mut payload): (Option<M>, _, _) = (None, [0; N], Bytes::new());
    let mut most = MAX_HEAD_BYTES;
    let is_number = |tag: u32| tag >= 2 && (tag as usize) < 2 + N;
    while buf.has_remaining() {
        let (tag, wire_type) = decode_key(buf)?;
        match (tag, wire_type) {
            (1, WireType::LengthDelimited) => {
                let part = take(buf, most)?;
                most -= part.len();
                message.get_or_insert_default().merge(part)?;
            }
            (PAYLOAD, WireType::LengthDelimited) => payload = take(buf, MAX_MESSAGE_BYTES)?,
            (1 | PAYLOAD, _) => return Err(wrong("a field has the wrong wire type")),
            (tag, WireType::Varint) if is_number(tag) => numbers[tag as usize - 2] = decode_varint(buf)?,
            (tag, _) if is_number(tag) => return Err(wrong("a field has the wrong wire type")),
            _ => encoding::skip_field(wire_type, tag, buf, encoding::DecodeContext::default())?,
        }
    }
    Ok((message, numbers, payload))
}

/// A length, and as many bytes: not copied when they lie in one piece.
fn take(buf: &mut impl Buf, max: usize) -> Result<Bytes, prost::DecodeError> {
    let n_bytes = decode_varint(buf)?;
    if n_bytes > max as u64 || n_bytes > buf.remaining() as u64 {
        return Err(wrong("a length is beyond the message"));
    }
    Ok(buf.copy_to_bytes(n_bytes as usize))
}

fn wrong(what: &'static str) -> prost::DecodeError {
    #[expect(deprecated, reason = "prost has no other way to make one")]
    prost::DecodeError::new(what)
}

/// A cluster as the protocol writes it.
pub(crate) fn block_id(id: ClusterId) -> BlockId {
    BlockId { level: u32::from(id.level), index: id.index }
}

/// The inverse of [`block_id`]; `None` of a level that no tree has.
pub(crate) fn cluster_id(id: BlockId) -> Option<ClusterId> {
    Some(ClusterId { level: u8::try_from(id.level).ok()?, index: id.index })
}

impl FetchPiece {
    /// Appends the message with gRPC's prefix, and without the bytes of its payload, which follow.
    pub(crate) fn put_head(&self, payload: usize, buf: &mut impl BufMut) {
        let id = block_id(self.id);
        let mut fields = Vec::with_capacity(64);
        encoding::message::encode(1, &id, &mut fields);
        encoding::uint64::encode(2, &self.total_bytes, &mut fields);
        encoding::uint64::encode(3, &self.offset, &mut fields);
        if self.version != 0 {
            encoding::uint64::encode(4, &self.version, &mut fields);
        }
        encode_key(PAYLOAD, WireType::LengthDelimited, &mut fields);
        encode_varint(payload as u64, &mut fields);
        buf.put_u8(0);
        buf.put_u32((fields.len() + payload) as u32);
        buf.put_slice(&fields);
    }
}

/// A [`FetchPiece`] on the wire, up to its payload.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct PieceHead {
    pub(crate) id: ClusterId,
    pub(crate) total_bytes: u64,
    pub(crate) offset: u64,
    pub(crate) version: u64,
    /// Bytes of the payload.
    pub(crate) payload: usize,
}

impl PieceHead {
    /// Longest head: a prefix of 5 bytes and six fields.
    const MAX_BYTES: usize = 64;

    /// Reads a head that ends where `bytes` does; `None` when more of it is to come. Fails on what is no
    /// piece whose payload comes last.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Self>, String> {
        if bytes.len() > Self::MAX_BYTES {
            return Err("a message of a fetch has no payload at its end".to_owned());
        }
        let Some((prefix, mut fields)) = bytes.split_first_chunk::<5>() else { return Ok(None) };
        if prefix[0] != 0 {
            return Err(format!("a message of a fetch with the flag {}, expected 0", prefix[0]));
        }
        let n_bytes = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        let (n_head, mut head) = (
            fields.len(),
            Self { id: ClusterId { level: 0, index: 0 }, total_bytes: 0, offset: 0, version: 0, payload: 0 },
        );
        let mut id = BlockId::default();
        while fields.has_remaining() {
            // What is cut short fails too; then the rest comes next.
            let Ok((tag, wire_type)) = decode_key(&mut fields) else { return Ok(None) };
            match (tag, wire_type) {
                (1, WireType::LengthDelimited) => {
                    let Ok(part) = take(&mut fields, Self::MAX_BYTES) else { return Ok(None) };
                    id.merge(part).map_err(|error| error.to_string())?;
                }
                (2..=4, WireType::Varint) => {
                    let Ok(number) = decode_varint(&mut fields) else { return Ok(None) };
                    let of_tag = [&mut head.total_bytes, &mut head.offset, &mut head.version];
                    *of_tag[tag as usize - 2] = number;
                }
                (PAYLOAD, WireType::LengthDelimited) => {
                    let Ok(payload) = decode_varint(&mut fields) else { return Ok(None) };
                    let rest = n_bytes.checked_sub(n_head - fields.len());
                    if rest.map(|rest| rest as u64) != Some(payload) || fields.has_remaining() {
                        return Err("a message of a fetch goes on after its payload".to_owned());
                    }
                    head.id = cluster_id(id).ok_or("a block of a level above 255")?;
                    head.payload = payload as usize;
                    return Ok(Some(head));
                }
                _ => return Err(format!("a message of a fetch has a field {tag} of another type")),
            }
        }
        Ok(None)
    }
}

/// The codec of every call.
pub(crate) struct WireCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for WireCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for WireCodec<T, U>
where
    T: Encode + Send + 'static,
    U: Decode + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = Wire<T>;
    type Decoder = Wire<U>;

    fn encoder(&mut self) -> Wire<T> {
        Wire(PhantomData)
    }

    fn decoder(&mut self) -> Wire<U> {
        Wire(PhantomData)
    }
}

/// Both halves of [`WireCodec`].
pub(crate) struct Wire<T>(PhantomData<T>);

impl<T> Default for Wire<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Encode> Encoder for Wire<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.reserve(item.most_bytes());
        item.put(buf);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(8 << 10, PIECE_BYTES)
    }
}

impl<T: Decode> Decoder for Wire<T> {
    type Item = T;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<T>, Status> {
        T::get(buf).map(Some).map_err(|error| Status::invalid_argument(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(8 << 10, PIECE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encoders may divide a message that is in a field, and every decoder adds the parts up.
    #[test]
    fn a_message_in_two_parts_is_their_sum() {
        let bytes = [10, 2, 8, 3, 24, 7, 10, 2, 16, 9];
        let piece = FetchPiece::get(&mut &bytes[..]).unwrap();
        assert_eq!((piece.id, piece.offset), (ClusterId { level: 3, index: 9 }, 7));
        let head = [&[0, 0, 0, 0, 13], &bytes[..], &[122, 1]].concat();
        let head = PieceHead::decode(&head).unwrap().unwrap();
        assert_eq!((head.id, head.offset, head.payload), (piece.id, piece.offset, 1));
    }

    /// As large as one head may be, and not twice as large.
    #[test]
    fn a_head_in_parts_is_bounded_as_one() {
        let part = PushPiece {
            head: Some(PushHead {
                blocks: vec![BlockId::default(); MAX_HEAD_BYTES / 4],
                ..PushHead::default()
            }),
            ..PushPiece::default()
        };
        let mut bytes = Vec::new();
        part.put(&mut bytes);
        let twice = PushPiece::get(&mut &[&bytes[..], &bytes].concat()[..]).unwrap();
        assert_eq!(twice.head.unwrap().blocks.len(), MAX_HEAD_BYTES / 2);
        let thrice = PushPiece::get(&mut &[&bytes[..], &bytes, &bytes].concat()[..]).unwrap_err();
        assert!(thrice.to_string().ends_with("a length is beyond the message"), "{thrice}");
    }
}
