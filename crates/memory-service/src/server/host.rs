use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster_tree::ClusterId;
use memory_bank::{
    BlockSpec, Gradients, Live, MappedBank, Offload, Placement, Shard, Step, Values, Versioned,
};
use rand::RngExt;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tonic::Status;

use super::limits::{Bound, Limits};
use super::metrics::Metrics;
use crate::identity::Identity;
use crate::proto;
use crate::wire::Dtype;

/// Where a server's blocks are.
#[derive(Clone)]
pub enum Source {
    /// Updated by pushes.
    Live(Arc<Live>),
    /// In the files of a checkpoint, to be fetched from only.
    ReadOnly(Arc<MappedBank>),
}

impl Source {
    /// The sizes of the blocks.
    pub fn spec(&self) -> &BlockSpec {
        match self {
            Self::Live(live) => live.spec(),
            Self::ReadOnly(bank) => &bank.manifest().spec,
        }
    }

    /// The last step applied.
    pub fn applied(&self) -> Step {
        match self {
            Self::Live(live) => live.applied(),
            Self::ReadOnly(bank) => bank.manifest().step,
        }
    }
}

/// A shard and the bounds on what is asked of it, whichever port it is asked through.
pub(crate) struct Host {
    pub(crate) source: Source,
    pub(crate) identity: Identity,
    pub(crate) placement: Placement,
    pub(crate) limits: Limits,
    pub(crate) metrics: Metrics,
    /// Of the blocks: a number that no other process and no restore has. Held while it is asked about,
    /// so that it does not end in the middle of an answer.
    life: watch::Sender<u64>,
    /// The latest attempt at a run that the shard has been told of. It changes while `life` is held.
    attempt: AtomicU64,
    /// False while blocks are replaced, and once the server stops.
    ready: watch::Sender<bool>,
    fetches: Bound,
    waiting: Bound,
    push_mib: Bound,
}

/// Blocks that are on their way to a caller, as f32 in the bank's own memory.
pub(crate) struct Outgoing {
    /// In the order asked for; empty of one that the caller holds as it is.
    pub(crate) blocks: Vec<Bytes>,
    /// Of all blocks, when the caller says what it holds; else none.
    pub(crate) versions: Vec<u64>,
    _permit: OwnedSemaphorePermit,
}

/// A push that is being received, block by block.
pub(crate) struct Incoming {
    life: u64,
    step: Step,
    rank: usize,
    dtype: Dtype,
    /// Of the blocks that have arrived, or what is wrong with the first one that is no gradient.
    gradients: memory_bank::Result<Gradients>,
    _permit: OwnedSemaphorePermit,
}

impl Host {
    pub(crate) fn new(source: Source, identity: Identity, limits: Limits) -> Self {
        let placement = match &source {
            Source::Live(live) => live.placement(),
            Source::ReadOnly(_) => Placement::WHOLE,
        };
        Self {
            metrics: Metrics::new(),
            source,
            identity,
            placement,
            life: watch::Sender::new(new_life()),
            attempt: AtomicU64::new(0),
            ready: watch::Sender::new(true),
            fetches: Bound::new("fetches", limits.fetches),
            waiting: Bound::new("waiting requests", limits.waiting),
            push_mib: Bound::new("MiB of gradients", limits.push_mib),
            limits,
        }
    }

    /// Fails when the caller means another bank, another shard or a life of it that has ended; returns the
    /// life that the request is for.
    pub(crate) fn check(&self, identity: Option<&proto::BankIdentity>) -> Result<u64, Status> {
        let Some(identity) = identity else {
            return Err(Status::invalid_argument("the request has no identity of its bank"));
        };
        match self.identity.difference(self.placement, identity) {
            None => {}
            Some(difference) => return Err(Status::failed_precondition(difference)),
        }
        self.check_attempt(identity.attempt)?;
        let life = *self.life.borrow();
        match identity.life {
            0 => Ok(life),
            meant => self.in_life(meant).map(|_| meant),
        }
    }

    /// Fails for an attempt at the run that is over, since a later one has begun.
    fn check_attempt(&self, attempt: u64) -> Result<(), Status> {
        match self.attempt.load(Ordering::Relaxed) {
            latest if attempt != 0 && attempt < latest => Err(Status::failed_precondition(format!(
                "attempt {attempt} was taken over by attempt {latest}: another job trains on this shard"
            ))),
            _ => Ok(()),
        }
    }

