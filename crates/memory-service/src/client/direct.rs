//! Fetches with one copy: from the connection's buffer to the block. tonic's decoders gather a message
//! first, which copies it once more.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use half::bf16;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, TE};
use http_body_util::{BodyExt, Full};
use memory_bank::Block;
use prost::Message;
use tonic::body::Body;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower::Service;

use super::bulk::is_held;
use crate::codec::{FETCH_PATH, PieceHead};
use crate::proto::FetchRequest;
use crate::wire::Dtype;

/// Fills the values of blocks with the answer to `request`; they have their length already. Of a block that
/// the request says is held nothing is done; returns the versions, if it says so of all blocks.
pub(crate) async fn fetch(
    mut channel: Channel,
    token: Option<HeaderValue>,
    request: &FetchRequest,
    dtype: Dtype,
    blocks: &mut [Block],
) -> Result<Vec<u64>, Status> {
    let n_bytes = request.encoded_len();
    let mut message = BytesMut::with_capacity(5 + n_bytes);
    message.put_u8(0);
    message.put_u32(n_bytes as u32);
    request.encode_raw(&mut message);
    let mut call = http::Request::post(FETCH_PATH)
        .version(http::Version::HTTP_2)
        .header(TE, "trailers")
        .header(CONTENT_TYPE, "application/grpc")
        .body(Body::new(Full::new(message.freeze())))
        .map_err(|error| Status::internal(error.to_string()))?;
    if let Some(token) = token {
        call.headers_mut().insert(AUTHORIZATION, token);
    }
    let unreachable = |error: tonic::transport::Error| Status::from_error(Box::new(error));
    std::future::poll_fn(|cx| channel.poll_ready(cx)).await.map_err(unreachable)?;
    let response = channel.call(call).await.map_err(unreachable)?;
    let (parts, mut body) = response.into_parts();
    if let Some(status) = Status::from_header_map(&parts.headers).filter(|status| status.code() != Code::Ok) {
        return Err(status);
    }
    if parts.status != http::StatusCode::OK {
        return Err(Status::unavailable(format!("the shard answered with HTTP status {}", parts.status)));
    }
    let mut filling = Filling {
        versions: vec![0; request.held.len()],
        held: &request.held,
        blocks,
        dtype,
        place: 0,
        offset: 0,
        head: BytesMut::new(),
        left: 0,
        odd: None,
    };
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => filling.take(data)?,
            Err(frame) => {
                let trailers = frame.into_trailers().unwrap_or_default();
                return match Status::from_header_map(&trailers) {
                    Some(status) if status.code() == Code::Ok => filling.finish(),
                    Some(status) => Err(status),
                    None => Err(Status::internal("the fetch ended without a status")),
                };
            }
        }
    }
    Err(Status::unavailable("the connection ended in the middle of a fetch"))
}

/// Blocks that are being filled, in their order, each from its beginning.
struct Filling<'a> {
    blocks: &'a mut [Block],
    /// Of the blocks, if the request says what is held.
    held: &'a [u64],
    /// As told so far.
    versions: Vec<u64>,
    dtype: Dtype,
    /// The block that is filled.
    place: usize,
    /// Bytes of it on the wire that are there.
    offset: usize,
    /// What has come of the next message, until its payload begins.
    head: BytesMut,
    /// Bytes of the payload that are yet to come.
    left: usize,
    /// The first byte of a bf16 number whose second is yet to come.
    odd: Option<u8>,
}

impl Filling<'_> {
    fn take(&mut self, mut data: Bytes) -> Result<(), Status> {
        while data.has_remaining() {
            if self.left > 0 {
                let n = self.left.min(data.len());
                self.fill(&data[..n]);
                data.advance(n);
                self.left -= n;
                continue;
            }
            // A head is short: byte for byte until it is whole.
            self.head.put_u8(data.get_u8());
            if let Some(head) = PieceHead::decode(&self.head).map_err(Status::internal)? {
                self.head.clear();
                self.begin(&head)?;
            }
        }
        Ok(())
    }

    /// Fails on a piece that is not the next.
    fn begin(&mut self, head: &PieceHead) -> Result<(), Status> {
        while self.blocks.get(self.place).is_some_and(|block| self.offset == self.n_bytes(block)) {
            (self.place, self.offset) = (self.place + 1, 0);
        }
        let Some(block) = self.blocks.get(self.place) else {
            return Err(Status::internal(format!("a piece of block {} that nobody asked for", head.id)));
        };
        let n_bytes = self.n_bytes(block);
        if let Some(version) = self.versions.get_mut(self.place) {
            *version = head.version;
        }
        let is_held = is_held(self.held, self.place, Some(&head.version));
        if is_held && head.id == block.id && (head.total_bytes, head.payload, self.offset) == (0, 0, 0) {
            self.offset = n_bytes;
            return Ok(());
        }
        let is_next =
            head.id == block.id && head.total_bytes == n_bytes as u64 && head.offset == self.offset as u64;
        if !is_next || head.payload == 0 || head.payload > n_bytes - self.offset {
            return Err(Status::internal(format!(
                "a piece of {} bytes at byte {} of block {}, expected byte {} of {n_bytes} of block {}",
                head.payload, head.offset, head.id, self.offset, block.id
            )));
        }
        self.left = head.payload;
        Ok(())
    }

    fn fill(&mut self, mut data: &[u8]) {
        let values = &mut self.blocks[self.place].values;
        match self.dtype {
            Dtype::F32 => {
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
                bytes[self.offset..self.offset + data.len()].copy_from_slice(data);
                self.offset += data.len();
            }
            Dtype::Bf16 => {
                let size = size_of::<bf16>();
                if let Some(first) = self.odd.take() {
                    values[self.offset / size] = bf16::from_le_bytes([first, data[0]]).to_f32();
                    (self.offset, data) = (self.offset + 1, &data[1..]);
                }
                let (pairs, rest) = data.as_chunks();
                let to = values[self.offset / size..].iter_mut();
                to.zip(pairs).for_each(|(to, pair)| *to = bf16::from_le_bytes(*pair).to_f32());
                self.odd = rest.first().copied();
                self.offset += data.len();
            }
        }
    }

    /// The versions. Fails when something is missing.
    fn finish(self) -> Result<Vec<u64>, Status> {
        let is_whole = |block: &Block| self.offset == self.n_bytes(block);
        let rest = &self.blocks[self.place.min(self.blocks.len())..];
        match rest {
            [] => Ok(self.versions),
            [last] if is_whole(last) && self.left == 0 => Ok(self.versions),
            [block, ..] => Err(Status::internal(format!(
                "the fetch ends at byte {} of {} of block {}",
                self.offset,
                self.n_bytes(block),
                block.id
            ))),
        }
    }

    fn n_bytes(&self, block: &Block) -> usize {
        block.values.len() * self.dtype.size()
    }
}
