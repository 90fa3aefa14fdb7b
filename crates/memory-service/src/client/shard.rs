use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use cluster_tree::ClusterId;
use futures::stream;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use http::HeaderValue;
use memory_bank::{Block, Placement, Step};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::bulk::{Connection, Pool, Turn, is_held};
use super::direct;
use super::{Counters, RemoteOptions};
use crate::codec::{MAX_MESSAGE_BYTES, PIECE_BYTES, Payload, PushPiece, block_id};
use crate::proto::memory_service_client::MemoryServiceClient;
use crate::proto::{
    BankIdentity, CommitRequest, FetchRequest, OpenBulkRequest, PushHead, RestoreRequest, RestoreResponse,
    SaveRequest, SaveResponse, StatRequest, StatResponse,
};
use crate::security::{Connector, Protocol};
use crate::server::Compression;
use crate::wire::Dtype;

/// One shard as its client sees it.
pub(crate) struct ShardClient {
    /// `host:port`.
    pub(crate) address: String,
    host: String,
    /// In any life.
    identity: BankIdentity,
    /// Of the shard's blocks, when it was last asked.
    life: AtomicU64,
    /// The last step that this client has pushed or has seen applied. A shard that comes back from before
    /// it has lost something that the client takes it to have.
    relied_on: AtomicU64,
    /// The last step that this client has begun to push; a shard that is further has been pushed by others.
    begun: AtomicU64,
    channels: Vec<Channel>,
    clients: Vec<MemoryServiceClient<Channel>>,
    is_compressed: bool,
    /// The client that takes the next request.
    turn: AtomicUsize,
    token: Option<MetadataValue<Ascii>>,
    /// The same as a header.
    authorization: Option<HeaderValue>,
    bulk: Connector,
    pool: Pool,
    counters: Arc<Counters>,
}

/// A block as a shard has it: in one life and one version its weights are the same.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Version {
    life: u64,
    /// 0 of none.
    number: u64,
}

impl Version {
    /// Whether a shard has told it.
    pub(crate) fn is_known(self) -> bool {
        self.number != 0
    }
}

/// Gradients as they go over the wire.
pub(crate) type Encoded = Vec<(ClusterId, Bytes)>;

impl ShardClient {
    /// `channels` lead to the shard; nothing is sent yet.
    pub(crate) fn new(
        address: &str,
        placement: Placement,
        channels: Vec<Channel>,
        options: &RemoteOptions,
        counters: Arc<Counters>,
    ) -> Result<Self, Status> {
        let client = |channel| {
            let client = MemoryServiceClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            match options.compression.encoding() {
                None => client,
                Some(encoding) => client.send_compressed(encoding).accept_compressed(encoding),
            }
        };
        let token = options.token.as_ref().map(|token| format!("Bearer {token}").parse());
        let token = token.transpose().map_err(|_| Status::invalid_argument("the token is not plain text"))?;
        let authorization = options.token.as_ref().and_then(|token| format!("Bearer {token}").parse().ok());
        let (host, _) = address.rsplit_once(':').unwrap_or((address, ""));
        Ok(Self {
            address: address.to_owned(),
            host: host.to_owned(),
            identity: BankIdentity { attempt: options.attempt, ..options.identity.message(placement) },
            life: AtomicU64::new(0),
            relied_on: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            clients: channels.iter().cloned().map(client).collect(),
            channels,
            is_compressed: options.compression != Compression::None,
            turn: AtomicUsize::new(0),
            token,
            authorization,
            bulk: Connector {
                tls: options.tls.clone(),
                protocol: Protocol::Bulk,
                timeout: Duration::from_secs(options.connect_s),
                silence: Duration::from_secs(options.silent_s),
            },
            pool: Pool::new(options.streams, options.bulk),
            counters,
        })
    }

    pub(crate) async fn stat(&self) -> Result<StatResponse, Status> {
        let request = StatRequest { attempt: self.identity.attempt };
        Ok(self.client().stat(self.request(request)).await?.into_inner())
    }

    /// Learns in which life the shard is; returns where it stands. Fails when it has lost steps that this
    /// client relies on, and when it has steps that this client, if it pushes, has not pushed: a shard that was
    /// started again knows no attempts, and takes what an earlier one has yet to say.
    pub(crate) async fn meet(&self) -> Result<StatResponse, Status> {
        let stat = self.stat().await?;
        let relied_on = self.relied_on.load(Ordering::Relaxed);
        if stat.applied < relied_on {
            return Err(Status::data_loss(format!(
                "the shard came back at step {}: what it was given since, up to step {relied_on}, is lost; \
                 go on from a checkpoint",
                stat.applied
            )));
        }
        let begun = self.begun.load(Ordering::Relaxed);
        if begun > 0 && stat.applied > begun {
            return Err(Status::data_loss(format!(
                "the shard came back and is at step {}, of which this worker has pushed {begun}: another attempt \
                 has pushed since; go on from a checkpoint",
                stat.applied
            )));
        }
        let life = stat.identity.as_ref().map_or(0, |identity| identity.life);
        self.life.store(life, Ordering::Relaxed);
        Ok(stat)
    }

