//! The server's side of the bulk stream.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use cluster_tree::ClusterId;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use memory_bank::Step;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status};

use super::accept::Held;
use super::host::Host;
use super::metrics::Call;
use super::tickets::{Ticket, Tickets};
use crate::bulk::{
    ENTRY_BYTES, HEAD_BYTES, Head, Kind, MAX_TEXT, Reply, TICKET_BYTES, decode_entries, decode_versions,
    encode_versions,
};
use crate::parts::Parts;
use crate::pushback;
use crate::security::{Caller, Permission, Stream, authorize};
use crate::wire::Dtype;

/// Serves one connection until its peer closes it, is silent for too long or breaks the protocol.
pub(crate) async fn serve(host: Arc<Host>, tickets: Arc<Tickets>, connection: Held<Stream>) {
    let peer = connection.stream.peer();
    let idle = Duration::from_secs(host.limits.idle_s);
    let connection = Connection { host, stream: connection, idle, input: BytesMut::new() };
    match connection.run(&tickets).await {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) => tracing::warn!(%peer, %error, "bulk stream closed"),
    }
}

struct Connection {
    host: Arc<Host>,
    stream: Held<Stream>,
    idle: Duration,
    /// What has been read of the next request, most often all of it at once.
    input: BytesMut,
}

/// Room for a request of so many blocks to be read at once; longer ones take several calls.
const INPUT_BYTES: usize = HEAD_BYTES + 64 * ENTRY_BYTES;

impl Connection {
    async fn run(mut self, tickets: &Tickets) -> io::Result<()> {
        let mut ticket: Ticket = [0; TICKET_BYTES];
        within(self.idle, self.stream.read_exact(&mut ticket)).await?;
        let caller = tickets
            .redeem(&ticket)
            .filter(|(caller, _)| caller.identity.as_ref() == self.stream.stream.peer_identity());
        let Some((caller, life)) = caller else {
            return self
                .reply(&Err(Status::unauthenticated("the ticket of the bulk stream is not valid")))
                .await;
        };
        loop {
            let (head, entries, held) = self.request().await?;
            let (call, start) = (if head.kind == Kind::Push { "push" } else { "fetch" }, Instant::now());
            match head.kind {
                Kind::Fetch | Kind::FetchChanged => {
                    self.fetch((&caller, life), head, (&entries, &held)).await?;
                }
                Kind::Push => self.push((&caller, life), head, &entries).await?,
            }
            let seconds = start.elapsed().as_secs_f64();
            self.host.metrics.latency.get_or_create(&Call { call }).observe(seconds);
        }
    }

    /// A head, its entries, and what the caller holds if it says so.
    async fn request(&mut self) -> io::Result<(Head, Vec<(ClusterId, u64)>, Vec<u64>)> {
        // Between requests a connection may be silent for as long as its peer likes.
        self.fill(HEAD_BYTES).await?;
        let mut head = [0; HEAD_BYTES];
        self.input.copy_to_slice(&mut head);
        let head = Head::decode(&head).map_err(invalid)?;
        let (n_blocks, limit) = (head.n_blocks as usize, self.host.limits.blocks_per_request);
        if n_blocks > limit {
            return Err(invalid(format!("{n_blocks} blocks in one request, expected at most {limit}")));
        }
        let n_bytes = n_blocks * head.kind.entry_bytes();
        within(self.idle, self.fill(n_bytes)).await?;
        let mut rest = self.input.split_to(n_bytes);
        let entries = decode_entries(&rest.split_to(n_blocks * ENTRY_BYTES)).map_err(invalid)?;
        Ok((head, entries, decode_versions(&rest)))
    }

