//! Serves `retrieval.v1` of a made-up tree and bank on loopback, for clients to be tested with: prints its address
//! and ends with its input.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use cluster_tree::{ClusterId, ClusterTree, Level};
use embed::{Embedder, Hashed, HashedOptions};
use memory_bank::{
    AdamW, BankOptions, Block, BlockSpec, BlockStore, Identity, LocalBank, Schedule, Step, TierOptions,
};
use memory_service::{RetrievalOptions, serve_retrieval};
use retrieve::{Beam, Retriever};
use serve::memory::{BankSource, Banks, MemoryOptions, Reach, Retrieval, RetrievalParts};
use tokio::net::TcpListener;

/// What the leaves are about, two below each cluster of level 0.
const TOPICS: [[&str; 2]; 3] = [
    [
        "planets and moons orbit the sun, Jupiter is the largest planet",
        "stars and galaxies shine in the night sky",
    ],
    ["the heart pumps blood through the body", "bones and muscles of the human body"],
    ["a fugue has several voices, as in the music of Bach", "paintings and sculptures of the Renaissance"],
];

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let embedder = Hashed::fit(HashedOptions::default(), TOPICS.concat())?;
    let tree = Arc::new(tree(&embedder)?);
    let width = vec![16, 8];
    let spec = BlockSpec::ffn(4, 256, width, vec![3, 2]);
    let hashes = BTreeMap::from([("tree".to_owned(), tree.hash())]);
    let identity = Identity { spec, seed: 1, hashes };
    let dir = tempfile::tempdir()?;
    save(dir.path(), &identity).await?;
    let retriever = Retriever::new(Box::new(embedder), Box::new(Beam::new(Arc::clone(&tree), 2)?))?;
    let (reach, options) = (Reach::default(), MemoryOptions::default());
    let retrieval = Retrieval::new(RetrievalParts { retriever, tree, identity, page: None, reach, options })?;
    let folder = Some(dir.path().join("00000003/memory"));
    let source = BankSource { folder, step: None, tiers: TierOptions::default() };
    retrieval.banks().load(Banks::DEFAULT, source).await?;

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let ended = async {
        let read = || std::io::stdin().read_to_end(&mut vec![]);
        // An error ends the input too.
        let _ = tokio::task::spawn_blocking(read).await;
    };
    Ok(serve_retrieval(retrieval, listener, RetrievalOptions::default(), ended).await?)
}

/// Leaves at the embeddings of the topics, and above them their means.
fn tree(embedder: &Hashed) -> Result<ClusterTree, Box<dyn Error>> {
    let (dim, leaves) = (embedder.dim(), embedder.embed(&TOPICS.concat())?);
    let mean = |pair: &[f32]| -> Vec<f32> {
        pair[..dim].iter().zip(&pair[dim..]).map(|(a, b)| (a + b) / 2.0).collect()
    };
    let top = leaves.chunks_exact(2 * dim).flat_map(mean).collect();
    let levels = [
        Level { branching: 3, centroids: top, counts: vec![30, 20, 10] },
        Level { branching: 2, centroids: leaves, counts: vec![20, 10, 15, 5, 4, 6] },
    ];
    Ok(ClusterTree::new(dim, levels.into())?)
}

/// A bank all of whose blocks were updated three times.
async fn save(root: &Path, identity: &Identity) -> Result<(), Box<dyn Error>> {
    let schedule = Schedule { peak: 0.02, floor: 0.002, warmup_steps: 1, total_steps: 10 };
    let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None };
    let (seed, checkpoint_root, hashes) = (identity.seed, root.to_owned(), identity.hashes.clone());
    let options =
        BankOptions { seed, adamw, world_size: 1, staleness: 0, checkpoint_root, hashes, offload: None };
    let bank = LocalBank::create(identity.spec.clone(), options)?;
    let ids =
        |level: u8, n: u32| (0..n).chain([ClusterId::GENERIC]).map(move |index| ClusterId { level, index });
    for step in 1..=3 {
        let gradient = |id: ClusterId| {
            let len = identity.spec.block_len(usize::from(id.level));
            let phase = (id.index % 1000 * 7 + u32::from(id.level)) as f32;
            Block { id, values: (0..len).map(|i| (i as f32 * 0.3 + phase).sin()).collect() }
        };
        bank.push(Step(step), 0, ids(0, 3).chain(ids(1, 6)).map(gradient).collect()).await?;
    }
    Ok(bank.save(Step(3)).await?)
}
