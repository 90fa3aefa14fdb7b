//! A bank whose blocks are in shards elsewhere.

mod bulk;
mod direct;
mod keeping;
mod options;
mod retry;
mod shard;
mod stats;

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cluster_tree::ClusterId;
use futures::future::{join_all, try_join_all};
use hyper_util::rt::TokioIo;
use memory_bank::{
    Block, BlockSpec, BlockStore, Error, Gradients, Kept, MAX_SHARDS, Placement, Result, Step, Traffic, owner,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};

pub use options::RemoteOptions;
pub use retry::Retry;
pub use stats::{RemoteStats, ShardStat};

use crate::proto::SaveResponse;
use crate::security::{Connector, Protocol};
use keeping::Held;
use options::endpoint;
use shard::{Encoded, ShardClient, Version, encode};
use stats::Counters;

/// A bank of several shards, as a [`BlockStore`]. A clone is another handle to the same connections.
#[derive(Clone)]
pub struct RemoteBank {
    spec: Arc<BlockSpec>,
    shards: Arc<Vec<Arc<ShardClient>>>,
    options: Arc<RemoteOptions>,
    counters: Arc<Counters>,
    /// Blocks that were read, as their shards had them.
    kept: Arc<Mutex<Kept<Held>>>,
}

/// Parts of a request this large go over connections of their own.
const PART_BYTES: usize = 8 << 20;