    /// Reads until `n_bytes` of a request are there.
    async fn fill(&mut self, n_bytes: usize) -> io::Result<()> {
        while self.input.len() < n_bytes {
            self.input.reserve(INPUT_BYTES.max(n_bytes - self.input.len()));
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    async fn fetch(
        &mut self,
        (caller, life): (&Caller, u64),
        head: Head,
        (entries, held): (&[(ClusterId, u64)], &[u64]),
    ) -> io::Result<()> {
        let ids: Vec<ClusterId> = entries.iter().map(|&(id, _)| id).collect();
        let fetched = match self.check(caller, Permission::Read, head.dtype, entries) {
            Ok(()) => self.host.fetch((life, Step(head.step)), (&ids, held), head.dtype).await,
            Err(status) => Err(status),
        };
        self.host.metrics.ended("fetch", fetched.as_ref().err().map_or(Code::Ok, Status::code));
        let mut outgoing = match fetched {
            Ok(outgoing) => outgoing,
            Err(status) => return self.reply(&Err(status)).await,
        };
        let reply = Reply { code: Code::Ok, retry_ms: 0, n_text: 0, applied: self.host.source.applied().0 };
        let blocks = std::mem::take(&mut outgoing.blocks).into_iter().map(|block| encoded(block, head.dtype));
        let mut begin = reply.encode().to_vec();
        encode_versions(std::mem::take(&mut outgoing.versions), &mut begin);
        let mut parts = Parts::new([Bytes::from(begin)].into_iter().chain(blocks));
        while parts.has_remaining() {
            if within(self.idle, self.stream.write_buf(&mut parts)).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        within(self.idle, self.stream.flush()).await
    }

    async fn push(
        &mut self,
        (caller, life): (&Caller, u64),
        head: Head,
        entries: &[(ClusterId, u64)],
    ) -> io::Result<()> {
        let ids: Vec<ClusterId> = entries.iter().map(|&(id, _)| id).collect();
        let begun = self.check(caller, Permission::Write, head.dtype, entries).and_then(|()| {
            self.host.begin_push(life, (Step(head.step), head.rank as usize), &ids, head.dtype)
        });
        let pushed = match begun {
            Err(status) => Err(status),
            Ok(mut push) => {
                if !self.input.is_empty() {
                    return Err(invalid("a push's blocks before the reply to its head".to_owned()));
                }
                self.reply(&Ok(self.host.source.applied())).await?;
                for &id in &ids {
                    let mut values = self.host.room(&push, id);
                    let mut rest = values.as_bytes_mut();
                    while !rest.is_empty() {
                        match within(self.idle, self.stream.read(rest)).await? {
                            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                            n => {
                                self.host.metrics.received(n);
                                rest = &mut rest[n..];
                            }
                        }
                    }
                    self.host.arrived(&mut push, id, values);
                }
                self.host.push(push).await
            }
        };
        self.host.metrics.ended("push", pushed.as_ref().err().map_or(Code::Ok, Status::code));
        self.reply(&pushed).await
    }

    /// Fails on a caller who may not, and on blocks of other sizes than the bank's.
    fn check(
        &self,
        caller: &Caller,
        needs: Permission,
        dtype: Dtype,
        entries: &[(ClusterId, u64)],
    ) -> Result<(), Status> {
        authorize(caller, needs)?;
        let spec = self.host.source.spec();
        for &(id, found) in entries {
            spec.check(id).map_err(super::host::status)?;
            let expected = (spec.block_len(usize::from(id.level)) * dtype.size()) as u64;
            if found != expected {
                let message = format!("block {id} of {found} bytes, expected {expected}");
                return Err(Status::failed_precondition(message));
            }
        }
        Ok(())
    }

    async fn reply(&mut self, result: &Result<Step, Status>) -> io::Result<()> {
        let (code, text) = match result {
            Ok(_) => (Code::Ok, ""),
            Err(status) => (status.code(), status.message()),
        };
        let end = (0..=MAX_TEXT.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
        let text = &text.as_bytes()[..end.unwrap_or_default()];
        let applied = result.as_ref().map_or_else(|_| self.host.source.applied(), |step| *step).0;
        let retry_ms =
            result.as_ref().err().and_then(pushback).map_or(0, |ms| ms.min(u64::from(u16::MAX)) as u16);
        let reply = Reply { code, retry_ms, n_text: text.len() as u32, applied };
        let bytes = [&reply.encode(), text].concat();
        within(self.idle, self.stream.write_all(&bytes)).await?;
        within(self.idle, self.stream.flush()).await
    }
}

/// A block of f32 as it goes over the wire.
fn encoded(block: Bytes, dtype: Dtype) -> Bytes {
    match dtype {
        Dtype::F32 => block,
        // One that has not changed, and lies nowhere.
        Dtype::Bf16 if block.is_empty() => block,
        Dtype::Bf16 => {
            let values: &[f32] = bytemuck::cast_slice(&block);
            let mut rounded = vec![bf16::ZERO; values.len()];
            rounded.convert_from_f32_slice(values);
            Bytes::from_owner(Rounded(rounded))
        }
    }
}

struct Rounded(Vec<bf16>);

impl AsRef<[u8]> for Rounded {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("silent for {} s", limit.as_secs()))),
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
