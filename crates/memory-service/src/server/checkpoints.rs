use std::time::Instant;

use memory_bank::{BankStore, Shard, ShardRecord, Snapshot, Step};
use tokio::sync::Mutex;
use tonic::Status;

use super::host::{Host, status};
use crate::proto::BankIdentity;

/// Where a shard's checkpoints go.
pub(crate) struct Checkpoints {
    store: BankStore,
    identity: memory_bank::Identity,
    /// Checkpoints kept; 0 keeps all.
    keep: usize,
    /// One save at a time.
    saved: Mutex<Saved>,
}

/// What the next save need not write again.
#[derive(Default)]
struct Saved {
    /// Of a checkpoint that is whole.
    base: Option<ShardRecord>,
    /// Of the last save, whose commit another shard may have made.
    last: Option<ShardRecord>,
}

impl Checkpoints {
    /// `base` is what the shard was restored from.
    pub(crate) fn new(
        store: BankStore,
        identity: memory_bank::Identity,
        keep: usize,
        base: Option<ShardRecord>,
    ) -> Self {
        Self { store, identity, keep, saved: Mutex::new(Saved { base, last: None }) }
    }

    /// The blocks as they are after a step, in a life: nothing is copied, and pushes go on.
    pub(crate) fn snapshot(&self, host: &Host, life: u64, step: Step) -> Result<Snapshot, Status> {
        let _same_life = host.in_life(life)?;
        host.live()?.snapshot(step, Step(0)).map_err(status)
    }

    /// Writes a snapshot of a life; returns the record of it, as JSON. It is part of no checkpoint until
    /// committed. Fails when the life has ended before its turn came: what it would write belongs to nothing.
    pub(crate) async fn write(&self, host: &Host, life: u64, snapshot: Snapshot) -> Result<String, Status> {
        let start = Instant::now();
        let mut saved = self.saved.lock().await;
        host.in_life(life).map(drop)?;
        if let Some(last) = saved.last.take()
            && let Ok(checkpoint) = self.store.checkpoint(last.step).await
            && checkpoint.record(host.placement).as_ref() == Some(&last)
        {
            saved.base = Some(last);
        }
        let step = snapshot.step;
        let record = self.store.write(&self.identity, snapshot, saved.base.as_ref()).await.map_err(status)?;
        let json = serde_json::to_string(&record)
            .map_err(|error| Status::internal(format!("the record of step {step}: {error}")))?;
        let written = record.segments.iter().filter(|segment| segment.step == step);
        let n_bytes: u64 = written.map(|segment| segment.values.bytes + segment.optimizer.bytes).sum();
        host.metrics.saved_bytes.inc_by(n_bytes);
        saved.last = Some(record);
        let seconds = start.elapsed().as_secs_f64();
        host.metrics.save_seconds.observe(seconds);
        tracing::info!(step = step.0, seconds, bytes = n_bytes, "saved");
        Ok(json)
    }

    /// Makes a checkpoint of all shards' records, unless it is asked for by an attempt that is over by the time
    /// its turn comes: a restore that has given up later checkpoints would else find one more.
    pub(crate) async fn commit(
        &self,
        host: &Host,
        identity: Option<&BankIdentity>,
        (step, records): (Step, &[String]),
    ) -> Result<(), Status> {
        let _turn = self.saved.lock().await;
        host.check(identity)?;
        let record = |(i, json): (usize, &String)| {
            serde_json::from_str::<ShardRecord>(json)
                .map_err(|error| Status::invalid_argument(format!("record {i} of the commit: {error}")))
        };
        let records = records.iter().enumerate().map(record).collect::<Result<Vec<_>, _>>()?;
        self.store.commit(step, &records).await.map_err(status)?;
        if self.keep > 0 {
            self.store.keep(self.keep).await.map_err(status)?;
        }
        tracing::info!(step = step.0, "committed");
        Ok(())
    }

    /// Replaces the shard's blocks by those of a checkpoint, the newest unless told; the run goes on from
    /// there, so later checkpoints are given up. Returns its step, and the life of the blocks that begins.
    pub(crate) async fn restore(
        &self,
        host: &Host,
        identity: Option<&BankIdentity>,
        step: Option<Step>,
    ) -> Result<(Step, u64), Status> {
        let (start, live) = (Instant::now(), host.live()?);
        let mut saved = self.saved.lock().await;
        host.check(identity)?;
        let attempt = identity.map_or(0, |identity| identity.attempt);
        let checkpoint = match step {
            Some(step) => self.store.checkpoint(step).await.map_err(status)?,
            None => {
                let latest = self.store.latest().await.map_err(status)?;
                latest.ok_or_else(|| Status::not_found("the store holds no checkpoint of the bank"))?
            }
        };
        let step = checkpoint.manifest().step;
        let record = checkpoint.record(host.placement);
        let is_own = record.is_some() && (record == saved.base || record == saved.last);
        // What was not updated since need not be read again.
        let look =
            |shard: &Shard| (*shard.options(), if is_own { shard.unchanged_since(step) } else { vec![] });
        let (options, held) = live.with(look).map_err(status)?;
        let n_held = held.len();
        // Until this function ends, also when its caller goes away in the middle of it.
        let _not_ready = NotReady::begin(host);
        let restored = async {
            let shard = checkpoint.load_onto(&self.identity, options, held, live.offload()).await?;
            self.store.discard_after(step).await?;
            Ok(shard)
        };
        // After a failure the blocks are those from before.
        let life = host.replace(restored.await.map_err(status)?, attempt)?;
        *saved = Saved { base: record, last: None };
        host.metrics.applied.set(step.0 as i64);
        let seconds = start.elapsed().as_secs_f64();
        let n_read = live.with(|shard| shard.n_touched().iter().sum::<usize>()).map_err(status)? - n_held;
        tracing::info!(step = step.0, seconds, read = n_read, held = n_held, "restored");
        Ok((step, life))
    }
}

/// A shard that takes no requests until this is dropped.
struct NotReady<'a>(&'a Host);

impl<'a> NotReady<'a> {
    fn begin(host: &'a Host) -> Self {
        host.set_ready(false);
        Self(host)
    }
}

impl Drop for NotReady<'_> {
    fn drop(&mut self) {
        self.0.set_ready(true);
    }
}