    /// Fills the values of blocks; they have their length already. With what is `held` of each block it returns
    /// what each is, unknown where the shard does not tell: of those that are as they are held nothing is
    /// fetched, and the values are left as they were.
    pub(crate) async fn fetch(
        &self,
        after: Step,
        dtype: Dtype,
        (blocks, held): (&mut [Block], &[Version]),
    ) -> Result<Vec<Version>, Status> {
        // Versions of another life say nothing.
        let in_life = |life: u64| -> Vec<u64> {
            held.iter().map(|version| if version.life == life { version.number } else { 0 }).collect()
        };
        let (life, asked, told) = match self.bulk_stream().await? {
            Some((mut connection, _turn)) => {
                let asked = if connection.has_versions { in_life(connection.life) } else { vec![] };
                let fetched = connection.fetch(after, dtype, (&mut *blocks, &asked)).await;
                let life = connection.life;
                self.pool.give_back(connection);
                (life, asked, fetched?)
            }
            None => {
                let identity = self.identity();
                let life = identity.life;
                // Compressed answers have a decoder of their own, and no versions.
                let asked = if self.is_compressed { vec![] } else { in_life(life) };
                let told = self.fetch_pieces((identity, after), dtype, (&mut *blocks, &asked)).await?;
                (life, asked, told)
            }
        };
        let (mut received, mut unchanged) = (0, 0);
        for (place, block) in blocks.iter().enumerate() {
            let n_bytes = block.values.len() * dtype.size();
            *(if is_held(&asked, place, told.get(place)) { &mut unchanged } else { &mut received }) +=
                n_bytes;
        }
        self.counters.received(received);
        self.counters.unchanged(unchanged);
        self.relied_on.fetch_max(after.0, Ordering::Relaxed);
        let version = |place: usize| Version { life, number: told.get(place).copied().unwrap_or_default() };
        Ok((0..held.len()).map(version).collect())
    }

    /// Hands over gradients; returns the last step applied.
    pub(crate) async fn push(
        &self,
        (step, rank): (Step, usize),
        dtype: Dtype,
        gradients: &Encoded,
    ) -> Result<Step, Status> {
        self.begun.fetch_max(step.0, Ordering::Relaxed);
        let applied = if let Some((mut connection, _turn)) = self.bulk_stream().await? {
            let pushed = connection.push((step, rank), dtype, gradients).await;
            self.pool.give_back(connection);
            pushed?
        } else {
            let head = PushHead {
                identity: Some(self.identity()),
                step: step.0,
                rank: rank as u32,
                dtype: dtype.message() as i32,
                blocks: gradients.iter().map(|(id, _)| block_id(*id)).collect(),
            };
            let pieces = stream::iter(push_pieces(head, gradients.clone()));
            Step(self.client().push(self.request(pieces)).await?.into_inner().applied)
        };
        self.counters.sent(gradients.iter().map(|(_, values)| values.len()).sum());
        self.relied_on.fetch_max(step.0, Ordering::Relaxed);
        Ok(applied)
    }

    /// Begins a save: when this returns, the blocks are held as they are after the step.
    pub(crate) async fn begin_save(&self, step: Step) -> Result<Streaming<SaveResponse>, Status> {
        let request = SaveRequest { identity: Some(self.identity()), step: step.0 };
        let mut answers = self.client().save(self.request(request)).await?.into_inner();
        match answers.message().await? {
            Some(_) => Ok(answers),
            None => Err(Status::internal("the save ended before it began")),
        }
    }

    pub(crate) async fn commit(&self, step: Step, record_json: Vec<String>) -> Result<(), Status> {
        let request = CommitRequest { identity: Some(self.identity.clone()), step: step.0, record_json };
        self.client().commit(self.request(request)).await.map(|_| ())
    }

    pub(crate) async fn restore(&self, step: Option<Step>) -> Result<Step, Status> {
        let request = RestoreRequest { identity: Some(self.identity.clone()), step: step.map(|step| step.0) };
        let RestoreResponse { step, life } = self.client().restore(self.request(request)).await?.into_inner();
        self.life.store(life, Ordering::Relaxed);
        self.relied_on.store(step, Ordering::Relaxed);
        self.begun.store(step, Ordering::Relaxed);
        Ok(Step(step))
    }

