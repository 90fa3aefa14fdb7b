//! The client's side of the bulk stream.

use std::io;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, Bytes};
use cluster_tree::ClusterId;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use memory_bank::{Block, Step};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status};

use crate::bulk::{Head, Kind, REPLY_BYTES, Reply, encode_entry};
use crate::parts::Parts;
use crate::security::Stream;
use crate::wire::Dtype;

/// An open bulk stream.
pub(crate) struct Connection {
    stream: Stream,
    /// Where bf16 numbers arrive.
    rounded: Vec<bf16>,
}

/// Connections that no request uses.
#[derive(Default)]
pub(crate) struct Idle(Mutex<Vec<Connection>>);

impl Idle {
    pub(crate) fn take(&self) -> Option<Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    pub(crate) fn put(&self, connection: Connection) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }
}

impl Connection {
    /// Presents the ticket.
    pub(crate) async fn open(mut stream: Stream, ticket: &[u8]) -> io::Result<Self> {
        stream.write_all(ticket).await?;
        Ok(Self { stream, rounded: Vec::new() })
    }

    /// Fills the values of blocks, once step `after` has been applied; they have their length already.
    pub(crate) async fn fetch(
        &mut self,
        after: Step,
        dtype: Dtype,
        blocks: &mut [Block],
    ) -> Result<(), Status> {
        let head = Head { kind: Kind::Fetch, dtype, n_blocks: blocks.len() as u32, step: after.0, rank: 0 };
        let sizes = blocks.iter().map(|block| (block.id, block.values.len() * dtype.size()));
        self.request(head, sizes).await?;
        self.reply().await?;
        for block in blocks {
            match dtype {
                Dtype::F32 => {
                    let to: &mut [u8] = bytemuck::cast_slice_mut(&mut block.values);
                    self.stream.read_exact(to).await.map_err(broken)?;
                }
                Dtype::Bf16 => {
                    self.rounded.resize(block.values.len(), bf16::ZERO);
                    let to: &mut [u8] = bytemuck::cast_slice_mut(&mut self.rounded);
                    self.stream.read_exact(to).await.map_err(broken)?;
                    self.rounded.convert_to_f32_slice(&mut block.values);
                }
            }
        }
        Ok(())
    }

    /// Hands over gradients as they go over the wire; returns the last step applied.
    pub(crate) async fn push(
        &mut self,
        (step, rank): (Step, usize),
        dtype: Dtype,
        gradients: &[(ClusterId, Bytes)],
    ) -> Result<Step, Status> {
        let n_blocks = gradients.len() as u32;
        let head = Head { kind: Kind::Push, dtype, n_blocks, step: step.0, rank: rank as u32 };
        self.request(head, gradients.iter().map(|(id, values)| (*id, values.len()))).await?;
        self.reply().await?;
        let mut parts = Parts::new(gradients.iter().map(|(_, values)| values.clone()));
        while parts.has_remaining() {
            if self.stream.write_buf(&mut parts).await.map_err(broken)? == 0 {
                return Err(broken(io::ErrorKind::WriteZero.into()));
            }
        }
        self.stream.flush().await.map_err(broken)?;
        self.reply().await
    }

    async fn request(
        &mut self,
        head: Head,
        sizes: impl Iterator<Item = (ClusterId, usize)>,
    ) -> Result<(), Status> {
        let mut bytes = head.encode().to_vec();
        sizes.for_each(|(id, n_bytes)| encode_entry(id, n_bytes, &mut bytes));
        self.stream.write_all(&bytes).await.map_err(broken)?;
        self.stream.flush().await.map_err(broken)
    }

    async fn reply(&mut self) -> Result<Step, Status> {
        let mut bytes = [0; REPLY_BYTES];
        self.stream.read_exact(&mut bytes).await.map_err(broken)?;
        let reply = Reply::decode(&bytes).map_err(Status::internal)?;
        if reply.code == Code::Ok {
            return Ok(Step(reply.applied));
        }
        let mut text = vec![0; reply.n_text as usize];
        self.stream.read_exact(&mut text).await.map_err(broken)?;
        Err(Status::new(reply.code, String::from_utf8_lossy(&text)))
    }
}

fn broken(error: io::Error) -> Status {
    Status::unavailable(format!("the bulk stream broke: {error}"))
}