    /// Follows the latest attempt at the run. With the first word of it a life begins, and nothing is taken
    /// any more that was meant for the one before, on whatever connection it comes; what had come and waited for
    /// other ranks is forgotten.
    pub(crate) fn follow(&self, attempt: u64) -> Result<(), Status> {
        let mut forgotten = Ok(());
        self.life.send_if_modified(|life| {
            let is_later = attempt > self.attempt.load(Ordering::Relaxed);
            if is_later {
                self.attempt.store(attempt, Ordering::Relaxed);
                *life = new_life();
                if let Source::Live(live) = &self.source {
                    forgotten = live.forget_pending().map_err(status);
                }
            }
            is_later
        });
        forgotten?;
        self.check_attempt(attempt)
    }

    /// Keeps a life from ending while what this returns is held. Fails when it has ended.
    pub(super) fn in_life(&self, life: u64) -> Result<watch::Ref<'_, u64>, Status> {
        let now = self.life.borrow();
        if *now == life {
            return Ok(now);
        }
        let applied = self.source.applied();
        Err(Status::aborted(format!("the shard was started or restored since, at step {applied}")))
    }

    /// Puts blocks in the place of the shard's, for an attempt that is not over by now; returns the life that
    /// begins with them.
    pub(crate) fn replace(&self, shard: Shard, attempt: u64) -> Result<u64, Status> {
        let (live, life) = (self.live()?, new_life());
        let mut replaced = Ok(());
        self.life.send_if_modified(|now| {
            replaced = self.check_attempt(attempt);
            let is_taken = replaced.is_ok();
            if is_taken {
                *now = life;
                replaced = live.replace(shard).map_err(status);
            }
            is_taken
        });
        replaced.map(|()| life)
    }

    pub(crate) fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.send_replace(ready);
    }

    /// Follows whether requests are taken.
    pub(crate) fn readiness(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Sets what the metrics tell of this moment.
    pub(crate) fn update_metrics(&self) {
        self.metrics.applied.set(self.source.applied().0 as i64);
        if let Source::Live(live) = &self.source
            && let Ok((lag, touched, in_memory)) =
                live.with(|shard| (shard.lag(), shard.n_touched(), shard.host_bytes()))
        {
            self.metrics.row_bytes("memory", in_memory);
            self.metrics.row_bytes("disk", live.offload().map_or(0, Offload::disk_bytes));
            self.metrics.fence_lag.set(lag as i64);
            touched.into_iter().enumerate().for_each(|(level, n)| self.metrics.touched(level as u8, n));
        }
        for bound in [&self.fetches, &self.waiting, &self.push_mib] {
            self.metrics.in_use(bound.what(), bound.in_use());
        }
    }

    /// What the shard is, and where it stands.
    pub(crate) fn stat(&self) -> Result<proto::StatResponse, Status> {
        let life = *self.life.borrow();
        let spec = self.source.spec();
        let spec_json = serde_json::to_string(spec)
            .map_err(|error| Status::internal(format!("the bank's spec: {error}")))?;
        let about = match &self.source {
            Source::Live(live) => live
                .with(|shard| proto::StatResponse {
                    world_size: shard.options().world_size as u32,
                    staleness: shard.options().staleness,
                    n_touched: shard.n_touched().into_iter().map(|n| n as u64).collect(),
                    seed: shard.options().seed,
                    pending: shard.lag() as u64,
                    ..proto::StatResponse::default()
                })
                .map_err(status)?,
            Source::ReadOnly(bank) => proto::StatResponse {
                n_touched: bank.manifest().touched.clone(),
                seed: bank.manifest().seed,
                read_only: true,
                ..proto::StatResponse::default()
            },
        };
        Ok(proto::StatResponse {
            identity: Some(proto::BankIdentity { life, ..self.identity.message(self.placement) }),
            applied: self.source.applied().0,
            spec_json,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..about
        })
    }

    /// The blocks once step `after` has been applied, without those that the caller holds as they are (`held`
    /// says what; it is empty or has a version for each block, 0 of one that is not held). A fetch of too many, one while too many others are
    /// on their way, and one whose step is not reached in time fail.
    pub(crate) async fn fetch(
        &self,
        (life, after): (u64, Step),
        (ids, held): (&[ClusterId], &[u64]),
        dtype: Dtype,
    ) -> Result<Outgoing, Status> {
        self.check_request(ids, dtype)?;
        if !held.is_empty() && held.len() != ids.len() {
            let message = format!("versions of {} blocks held, expected {} or none", held.len(), ids.len());
            return Err(Status::invalid_argument(message));
        }
        let start = Instant::now();
        self.reached(life, after).await?;
        self.metrics.fence_wait.observe(start.elapsed().as_secs_f64());
        let _permit = self.fetches.take(1).inspect_err(|_| self.metrics.refused())?;
        let (versions, blocks) = match held {
            [] => (vec![], self.read(ids).await?),
            held => self.read_changed(ids, held).await?,
        };
        // They were replaced after this at the earliest.
        self.in_life(life)?;
        self.metrics.fetched(ids, &blocks, dtype);
        Ok(Outgoing { blocks, versions, _permit })
    }

    async fn read(&self, ids: &[ClusterId]) -> Result<Vec<Bytes>, Status> {
        Ok(match &self.source {
            Source::Live(live) => match live.fetch_at_once(ids).map_err(status)? {
                Some(values) => values,
                None => {
                    let (live, ids) = (Arc::clone(live), ids.to_vec());
                    blocking(move || live.fetch(&ids).map_err(status)).await?
                }
            }
            .into_iter()
            .map(|values| Bytes::from_owner(Shared(values)))
            .collect(),
            Source::ReadOnly(bank) => {
                let (bank, ids) = (bank.clone(), ids.to_vec());
                let read = move |&id: &ClusterId| bank.block_bytes(id).map_err(status);
                blocking(move || ids.iter().map(read).collect()).await?
            }
        })
    }

    /// The versions of blocks, and those blocks whose version is not the one held.
    async fn read_changed(&self, ids: &[ClusterId], held: &[u64]) -> Result<(Vec<u64>, Vec<Bytes>), Status> {
        // 0 is of what is not held: the first version is 1.
        let held: Vec<Option<u64>> = held.iter().map(|held| held.checked_sub(1)).collect();
        let ids = ids.to_vec();
        match &self.source {
            Source::Live(live) => {
                let live = Arc::clone(live);
                let found = blocking(move || live.fetch_changed(&ids, &held).map_err(status)).await?;
                let bytes = |values| Bytes::from_owner(Shared(values));
                let block =
                    |(version, values): Versioned| (version + 1, values.map(bytes).unwrap_or_default());
                Ok(found.into_iter().map(block).unzip())
            }
            Source::ReadOnly(bank) => {
                let bank = bank.clone();
                let read = move |(&id, held): (&ClusterId, &Option<u64>)| match held {
                    Some(0) => Ok((1, Bytes::new())),
                    _ => Ok((1, bank.block_bytes(id).map_err(status)?)),
                };
                blocking(move || ids.iter().zip(&held).map(read).collect()).await
            }
        }
    }

    /// Takes a push in, unless there are too many.
    pub(crate) fn begin_push(
        &self,
        life: u64,
        (step, rank): (Step, usize),
        ids: &[ClusterId],
        dtype: Dtype,
    ) -> Result<Incoming, Status> {
        let n_bytes = self.check_request(ids, dtype)?;
        self.live()?;
        let _permit =
            self.push_mib.take(n_bytes.div_ceil(1 << 20)).inspect_err(|_| self.metrics.refused())?;
        Ok(Incoming { life, step, rank, dtype, gradients: Ok(Gradients::default()), _permit })
    }

    /// Room for the next block of a push, to be filled.
    pub(crate) fn room(&self, push: &Incoming, id: ClusterId) -> Values {
        push.dtype.zeros(self.source.spec().block_len(usize::from(id.level)))
    }

    /// A block of a push has arrived. What is wrong with it is told at the end: the rest is on its way.
    pub(crate) fn arrived(&self, push: &mut Incoming, id: ClusterId, values: Values) {
        if let Ok(gradients) = &mut push.gradients
            && let Err(error) = gradients.insert(self.source.spec(), id, values)
        {
            push.gradients = Err(error);
        }
    }

    /// Applies a push that is complete; returns the last step applied.
    pub(crate) async fn push(self: &Arc<Self>, push: Incoming) -> Result<Step, Status> {
        let host = Arc::clone(self);
        let push = move || {
            let Incoming { life, step, rank, gradients, _permit, .. } = push;
            let (live, gradients) = (host.live()?, gradients.map_err(status)?);
            let same_life = host.in_life(life)?;
            let pushed = live.push(step, rank, gradients).map_err(status)?;
            drop(same_life);
            host.metrics.pushed(&pushed);
            Ok(pushed.applied)
        };
        blocking(push).await
    }

    /// Waits until a step has been applied. Fails when too many wait, when it takes too long, and when the
    /// life ends in which it was to be applied.
    pub(crate) async fn reached(&self, life: u64, after: Step) -> Result<(), Status> {
        if self.source.applied() >= after {
            return Ok(());
        }
        let live = match &self.source {
            Source::Live(live) => live,
            Source::ReadOnly(bank) => {
                return Err(Status::failed_precondition(format!(
                    "fetch after step {after}, but the bank is open read-only at step {}",
                    bank.manifest().step
                )));
            }
        };
        let _waiting = self.waiting.take(1).inspect_err(|_| self.metrics.refused())?;
        let limit = Duration::from_secs(self.limits.request_s);
        let mut lives = self.life.subscribe();
        let reached = async {
            tokio::select! {
                reached = live.reached(after) => reached.map_err(status),
                _ = lives.wait_for(|&now| now != life) => self.in_life(life).map(drop),
            }
        };
        match tokio::time::timeout(limit, reached).await {
            Ok(reached) => reached,
            Err(_) => Err(Status::deadline_exceeded(format!(
                "step {after} was not applied within {} s: the bank is at step {}",
                limit.as_secs(),
                live.applied()
            ))),
        }
    }

    /// The shard that pushes go to. Fails on a bank that is only read.
    pub(crate) fn live(&self) -> Result<&Arc<Live>, Status> {
        match &self.source {
            Source::Live(live) => Ok(live),
            Source::ReadOnly(_) => Err(Status::failed_precondition("the bank is open read-only")),
        }
    }

    /// Bytes of these blocks on the wire. Fails on too many, and on one that is not the shard's.
    fn check_request(&self, ids: &[ClusterId], dtype: Dtype) -> Result<usize, Status> {
        if !self.is_ready() {
            return Err(Status::unavailable("the shard is not ready"));
        }
        let limit = self.limits.blocks_per_request;
        if ids.len() > limit {
            let message = format!("{} blocks in one request, expected at most {limit}", ids.len());
            return Err(Status::invalid_argument(message));
        }
        let spec = self.source.spec();
        let mut n_bytes = 0;
        for &id in ids {
            spec.check(id).and_then(|()| self.placement.check(id)).map_err(status)?;
            n_bytes += spec.block_len(usize::from(id.level)) * dtype.size();
        }
        let limit = self.limits.request_mib << 20;
        if n_bytes > limit {
            let message = format!("{n_bytes} bytes in one request, expected at most {limit}");
            return Err(Status::invalid_argument(message));
        }
        Ok(n_bytes)
    }
}

/// A block's weights as bytes.
struct Shared(Arc<Vec<f32>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Runs work that computes much or waits for a lock on the runtime's threads for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(Status::internal(format!("a task of the shard failed: {error}"))),
    }
}

/// A life that no other is taken for, and not 0.
fn new_life() -> u64 {
    rand::rng().random_range(1..=u64::MAX)
}

/// What a caller is told of an error of the bank.
pub(crate) fn status(error: memory_bank::Error) -> Status {
    use memory_bank::Error;
    let message = error.to_string();
    match error {
        Error::UnknownBlock { .. } => Status::not_found(message),
        Error::GradientLength { .. }
        | Error::GradientValue { .. }
        | Error::RepeatedGradient { .. }
        | Error::Rank { .. }
        | Error::Setting { .. } => Status::invalid_argument(message),
        Error::PushStep { .. }
        | Error::NotOwned { .. }
        | Error::SaveStep { .. }
        | Error::ReadOnly { .. }
        | Error::NotReached { .. }
        | Error::Mismatch { .. } => Status::failed_precondition(message),
        _ => Status::internal(message),
    }
}