impl RemoteBank {
    /// Connects to every shard. Fails when one cannot be reached, is a shard of another bank or of
    /// another place than in the list, or holds blocks of other sizes.
    pub async fn connect(options: RemoteOptions) -> Result<Self> {
        let timeout = Duration::from_secs(options.connect_s);
        let silence = Duration::from_secs(options.silent_s);
        let connector = Connector { tls: options.tls.clone(), protocol: Protocol::Grpc, timeout, silence };
        let connect = move |uri: Uri| {
            let connector = connector.clone();
            async move {
                let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or_default());
                connector.connect(host, port).await.map(TokioIo::new)
            }
        };
        Self::connect_over(options, |endpoint| {
            endpoint.connect_with_connector_lazy(tower::service_fn(connect.clone()))
        })
        .await
    }

    /// As [`RemoteBank::connect`], over channels made by other means, such as a simulated network.
    pub async fn connect_over(
        options: RemoteOptions,
        mut channel: impl FnMut(Endpoint) -> Channel,
    ) -> Result<Self> {
        let n_shards = options.shards.len();
        if !(1..=MAX_SHARDS).contains(&n_shards) {
            return Err(setting("shards", &format!("1 to {MAX_SHARDS} addresses"), n_shards));
        }
        if options.streams == 0 {
            return Err(setting("streams", "at least 1", 0));
        }
        options.spec.validate()?;
        let counters = Arc::<Counters>::default();
        let mut shards = Vec::new();
        for (shard, address) in options.shards.iter().enumerate() {
            let endpoint = endpoint(address, &options)?;
            let channels = (0..options.streams).map(|_| channel(endpoint.clone())).collect();
            let placement = Placement { shard, n_shards };
            let client = ShardClient::new(address, placement, channels, &options, Arc::clone(&counters));
            shards.push(Arc::new(client.map_err(|status| remote(address, status))?));
        }
        let bank = Self {
            spec: Arc::new(options.spec.clone()),
            kept: Arc::new(Mutex::new(Kept::new(options.cache_bytes))),
            shards: Arc::new(shards),
            options: Arc::new(options),
            counters,
        };
        try_join_all((0..n_shards).map(|shard| bank.check(shard))).await?;
        Ok(bank)
    }

    /// Fetches into blocks that are there already: their ids say which, and their arrays are used again.
    /// When it fails, their values are not to be used.
    pub async fn fetch_into(&self, after: Step, blocks: &mut [Block]) -> Result<()> {
        self.fetch_changed(after, (blocks, &[])).await.map(|_| ())
    }

    /// As [`RemoteBank::fetch_into`]. With what is `held` of each block it returns what each is, and leaves the
    /// values of those that are as they are held.
    async fn fetch_changed(
        &self,
        after: Step,
        (blocks, held): (&mut [Block], &[Version]),
    ) -> Result<Vec<Version>> {
        let start = Instant::now();
        for block in blocks.iter_mut() {
            self.spec.check(block.id)?;
            block.values.resize(self.spec.block_len(usize::from(block.id.level)), 0.0);
        }
        let mut parts = self.parts(after, blocks);
        let fetches = parts.iter_mut().map(|part| self.fetch_part(after, part, held));
        // All of them are waited for, so that every array finds its way back.
        let fetched = join_all(fetches).await;
        let mut versions = vec![Version::default(); held.len()];
        let mut failed = Ok(());
        for (part, fetched) in parts.into_iter().zip(fetched) {
            match fetched {
                Ok(told) => part.places.iter().zip(told).for_each(|(&place, told)| versions[place] = told),
                Err(error) => failed = failed.and(Err(error)),
            }
            part.places.into_iter().zip(part.blocks).for_each(|(place, block)| blocks[place] = block);
        }
        self.counters.fetch_us.fetch_add(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        failed.map(|()| versions)
    }

    /// Begins a fetch beside what the caller does meanwhile, on the current runtime.
    pub fn prefetch(&self, after: Step, ids: &[ClusterId]) -> JoinHandle<Result<Vec<Block>>> {
        let (bank, ids) = (self.clone(), ids.to_vec());
        tokio::spawn(async move { bank.fetch(after, &ids).await })
    }

    /// Begins a save of the bank as it is after `step`: when this returns, every shard holds its blocks
    /// as they are, and the next steps may be pushed.
    pub async fn begin_save(&self, step: Step) -> Result<Save> {
        let begun =
            self.shards.iter().map(|shard| async move { self.retry(shard, || shard.begin_save(step)).await });
        Ok(Save { bank: self.clone(), step, answers: try_join_all(begun).await? })
    }

    /// Has every shard go back to a checkpoint, the newest unless told; returns its step.
    pub async fn restore(&self, step: Option<Step>) -> Result<Step> {
        let restore = async |shard: &ShardClient, step| {
            shard.restore(step).await.map_err(|status| remote(&shard.address, status))
        };
        // Unless told, the first one says which checkpoint is the newest.
        let (step, rest) = match step {
            Some(step) => (step, &self.shards[..]),
            None => (restore(&self.shards[0], None).await?, &self.shards[1..]),
        };
        try_join_all(rest.iter().map(|shard| restore(shard, Some(step)))).await?;
        Ok(step)
    }

    /// The last step that each shard has applied.
    pub async fn applied(&self) -> Result<Vec<Step>> {
        let applied = |shard: &Arc<ShardClient>| {
            let (bank, shard) = (self.clone(), Arc::clone(shard));
            async move { bank.retry(&shard, || shard.stat()).await.map(|stat| Step(stat.applied)) }
        };
        try_join_all(self.shards.iter().map(applied)).await
    }

    /// How every shard is, with its address: each is asked once and for no longer than `limit`.
    pub async fn shard_stats(&self, limit: Duration) -> Vec<(String, Result<ShardStat>)> {
        let look = |shard: &Arc<ShardClient>| {
            let shard = Arc::clone(shard);
            async move {
                let late = |_| Status::deadline_exceeded(format!("no answer within {limit:?}"));
                let stat = tokio::time::timeout(limit, shard.stat()).await.map_err(late).flatten();
                let found = stat.map(|stat| ShardStat {
                    applied: Step(stat.applied),
                    pending: stat.pending,
                    touched: stat.n_touched.iter().sum(),
                });
                (shard.address.clone(), found.map_err(|status| remote(&shard.address, status)))
            }
        };
        join_all(self.shards.iter().map(look)).await
    }

    /// Whether every shard is exactly after `step`: none has anything of the next one either.
    pub async fn is_after(&self, step: Step) -> Result<bool> {
        let is_after = |shard: &Arc<ShardClient>| {
            let (bank, shard) = (self.clone(), Arc::clone(shard));
            async move {
                let stat = bank.retry(&shard, || shard.stat()).await?;
                Ok::<_, Error>(stat.applied == step.0 && stat.pending == 0)
            }
        };
        Ok(try_join_all(self.shards.iter().map(is_after)).await?.into_iter().all(|is_after| is_after))
    }

    /// What this client has done so far.
    pub fn stats(&self) -> RemoteStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { received, unchanged, sent, retries, fetch_us, push_us } = &*self.counters;
        RemoteStats {
            received_bytes: of(received),
            unchanged_bytes: of(unchanged),
            sent_bytes: of(sent),
            retries: of(retries),
            fetch_us: of(fetch_us),
            push_us: of(push_us),
        }
    }

    /// Takes the blocks apart by the shard that owns them, and those of a shard into parts that go over
    /// connections of their own. A shard without any is asked for none once it has applied `after`: what
    /// the caller pushes next would else come too early for it, and be refused.
    fn parts(&self, after: Step, blocks: &mut [Block]) -> Vec<Part> {
        let n_shards = self.shards.len();
        let mut parts: Vec<Part> = (0..n_shards).map(Part::of).collect();
        let mut total = vec![0; n_shards];
        for block in blocks.iter() {
            total[owner(block.id, n_shards)] += block.values.len() * size_of::<f32>();
        }
        let part_bytes = |shard: usize| PART_BYTES.max(total[shard].div_ceil(self.options.streams));
        let mut last: Vec<usize> = (0..n_shards).collect();
        let mut filled = vec![0; n_shards];
        for (place, block) in blocks.iter_mut().enumerate() {
            let shard = owner(block.id, n_shards);
            if filled[shard] >= part_bytes(shard) {
                last[shard] = parts.len();
                filled[shard] = 0;
                parts.push(Part::of(shard));
            }
            filled[shard] += block.values.len() * size_of::<f32>();
            let part = &mut parts[last[shard]];
            part.places.push(place);
            part.blocks.push(Block { id: block.id, values: std::mem::take(&mut block.values) });
        }
        parts.retain(|part| after > Step(0) || !part.blocks.is_empty());
        parts
    }

    async fn fetch_part(&self, after: Step, part: &mut Part, held: &[Version]) -> Result<Vec<Version>> {
        let shard = &self.shards[part.shard];
        let held: Vec<Version> = part.places.iter().filter_map(|&place| held.get(place).copied()).collect();
        // Only one try runs at a time; the lock says so to the compiler.
        let blocks = tokio::sync::Mutex::new(&mut part.blocks);
        let fetch = || async {
            let mut blocks = blocks.lock().await;
            shard.fetch(after, self.options.fetch_dtype, (&mut **blocks, &held)).await
        };
        self.retry(shard, fetch).await
    }

    /// Tries a request to a shard, and again while that may help.
    async fn retry<T, F>(&self, shard: &ShardClient, mut work: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Status>>,
    {
        let limit = Duration::from_secs(self.options.request_s);
        let work = || {
            let answered = tokio::time::timeout(limit, work());
            async move {
                match answered.await {
                    // The shard is in another life.
                    Ok(Err(status)) if status.code() == Code::Aborted => {
                        shard.meet().await?;
                        Err(status)
                    }
                    Ok(answered) => answered,
                    Err(_) => Err(Status::unavailable(format!("no answer within {} s", limit.as_secs()))),
                }
            }
        };
        let again = |status: &Status| {
            let nth = self.counters.retries.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(shard = shard.address, %status, "trying again");
            SmallRng::seed_from_u64(self.options.seed ^ nth).random_range(0.5..1.0)
        };
        self.options.retry.run(work, again).await.map_err(|status| remote(&shard.address, status))
    }

    /// Fails when a shard is not the one that it should be.
    async fn check(&self, shard: usize) -> Result<()> {
        let client = &self.shards[shard];
        let stat = self.retry(client, || client.meet()).await?;
        let placement = Placement { shard, n_shards: self.shards.len() };
        if let Some(expected) = self.options.world_size.filter(|&n| n as u32 != stat.world_size) {
            let found = stat.world_size;
            let message =
                format!("the shard's steps are made of the pushes of {found} workers, expected {expected}");
            return Err(remote(&client.address, Status::failed_precondition(message)));
        }
        let found = stat.identity.unwrap_or_default();
        match self.options.identity.difference(placement, &found) {
            None => Ok(()),
            Some(difference) => Err(remote(
                &client.address,
                Status::failed_precondition(format!("expected here, found there: {difference}")),
            )),
        }
    }
}

