//! Blocks as messages.

use std::sync::Arc;

use bytes::Bytes;
use cluster_tree::{ClusterId, ClusterPath};
use futures::{Stream, stream};
use memory_bank::{BlockDtype, BlockSpec, Encoded};
use tonic::Status;

use super::source::Retrieved;
use crate::codec::PIECE_BYTES;
use crate::proto::retrieval::retrieve_response::Part;
use crate::proto::retrieval::{
    BlockHead, BlockId, Dtype, Path, RetrieveHead, RetrievePiece, RetrieveResponse, Spec,
};

/// The dtype that a request names; none when it leaves it to the server.
pub(super) fn dtype(found: i32) -> Result<Option<BlockDtype>, Status> {
    match Dtype::try_from(found) {
        Ok(Dtype::Unspecified) => Ok(None),
        Ok(Dtype::F32) => Ok(Some(BlockDtype::F32)),
        Ok(Dtype::Bf16) => Ok(Some(BlockDtype::Bf16)),
        Ok(Dtype::Int8) => Ok(Some(BlockDtype::Int8)),
        Err(_) => {
            let expected = "0 (as held), 1 (f32), 2 (bf16) or 3 (int8)";
            Err(Status::invalid_argument(format!("dtype {found}, expected {expected}")))
        }
    }
}

impl From<BlockDtype> for Dtype {
    fn from(dtype: BlockDtype) -> Self {
        match dtype {
            BlockDtype::F32 => Self::F32,
            BlockDtype::Bf16 => Self::Bf16,
            BlockDtype::Int8 => Self::Int8,
        }
    }
}

impl From<&BlockSpec> for Spec {
    fn from(spec: &BlockSpec) -> Self {
        let sizes = |sizes: &[usize]| sizes.iter().map(|&size| size as u32).collect();
        Self {
            n_layers: spec.n_layers as u32,
            d_model: spec.d_model as u32,
            width: sizes(&spec.width),
            branching: sizes(&spec.branching),
            kind: spec.kind.name().to_owned(),
            layers: spec.memory_layers().map(|layer| layer as u32).collect(),
        }
    }
}

impl From<&ClusterPath> for Path {
    fn from(path: &ClusterPath) -> Self {
        Self { indices: path.clone().into() }
    }
}

/// The blocks as they are sent: all held as one dtype.
pub(super) fn convert(retrieved: &mut Retrieved, dtype: BlockDtype) -> memory_bank::Result<()> {
    let row_len = retrieved.spec.row_len();
    for (block, &id) in retrieved.blocks.iter_mut().zip(&retrieved.ids) {
        *block = block.held_as(dtype, row_len, id)?;
    }
    Ok(())
}

/// What comes before the blocks.
pub(super) fn head(retrieved: &Retrieved, dtype: BlockDtype) -> RetrieveResponse {
    let spec = &retrieved.spec;
    let block = |(&ClusterId { level, index }, block): (&ClusterId, &Arc<Encoded>)| BlockHead {
        id: Some(BlockId { level: u32::from(level), index }),
        shape: spec.block_shape(usize::from(level)).into_iter().map(|n| n as u64).collect(),
        bytes: block.bytes(),
    };
    let head = RetrieveHead {
        bank: retrieved.bank.clone(),
        step: retrieved.step.0,
        spec: Some(spec.into()),
        path: retrieved.path.as_ref().map(Path::from),
        dtype: Dtype::from(dtype).into(),
        blocks: retrieved.ids.iter().zip(&retrieved.blocks).map(block).collect(),
        blocked: retrieved.blocked.clone(),
        hashes: retrieved.hashes.clone().into_iter().collect(),
    };
    RetrieveResponse { part: Some(Part::Head(head)) }
}

/// One of the two arrays of a block, which it keeps.
struct Array(Arc<Encoded>, usize);

impl AsRef<[u8]> for Array {
    fn as_ref(&self) -> &[u8] {
        self.0.parts()[self.1]
    }
}

/// Blocks in pieces, in order, none of them copied. `held` is let go after the last one.
pub(super) fn pieces(
    blocks: Vec<Arc<Encoded>>,
    held: impl Send,
) -> impl Stream<Item = Result<RetrieveResponse, Status>> + Send {
    let of_block = |(place, block): (usize, Arc<Encoded>)| {
        let first = block.parts()[0].len();
        let arrays = [(0, 0), (1, first)]
            .map(|(array, start)| (Bytes::from_owner(Array(Arc::clone(&block), array)), start));
        arrays.into_iter().flat_map(move |(bytes, begin)| {
            (0..bytes.len()).step_by(PIECE_BYTES).map(move |start| RetrievePiece {
                block: place as u32,
                offset: (begin + start) as u64,
                payload: bytes.slice(start..(start + PIECE_BYTES).min(bytes.len())),
            })
        })
    };
    let pieces = blocks.into_iter().enumerate().flat_map(of_block).map(move |piece| {
        let _ = &held;
        Ok(RetrieveResponse { part: Some(Part::Piece(piece)) })
    });
    stream::iter(pieces)
}
