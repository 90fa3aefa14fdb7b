//! The peers of bench/shard in Rust: blocks over naive tonic unary calls, over framed TCP, and out of redis.
//!
//! `peers serve --lens N,…` serves blocks of so many f32 over tonic and framed TCP until its input ends, and prints
//! where. `peers fill redis://… --lens N,…` puts the same blocks into redis. `peers fetch WAY ADDRESS --lens N,…`
//! answers each line `LEVEL CLIENTS SECONDS` of its input by one line of JSON.

#[path = "../../../../crates/memory-service/examples/load/closed_loop.rs"]
mod closed_loop;

use std::sync::Arc;

use bytes::{Buf, Bytes};
use clap::{Parser, Subcommand, ValueEnum};
use closed_loop::{Client, N_BLOCKS, Result, answer_lines, check_first, input_ended, number, run};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

#[allow(clippy::all)]
mod pb {
    tonic::include_proto!("block");
}

use pb::blocks_client::BlocksClient;
use pb::blocks_server::{Blocks, BlocksServer};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Enough for any block.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
const WINDOW_BYTES: u32 = 16 << 20;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// Numbers of a block, by level.
    #[arg(long, global = true, value_delimiter = ',')]
    lens: Vec<usize>,
}

#[derive(Subcommand)]
enum Command {
    Serve,
    Fill { url: String },
    Fetch { way: Way, address: String, #[arg(long)] server_pid: u32 },
}

#[derive(Copy, Clone, ValueEnum)]
enum Way {
    Tonic,
    Raw,
    Redis,
}

fn main() -> Result<()> {
    let Args { command, lens } = Args::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    match command {
        Command::Serve => runtime.block_on(serve(&lens)),
        Command::Fill { url } => runtime.block_on(fill(&url, &lens)),
        Command::Fetch { way, address, server_pid } => answer_lines(|words| {
            let [level, clients, seconds] = words else { return Err("expected LEVEL CLIENTS SECONDS".into()) };
            let (level, n, seconds): (usize, usize, f64) = (level.parse()?, clients.parse()?, seconds.parse()?);
            let len = *lens.get(level).ok_or("no such level")?;
            runtime.block_on(async {
                let mut made: (Vec<Unary>, Vec<Framed>, Vec<Redis>) = Default::default();
                for _ in 0..n {
                    match way {
                        Way::Tonic => made.0.push(Unary::connect(&address, level).await?),
                        Way::Raw => made.1.push(Framed::connect(&address, level, len).await?),
                        Way::Redis => made.2.push(Redis::connect(&address, level).await?),
                    }
                }
                match way {
                    Way::Tonic => run(made.0, seconds, server_pid).await,
                    Way::Raw => run(made.1, seconds, server_pid).await,
                    Way::Redis => run(made.2, seconds, server_pid).await,
                }
            })
        }),
    }
}

/// A block's number among those of all levels.
fn id(level: usize, index: u32) -> u64 {
    (level as u64 * u64::from(N_BLOCKS)) + u64::from(index)
}

fn block(len: usize, index: u32) -> Bytes {
    (0..len).flat_map(|place| number(index, place).to_le_bytes()).collect::<Vec<u8>>().into()
}

fn first(bytes: &[u8]) -> f32 {
    bytes.first_chunk().map_or(f32::NAN, |bytes| f32::from_le_bytes(*bytes))
}

async fn serve(lens: &[usize]) -> Result<()> {
    let blocks = lens.iter().flat_map(|&len| (0..N_BLOCKS).map(move |index| block(len, index)));
    let blocks = Arc::new(blocks.collect::<Vec<Bytes>>());
    let (framed, unary) = (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
    println!("{}", json!({"raw": framed.local_addr()?.to_string(), "tonic": unary.local_addr()?.to_string()}));
    let shared = Arc::clone(&blocks);
    tokio::spawn(async move {
        while let Ok((stream, _)) = framed.accept().await {
            tokio::spawn(answer_framed(stream, Arc::clone(&shared)));
        }
    });
    let service = BlocksServer::new(Unaries(blocks))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES)
        .add_service(service)
        .serve_with_incoming_shutdown(TcpIncoming::from(unary).with_nodelay(Some(true)), input_ended())
        .await?;
    Ok(())
}

/// Asked for a u64, answers by a u32 and as many bytes, in one call to the system when the socket takes them.
async fn answer_framed(mut stream: TcpStream, blocks: Arc<Vec<Bytes>>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let block = blocks[stream.read_u64_le().await? as usize % blocks.len()].clone();
        let head = (block.len() as u32).to_le_bytes();
        stream.write_all_buf(&mut Buf::chain(&head[..], block)).await?;
    }
}

struct Unaries(Arc<Vec<Bytes>>);

#[tonic::async_trait]
impl Blocks for Unaries {
    async fn get(&self, request: Request<pb::GetRequest>) -> std::result::Result<Response<pb::Block>, Status> {
        let id = request.into_inner().id;
        let data = self.0.get(id as usize).cloned().ok_or_else(|| Status::not_found("no such block"))?;
        Ok(Response::new(pb::Block { id, data }))
    }
}

struct Unary(BlocksClient<Channel>, usize);

impl Unary {
    async fn connect(address: &str, level: usize) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(2 * WINDOW_BYTES)
            .tcp_nodelay(true);
        let client = BlocksClient::new(endpoint.connect().await?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self(client, level))
    }
}

impl Client for Unary {
    async fn fetch(&mut self, index: u32) -> Result<usize> {
        let block = self.0.get(pb::GetRequest { id: id(self.1, index) }).await?.into_inner();
        check_first(index, first(&block.data))?;
        Ok(block.data.len())
    }
}

struct Framed {
    stream: TcpStream,
    level: usize,
    /// Used again and again.
    block: Vec<u8>,
}

impl Framed {
    async fn connect(address: &str, level: usize, len: usize) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, level, block: vec![0; len * size_of::<f32>()] })
    }
}

impl Client for Framed {
    async fn fetch(&mut self, index: u32) -> Result<usize> {
        self.stream.write_u64_le(id(self.level, index)).await?;
        let n_bytes = self.stream.read_u32_le().await? as usize;
        self.stream.read_exact(&mut self.block[..n_bytes]).await?;
        check_first(index, first(&self.block))?;
        Ok(n_bytes)
    }
}

struct Redis(redis::aio::MultiplexedConnection, usize);

impl Redis {
    async fn connect(url: &str, level: usize) -> Result<Self> {
        Ok(Self(redis::Client::open(url)?.get_multiplexed_async_connection().await?, level))
    }
}

impl Client for Redis {
    async fn fetch(&mut self, index: u32) -> Result<usize> {
        let block: Vec<u8> = redis::cmd("GET").arg(id(self.1, index)).query_async(&mut self.0).await?;
        check_first(index, first(&block))?;
        Ok(block.len())
    }
}

async fn fill(url: &str, lens: &[usize]) -> Result<()> {
    let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    for (level, &len) in lens.iter().enumerate() {
        for index in 0..N_BLOCKS {
            let block: Vec<u8> = block(len, index).into();
            redis::cmd("SET").arg(id(level, index)).arg(block).query_async::<()>(&mut connection).await?;
        }
    }
    println!("{}", json!({"blocks": lens.len() as u32 * N_BLOCKS}));
    Ok(())
}
