use std::collections::BTreeMap;
use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{AdamW, Block, BlockSpec, Live, Placement, Schedule, Shard, ShardOptions, Step};
use memory_service::{Compression, Identity, Limits, RemoteOptions, ServeOptions, Source, serve};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Three levels, the middle one without memory. A block of the first is longer than a piece.
pub(crate) fn spec() -> BlockSpec {
    BlockSpec::ffn(4, 64, vec![96, 0, 2], vec![2, 3, 2])
}

pub(crate) fn options(world_size: usize, placement: Placement) -> ShardOptions {
    let schedule = Schedule { peak: 0.02, floor: 0.002, warmup_steps: 3, total_steps: 10 };
    let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: Some(1.0) };
    ShardOptions { seed: 7, adamw, world_size, staleness: 0, placement }
}

pub(crate) fn identity() -> Identity {
    let hashes =
        BTreeMap::from([("tree".to_owned(), "a1".to_owned()), ("anchor".to_owned(), "b2".to_owned())]);
    Identity::new("bank", &spec(), hashes)
}

pub(crate) fn serve_options() -> ServeOptions {
    ServeOptions {
        identity: identity(),
        limits: Limits::default(),
        compression: Compression::None,
        tls: None,
        tokens: None,
        store: None,
        bulk: None,
        http: None,
    }
}

pub(crate) async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

/// A shard that is served; dropped, it is stopped.
pub(crate) struct Served {
    pub(crate) address: String,
    pub(crate) live: Arc<Live>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Served {
    pub(crate) async fn start(options: ShardOptions, serving: ServeOptions) -> Self {
        Self::start_at(listener().await, Shard::new(spec(), options).unwrap(), serving)
    }

    pub(crate) fn start_at(listener: TcpListener, shard: Shard, serving: ServeOptions) -> Self {
        let live = Arc::new(Live::new(shard));
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel::<()>();
        let source = Source::Live(Arc::clone(&live));
        let task = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            serve(source, listener, serving, stopped).await.unwrap();
        });
        Self { address, live, stop: Some(stop), task }
    }

    /// Ends without a word to anybody.
    pub(crate) fn kill(self) {
        self.task.abort();
    }

    /// Stops taking requests and finishes those under way.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.unwrap();
    }
}

/// The shards of a bank, with bulk streams or without.
pub(crate) async fn shards(n_shards: usize, world_size: usize, bulk: bool) -> Vec<Served> {
    let mut served = Vec::new();
    for shard in 0..n_shards {
        let mut serving = serve_options();
        if bulk {
            serving.bulk = Some(listener().await);
        }
        served.push(Served::start(options(world_size, Placement { shard, n_shards }), serving).await);
    }
    served
}

pub(crate) fn remote(shards: &[Served]) -> RemoteOptions {
    RemoteOptions::new(shards.iter().map(|shard| shard.address.clone()).collect(), spec(), identity())
}

pub(crate) fn id(level: u8, index: u32) -> ClusterId {
    ClusterId { level, index }
}

/// Every block, the generic ones too.
pub(crate) fn all_ids() -> Vec<ClusterId> {
    let clusters = (0..2).map(|index| id(0, index)).chain((0..12).map(|index| id(2, index)));
    clusters.chain([id(0, ClusterId::GENERIC), id(2, ClusterId::GENERIC)]).collect()
}

/// What a rank pushes in a step: some blocks of each level, and nothing at all in step 3.
pub(crate) fn gradients(step: u64, rank: usize) -> Vec<Block> {
    let touched = |id: &ClusterId| step != 3 && (u64::from(id.index) + step + rank as u64).is_multiple_of(3);
    let gradient = |id: ClusterId| {
        let seed = step << 8 ^ rank as u64 ^ u64::from(id.index) << 20 ^ u64::from(id.level) << 60;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let len = spec().block_len(usize::from(id.level));
        Block { id, values: (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect() }
    };
    all_ids().into_iter().filter(touched).map(gradient).collect()
}

/// The same steps on a bank that is one value, in one thread.
pub(crate) fn reference(steps: u64, world_size: usize) -> Vec<Block> {
    let mut shard = Shard::new(spec(), options(world_size, Placement::WHOLE)).unwrap();
    for step in 1..=steps {
        for rank in 0..world_size {
            let gradients = memory_bank::Gradients::new(&spec(), gradients(step, rank)).unwrap();
            let run =
                |updates: Vec<memory_bank::Update<'_>>| updates.into_iter().for_each(|update| update.run());
            shard.push(Step(step), rank, gradients, run).unwrap();
        }
    }
    all_ids().into_iter().map(|id| Block { id, values: shard.block(id).unwrap() }).collect()
}

/// The bits of every weight.
pub(crate) fn bits(blocks: &[Block]) -> Vec<(ClusterId, Vec<u32>)> {
    blocks.iter().map(|b| (b.id, b.values.iter().map(|value| value.to_bits()).collect())).collect()
}