impl BlockStore for RemoteBank {
    fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        let mut blocks: Vec<Block> = ids.iter().map(|&id| Block { id, values: Vec::new() }).collect();
        self.fetch_into(after, &mut blocks).await?;
        Ok(blocks)
    }

    async fn read(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        match self.options.cache_bytes {
            0 => self.fetch(after, ids).await,
            _ => self.read_kept(after, ids).await,
        }
    }

    fn traffic(&self) -> Option<Traffic> {
        let RemoteStats { received_bytes, unchanged_bytes, sent_bytes, .. } = self.stats();
        Some(Traffic { fetched_bytes: received_bytes, pushed_bytes: sent_bytes, unchanged_bytes })
    }

    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> Result<()> {
        let start = Instant::now();
        let n_shards = self.shards.len();
        // Here, since a shard that finds fault with its part does not keep the others from applying theirs.
        Gradients::check(&self.spec, &grads)?;
        let mut parts: Vec<Encoded> = vec![Vec::new(); n_shards];
        for block in grads {
            parts[owner(block.id, n_shards)].push(encode(block, self.options.push_dtype));
        }
        // A shard without gradients is told too: its step is complete only then.
        let pushes = self.shards.iter().zip(&parts).map(|(shard, part)| {
            self.retry(shard, move || shard.push((step, rank), self.options.push_dtype, part))
        });
        try_join_all(pushes).await?;
        self.counters.push_us.fetch_add(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        Ok(())
    }

    async fn save(&self, step: Step) -> Result<()> {
        self.begin_save(step).await?.finish().await
    }
}

