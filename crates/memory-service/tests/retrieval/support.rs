use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cluster_tree::{ClusterId, ClusterPath};
use hyper_util::rt::TokioIo;
use memory_bank::{BlockSpec, Encoded, Step};
use memory_service::proto::retrieval::retrieval_service_client::RetrievalServiceClient;
use memory_service::proto::retrieval::retrieve_response::Part;
use memory_service::proto::retrieval::{
    Cluster, ExplainResponse, InfoResponse, Path, RetrieveHead, RetrieveRequest, Route,
};
use memory_service::security::{Connector, Protocol, ReloadingTls};
use memory_service::{Ask, Refusal, RetrievalOptions, RetrievalSource, Retrieved, What, serve_retrieval};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

pub(crate) type Client = RetrievalServiceClient<Channel>;

/// Two levels; a block of the first is longer than a piece.
pub(crate) fn spec() -> BlockSpec {
    BlockSpec::ffn(4, 64, vec![512, 2], vec![2, 3])
}

/// The numbers of a block.
pub(crate) fn values(id: ClusterId) -> Vec<f32> {
    let seed = u64::from(id.level) << 40 | u64::from(id.index);
    (0..spec().block_len(usize::from(id.level))).map(|i| ((i as u64 ^ seed) as f32 * 0.37).sin()).collect()
}

/// Answers with what it was asked; a text longer than five bytes is blocked, and "wait" waits.
#[derive(Clone)]
pub(crate) struct Echo {
    /// What a text "wait" waits for.
    pub(crate) gate: Arc<Semaphore>,
    /// Has a permit for each that waits.
    pub(crate) arrived: Arc<Semaphore>,
}

impl Default for Echo {
    fn default() -> Self {
        Self { gate: Arc::new(Semaphore::new(0)), arrived: Arc::new(Semaphore::new(0)) }
    }
}

fn route(leaf: u32, distance: f32) -> Route {
    Route { path: Some(Path { indices: vec![leaf / 3, leaf] }), distance, score: 1.0 - distance }
}

impl RetrievalSource for Echo {
    fn info(&self) -> InfoResponse {
        InfoResponse {
            spec: Some((&spec()).into()),
            tree: "a1".into(),
            embedding_dim: 2,
            ..Default::default()
        }
    }

    async fn route_texts(&self, texts: Vec<String>) -> Result<Vec<Vec<Route>>, Refusal> {
        if texts[0] == "wait" {
            self.arrived.add_permits(1);
            let _ = self.gate.acquire().await;
        }
        Ok(texts.iter().map(|text| vec![route(text.len() as u32, 0.25), route(0, 0.5)]).collect())
    }

    async fn route_embeddings(&self, rows: Vec<Vec<f32>>) -> Result<Vec<Vec<Route>>, Refusal> {
        match rows.iter().position(|row| row.len() != 2) {
            Some(row) => Err(Refusal::Invalid(format!("embedding {row}: expected 2 numbers, found another"))),
            None => Ok(rows.iter().map(|row| vec![route(row[0] as u32, row[1])]).collect()),
        }
    }

    async fn retrieve(&self, ask: Ask) -> Result<Retrieved, Refusal> {
        let path = |leaf: u32| ClusterPath::new(vec![leaf / 3, leaf]).unwrap();
        let (path, ids) = match ask.what {
            What::Blocks(ids) => (None, ids),
            What::Path(path) => (Some(path.clone()), path.ids().collect()),
            What::Text(text) if text.len() > 5 => {
                return Err(Refusal::Blocked(format!("path of {text:?} is blocked")));
            }
            What::Text(text) => {
                let path = path(text.len() as u32);
                (Some(path.clone()), path.ids().collect::<Vec<_>>())
            }
        };
        let wanted = |id: &ClusterId| ask.levels.is_empty() || ask.levels.contains(&usize::from(id.level));
        let ids: Vec<ClusterId> = ids.into_iter().filter(wanted).collect();
        Ok(Retrieved {
            bank: ask.bank.unwrap_or("default".into()),
            step: Step(290),
            spec: spec(),
            hashes: BTreeMap::from([("tree".to_owned(), "a1".to_owned())]),
            path,
            blocked: ask.blocked,
            blocks: ids.iter().map(|&id| Arc::new(Encoded::F32(values(id)))).collect(),
            ids,
            held: None,
        })
    }

    fn explain(&self, prefix: &[u32]) -> Result<ExplainResponse, Refusal> {
        if prefix == [9] {
            return Err(Refusal::NotFound("no cluster 9: expected an index of 0 to 1 at level 1".into()));
        }
        let cluster = Cluster { path: format!("{prefix:?}"), updates: Some(3), ..Cluster::default() };
        Ok(ExplainResponse { cluster: Some(cluster), ..Default::default() })
    }
}

/// A source that is served; dropped, it is stopped.
pub(crate) struct Served {
    pub(crate) address: String,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Served {
    pub(crate) async fn start(source: Echo, options: RetrievalOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            serve_retrieval(source, listener, options, stopped).await.unwrap();
        });
        Self { address, stop: Some(stop), task }
    }

    /// Stops taking requests and finishes those under way.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.unwrap();
    }

    /// A channel to it, over the client's own certificates if there are any.
    pub(crate) fn channel(&self, tls: Option<Arc<ReloadingTls>>) -> Channel {
        let seconds = Duration::from_secs(5);
        let connector = Connector { tls, protocol: Protocol::Grpc, timeout: seconds, silence: seconds };
        let connect = move |uri: Uri| {
            let connector = connector.clone();
            async move {
                let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or_default());
                connector.connect(host, port).await.map(TokioIo::new)
            }
        };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.connect_with_connector_lazy(tower::service_fn(connect))
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.channel(None))
    }
}

/// A retrieval put together: its head, and the bytes of each block. Checks the order and the sizes of the pieces.
pub(crate) async fn retrieve(
    client: &mut Client,
    request: RetrieveRequest,
) -> Result<(RetrieveHead, Vec<Vec<u8>>), Status> {
    let mut parts = client.retrieve(request).await?.into_inner();
    let Some(Part::Head(head)) = parts.message().await?.and_then(|response| response.part) else {
        panic!("a retrieval begins with its head");
    };
    let mut blocks = vec![vec![]; head.blocks.len()];
    let mut last = 0;
    while let Some(response) = parts.message().await? {
        let Some(Part::Piece(piece)) = response.part else { panic!("a second head") };
        let block: &mut Vec<u8> = &mut blocks[piece.block as usize];
        assert_eq!(piece.offset, block.len() as u64);
        assert!((1..=1 << 20).contains(&piece.payload.len()), "{} bytes", piece.payload.len());
        assert!(piece.block >= last);
        last = piece.block;
        block.extend_from_slice(&piece.payload);
    }
    for (head, block) in head.blocks.iter().zip(&blocks) {
        assert_eq!(head.bytes, block.len() as u64);
    }
    Ok((head, blocks))
}