    async fn fetch_pieces(
        &self,
        (identity, after): (BankIdentity, Step),
        dtype: Dtype,
        (blocks, held): (&mut [Block], &[u64]),
    ) -> Result<Vec<u64>, Status> {
        let request = FetchRequest {
            identity: Some(identity),
            after: after.0,
            dtype: dtype.message() as i32,
            blocks: blocks.iter().map(|block| block_id(block.id)).collect(),
            held: held.to_vec(),
        };
        if !self.is_compressed {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let channel = self.channels[turn % self.channels.len()].clone();
            return direct::fetch(channel, self.authorization.clone(), &request, dtype, blocks).await;
        }
        let mut pieces = self.client().fetch(self.request(request)).await?.into_inner();
        for block in blocks {
            let n_bytes = block.values.len() * dtype.size();
            let mut offset = 0;
            while offset < n_bytes {
                let torn = |what: &str| {
                    Status::internal(format!("{what} at byte {offset} of {n_bytes} of block {}", block.id))
                };
                let piece = pieces.message().await?.ok_or_else(|| torn("the fetch ends"))?;
                let Payload::Bytes(payload) = piece.payload else { return Err(torn("a piece not decoded")) };
                let is_next = piece.id == block.id
                    && piece.total_bytes == n_bytes as u64
                    && piece.offset == offset as u64;
                let fits = !payload.is_empty() && payload.len() <= n_bytes - offset;
                if !(is_next && fits && payload.len().is_multiple_of(dtype.size())) {
                    return Err(torn(&format!("a piece of block {} at byte {}", piece.id, piece.offset)));
                }
                let first = offset / dtype.size();
                let to = &mut block.values[first..first + payload.len() / dtype.size()];
                match dtype {
                    Dtype::F32 => bytemuck::cast_slice_mut(to).copy_from_slice(&payload),
                    Dtype::Bf16 => to.iter_mut().zip(payload.as_chunks().0).for_each(|(to, from)| {
                        *to = bf16::from_le_bytes(*from).to_f32();
                    }),
                }
                offset += payload.len();
            }
        }
        match pieces.message().await? {
            None => Ok(vec![]),
            Some(piece) => {
                Err(Status::internal(format!("a piece of block {} that nobody asked for", piece.id)))
            }
        }
    }

    /// A bulk stream to use, if the shard has one.
    async fn bulk_stream(&self) -> Result<Option<(Connection, Turn)>, Status> {
        let Some(mut turn) = self.pool.turn().await else { return Ok(None) };
        if let Some(connection) = turn.connection.take() {
            return Ok(Some((connection, turn)));
        }
        let identity = self.identity();
        let life = identity.life;
        let request = OpenBulkRequest { identity: Some(identity) };
        let offer = self.client().open_bulk(self.request(request)).await?.into_inner();
        let port = u16::try_from(offer.port).unwrap_or_default();
        if port == 0 {
            self.pool.close();
            return Ok(None);
        }
        let opened = async {
            let stream = self.bulk.connect(&self.host, port).await.map_err(|error| error.to_string())?;
            Connection::open(stream, life, &offer).await.map_err(|error| error.to_string())
        };
        match opened.await {
            Ok(connection) => Ok(Some((connection, turn))),
            Err(error) => {
                tracing::warn!(shard = self.address, port, error, "no bulk stream, going on over gRPC");
                self.pool.fail();
                Ok(None)
            }
        }
    }

    /// What the shard must be, in the life that it was last met in.
    fn identity(&self) -> BankIdentity {
        BankIdentity { life: self.life.load(Ordering::Relaxed), ..self.identity.clone() }
    }

    /// The clients in turn: each has a connection of its own.
    fn client(&self) -> MemoryServiceClient<Channel> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.clients[turn % self.clients.len()].clone()
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        request
    }
}

/// A push as messages; its payloads are shared.
fn push_pieces(head: PushHead, gradients: Encoded) -> impl Iterator<Item = PushPiece> + Send + 'static {
    let head = PushPiece { head: Some(head), ..PushPiece::default() };
    let of_block = |(place, (_, values)): (usize, (ClusterId, Bytes))| {
        (0..values.len()).step_by(PIECE_BYTES).map(move |offset| PushPiece {
            head: None,
            block: place as u32,
            offset: offset as u64,
            payload: Payload::Bytes(values.slice(offset..(offset + PIECE_BYTES).min(values.len()))),
        })
    };
    [head].into_iter().chain(gradients.into_iter().enumerate().flat_map(of_block))
}

/// A gradient as it goes over the wire.
pub(crate) fn encode(block: Block, dtype: Dtype) -> (ClusterId, Bytes) {
    let bytes = match dtype {
        Dtype::F32 => Bytes::from_owner(Numbers(block.values)),
        Dtype::Bf16 => {
            let mut rounded = vec![bf16::ZERO; block.values.len()];
            rounded.convert_from_f32_slice(&block.values);
            Bytes::from_owner(Numbers(rounded))
        }
    };
    (block.id, bytes)
}

/// An array of numbers as bytes.
struct Numbers<T>(Vec<T>);

impl<T: bytemuck::NoUninit> AsRef<[u8]> for Numbers<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