/// A save under way. Dropped before it is finished, it makes no checkpoint.
pub struct Save {
    bank: RemoteBank,
    step: Step,
    answers: Vec<Streaming<SaveResponse>>,
}

impl Save {
    /// Waits until every shard has written its blocks, and makes a checkpoint of them.
    pub async fn finish(self) -> Result<()> {
        let Self { bank, step, answers } = self;
        let records = answers.into_iter().zip(bank.shards.iter()).map(|(mut answers, shard)| async move {
            let written = match answers.message().await {
                Ok(Some(answer)) => Ok(answer.record_json),
                Ok(None) => Err(Status::internal("the save ended before it was done")),
                Err(status) => Err(status),
            };
            written.map_err(|status| remote(&shard.address, status))
        });
        let records = try_join_all(records).await?;
        let first = &bank.shards[0];
        bank.retry(first, || first.commit(step, records.clone())).await
    }
}

/// Blocks of one shard that are fetched by one request, with their places among all.
struct Part {
    shard: usize,
    places: Vec<usize>,
    blocks: Vec<Block>,
}

impl Part {
    fn of(shard: usize) -> Self {
        Self { shard, places: Vec::new(), blocks: Vec::new() }
    }
}

fn setting(field: &'static str, expected: &str, found: impl ToString) -> Error {
    Error::Setting { field, expected: expected.to_owned(), found: found.to_string() }
}

fn remote(address: &str, status: Status) -> Error {
    let message = format!("{:?}: {}", status.code(), status.message());
    let is_transient = matches!(
        status.code(),
        Code::Aborted
            | Code::Cancelled
            | Code::DataLoss
            | Code::DeadlineExceeded
            | Code::Internal
            | Code::ResourceExhausted
            | Code::Unavailable
            | Code::Unknown
    );
    Error::Remote { address: address.to_owned(), message, is_transient }
}
