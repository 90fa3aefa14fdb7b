//! Workers that are processes, here or elsewhere. They find each other through rank 0: each tells it where
//! it listens, and is told where all others do. Then everyone connects to the ranks below its own.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::mesh::{Frame, Link, Sending};
use crate::{Call, Error, Mesh, Result};

/// How a worker finds the others.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// This worker, from 0.
    pub rank: usize,
    /// Workers.
    pub world_size: usize,
    /// `host:port` where rank 0 listens.
    pub master: String,
    /// What the job is: a worker of another one, perhaps left over, is refused.
    pub job: String,
    /// How long to wait for the others to come.
    pub join: Duration,
    /// Set by who wants to wait no longer.
    pub stop: Arc<AtomicBool>,
    /// After how long without a byte a worker that is waited for is late.
    pub patience: Duration,
}

/// Between two tries to connect, or two looks for who does.
const PAUSE: Duration = Duration::from_millis(20);
/// How long one who has connected may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// How long workers that all have come may take to connect to each other.
const CONNECTING: Duration = Duration::from_secs(30);
/// Longest greeting.
const MAX_GREETING: usize = 1 << 20;
/// Frames that may wait to be sent.
const QUEUE: usize = 8;
/// A message may be as long as this: what is longer is no message.
const MAX_MESSAGE: u64 = 1 << 40;

/// What a worker says first, to rank 0 and to every other.
#[derive(Serialize, Deserialize)]
struct Hello {
    job: String,
    rank: usize,
    world_size: usize,
    /// Where it listens.
    port: u16,
}

/// What it is answered.
#[derive(Serialize, Deserialize)]
enum Answer {
    /// Where ranks 1 and up listen, in order, once all are here.
    Peers(Vec<SocketAddr>),
    /// What is wrong with it.
    No(String),
    /// Another of its rank is here, and has not been seen to end.
    Later(String),
}

/// Joins a job: returns once all its workers are connected.
///
/// # Errors
/// When the others do not come in time, or say that this worker is none of theirs.
pub fn join(options: &TcpOptions) -> Result<Mesh> {
    let TcpOptions { rank, world_size, .. } = *options;
    if world_size == 0 || rank >= world_size {
        let expected = format!("a rank below the world size {world_size}");
        return Err(Error::Setting { field: "rank", expected, found: rank.to_string() });
    }
    if world_size == 1 {
        return Ok(Mesh::alone());
    }
    let failed = |Failed { reason, is_transient }: Failed| {
        let address = options.master.clone();
        Error::Join { rank, address, reason, is_transient }
    };
    let joining = Joining { options, deadline: Instant::now() + options.join };
    let streams = if rank == 0 { joining.lead() } else { joining.follow() }.map_err(failed)?;
    let link = |stream: Option<TcpStream>| stream.map(|stream| link(stream, options.patience)).transpose();
    let links = streams.into_iter().map(link).collect::<io::Result<_>>();
    Ok(Mesh::new(rank, links.map_err(|error| failed(error.to_string().into()))?, options.patience))
}

/// Why a worker does not join, and whether it may when it tries again.
struct Failed {
    reason: String,
    is_transient: bool,
}

impl Failed {
    fn for_now(reason: String) -> Self {
        Self { reason, is_transient: true }
    }
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self { reason, is_transient: false }
    }
}

/// Connections by rank; `None` for one's own.
type Streams = Vec<Option<TcpStream>>;

/// What a worker has once rank 0 knows it, or why that may still come.
type Introduced = std::result::Result<(TcpStream, TcpListener, Vec<SocketAddr>), String>;

struct Joining<'a> {
    options: &'a TcpOptions,
    deadline: Instant,
}

impl Joining<'_> {
    /// Rank 0 waits for all others, and tells each where the rest are.
    fn lead(&self) -> std::result::Result<Streams, Failed> {
        let listener = self.listen()?;
        let mut streams: Streams = (0..self.options.world_size).map(|_| None).collect();
        let mut addresses = vec![None; self.options.world_size];
        self.accept(&listener, &mut streams, 1.., |rank, address| addresses[rank] = Some(address))?;
        let peers: Vec<SocketAddr> = addresses.into_iter().flatten().collect();
        for stream in streams.iter_mut().flatten() {
            write_greeting(stream, &Answer::Peers(peers.clone()))?;
        }
        Ok(streams)
    }

    /// The port that the others are told, on every address of this machine unless they are all on it.
    fn bind_address(&self) -> String {
        let master = &self.options.master;
        let (host, port) = master.rsplit_once(':').unwrap_or((master, ""));
        let is_here = host == "localhost"
            || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        if is_here { master.clone() } else { format!("0.0.0.0:{port}") }
    }

    /// Where the others come to; whoever had the port before may need a moment to let go of it.
    fn listen(&self) -> std::result::Result<TcpListener, String> {
        loop {
            match TcpListener::bind(self.bind_address()) {
                Ok(listener) => return Ok(listener),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    self.left().map_err(|waited| format!("{waited}: {error}"))?;
                    std::thread::park_timeout(PAUSE);
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn follow(&self) -> std::result::Result<Streams, Failed> {
        let TcpOptions { rank, world_size, master, .. } = self.options;
        let (first, listener, peers) = loop {
            match self.introduce(master)? {
                Ok(introduced) => break introduced,
                Err(reason) => {
                    self.left().map_err(|waited| format!("{waited}: {reason}"))?;
                    std::thread::park_timeout(PAUSE);
                }
            }
        };
        first.set_read_timeout(None).map_err(|error| error.to_string())?;
        let mut streams: Streams = (0..*world_size).map(|_| None).collect();
        streams[0] = Some(first);
        // All have come. One that is gone since is missed by rank 0 too, which begins anew.
        let connecting =
            Joining { options: self.options, deadline: self.deadline.min(Instant::now() + CONNECTING) };
        for (low, peer) in (1..*rank).zip(&peers) {
            let mut stream = connecting.connect(peer).map_err(Failed::for_now)?;
            write_greeting(&mut stream, &self.hello(0)).map_err(Failed::for_now)?;
            streams[low] = Some(stream);
        }
        connecting.accept(&listener, &mut streams, rank + 1.., |_, _| ()).map_err(Failed::for_now)?;
        Ok(streams)
    }

    /// Tells rank 0 who this is, and learns where the others are: the connection, where this one listens, and
    /// theirs. The inner error is one that may pass.
    fn introduce(&self, master: &String) -> std::result::Result<Introduced, String> {
        let mut first = self.connect(master)?;
        let ip: IpAddr = first.local_addr().map_err(|error| error.to_string())?.ip();
        let listener = TcpListener::bind((ip, 0)).map_err(|error| error.to_string())?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        write_greeting(&mut first, &self.hello(port))?;
        first.set_read_timeout(Some(self.left()?)).map_err(|error| error.to_string())?;
        match read_greeting::<Answer>(&mut first) {
            Ok(Answer::Peers(peers)) => Ok(Ok((first, listener, peers))),
            Ok(Answer::No(reason)) => Err(reason),
            Ok(Answer::Later(reason)) => Ok(Err(reason)),
            // Rank 0 is gone, and may be there again.
            Err(error) => Ok(Err(format!("no answer from rank 0: {error}"))),
        }
    }

    fn hello(&self, port: u16) -> Hello {
        let TcpOptions { rank, world_size, ref job, .. } = *self.options;
        Hello { job: job.clone(), rank, world_size, port }
    }

    fn left(&self) -> std::result::Result<Duration, String> {
        if self.options.stop.load(Ordering::Relaxed) {
            return Err("told to stop".to_owned());
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(format!("waited {} s", self.options.join.as_secs())),
            false => Ok(left),
        }
    }

    fn connect(&self, to: &(impl ToSocketAddrs + ToString)) -> std::result::Result<TcpStream, String> {
        loop {
            // A name may not be known yet.
            let error = match to.to_socket_addrs().map(|mut found| found.next()) {
                Ok(Some(address)) => match TcpStream::connect_timeout(&address, self.left()?) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => error.to_string(),
                },
                Ok(None) => format!("{}: no address", to.to_string()),
                Err(error) => format!("{}: {error}", to.to_string()),
            };
            self.left().map_err(|waited| format!("{waited}: {error}"))?;
            std::thread::park_timeout(PAUSE);
        }
    }

    /// Takes in the workers of `ranks`, in whatever order they come.
    fn accept(
        &self,
        listener: &TcpListener,
        streams: &mut Streams,
        ranks: std::ops::RangeFrom<usize>,
        mut came: impl FnMut(usize, SocketAddr),
    ) -> std::result::Result<(), String> {
        let text = |error: io::Error| error.to_string();
        listener.set_nonblocking(true).map_err(text)?;
        loop {
            // One that has ended before all were here is missing again.
            streams[ranks.start..]
                .iter_mut()
                .for_each(|stream| drop(stream.take_if(|stream| has_ended(stream))));
            let missing: Vec<usize> =
                (ranks.start..streams.len()).filter(|&rank| streams[rank].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            match listener.accept() {
                Ok((mut stream, from)) => {
                    stream.set_nonblocking(false).map_err(text)?;
                    stream.set_read_timeout(Some(self.left()?.min(GREETING))).map_err(text)?;
                    // What is no greeting is no worker: a scan of ports, say.
                    let Ok(hello) = read_greeting::<Hello>(&mut stream) else { continue };
                    match self.check(&hello, &missing) {
                        None => {
                            came(hello.rank, SocketAddr::new(from.ip(), hello.port));
                            streams[hello.rank] = Some(stream);
                        }
                        Some(answer) => drop(write_greeting(&mut stream, &answer)),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.left().map_err(|waited| format!("{waited} for ranks {missing:?}"))?;
                    std::thread::park_timeout(PAUSE);
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// What is wrong with a worker; `None` with one that is taken in.
    fn check(&self, hello: &Hello, missing: &[usize]) -> Option<Answer> {
        let TcpOptions { world_size, ref job, .. } = *self.options;
        if hello.job != *job {
            let text = format!("the job here is {job}, and that of rank {} is {}", hello.rank, hello.job);
            return Some(Answer::No(text));
        }
        if hello.world_size != world_size {
            let found = hello.world_size;
            let text = format!("{world_size} workers are expected here, and {found} by rank {}", hello.rank);
            return Some(Answer::No(text));
        }
        if !missing.contains(&hello.rank) {
            let text = format!("rank {} is here already, or is none; missing are {missing:?}", hello.rank);
            return Some(Answer::Later(text));
        }
        None
    }
}

/// Whether the other end has been closed, as far as is known: before the mesh is made nothing else comes.
fn has_ended(stream: &TcpStream) -> bool {
    let look = || {
        stream.set_nonblocking(true)?;
        let found = stream.peek(&mut [0]);
        stream.set_nonblocking(false)?;
        found
    };
    match look() {
        Ok(n) => n == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

fn write_greeting(stream: &mut TcpStream, greeting: &impl Serialize) -> std::result::Result<(), String> {
    let text = serde_json::to_vec(greeting).map_err(|error| error.to_string())?;
    let bytes = [&(text.len() as u32).to_le_bytes(), text.as_slice()].concat();
    stream.write_all(&bytes).map_err(|error| error.to_string())
}

fn read_greeting<T: DeserializeOwned>(stream: &mut TcpStream) -> io::Result<T> {
    let mut n_bytes = [0; 4];
    stream.read_exact(&mut n_bytes)?;
    let n_bytes = u32::from_le_bytes(n_bytes) as usize;
    if n_bytes > MAX_GREETING {
        return Err(invalid(format!("a greeting of {n_bytes} bytes, expected at most {MAX_GREETING}")));
    }
    let mut text = vec![0; n_bytes];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Length of the call's name u16, step u64, bytes u64. Without a name the payload is why the sender gave up, and
/// the step is 1 when that is final, or 2 when it has not and is at work.
const HEAD_BYTES: usize = 18;
const ALIVE: u64 = 2;

/// A connection with a thread that sends on it and one that receives.
fn link(stream: TcpStream, patience: Duration) -> io::Result<Link> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(None)?;
    // Of every single write: a long message may take longer, as long as it goes on.
    stream.set_write_timeout(Some(patience))?;
    let (queue, frames) = sync_channel(QUEUE);
    let (arrived, arriving) = sync_channel(QUEUE);
    let (out, mut reader) = (
        stream.try_clone()?,
        Reader { stream: stream.try_clone()?, heard: Arc::default(), began: Instant::now() },
    );
    let clock = (Arc::clone(&reader.heard), reader.began);
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    let sending = thread("send").spawn(move || send_all(out, frames))?;
    let receiving = thread("receive").spawn(move || {
        loop {
            // Of one that is only alive the reader has noted all there is.
            let Some(frame) = reader.frame().transpose() else { continue };
            let is_last = frame.is_err();
            // Nobody takes it any more: the connection is closed.
            if arrived.send(frame).is_err() || is_last {
                break;
            }
        }
    })?;
    let threads = Threads { stream, queue: Some(queue), sending: Some(sending), receiving: Some(receiving) };
    Ok(Link::new(Box::new(threads), arriving, clock))
}

/// The owner's end of a connection.
struct Threads {
    stream: TcpStream,
    /// `None` says that this worker is at work.
    queue: Option<SyncSender<Option<Frame>>>,
    sending: Option<JoinHandle<()>>,
    receiving: Option<JoinHandle<()>>,
}

impl Sending for Threads {
    fn send(&mut self, frame: Frame) {
        if let Some(queue) = &self.queue {
            let _ = queue.send(Some(frame));
        }
    }

    fn is_alive(&mut self) {
        if let Some(queue) = &self.queue {
            // What waits to be sent says as much.
            let _ = queue.try_send(None);
        }
    }
}

impl Drop for Threads {
    /// What is queued is still sent: the others may wait for it.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(sending) = self.sending.take() {
            let _ = sending.join();
        }
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        // The other thread ends by that, or with the channel that is dropped after this.
        drop(self.receiving.take());
    }
}

/// Takes frames off a connection, and notes when it last heard anything.
struct Reader {
    stream: TcpStream,
    heard: Arc<AtomicU64>,
    began: Instant,
}

impl Reader {
    /// `None` of one that says that the other is at work.
    fn frame(&mut self) -> io::Result<Option<Frame>> {
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head)?;
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let (n_what, step, n_bytes) = (u16::from_le_bytes([head[0], head[1]]), u64_at(2), u64_at(10));
        if n_bytes > MAX_MESSAGE {
            return Err(invalid(format!("a message of {n_bytes} bytes, expected at most {MAX_MESSAGE}")));
        }
        let mut what = vec![0; usize::from(n_what)];
        self.fill(&mut what)?;
        let what = String::from_utf8(what).map_err(|error| invalid(error.to_string()))?;
        let mut payload = vec![0; n_bytes as usize];
        self.fill(&mut payload)?;
        Ok(match what.is_empty() {
            true if step == ALIVE => None,
            true => {
                let reason = String::from_utf8_lossy(&payload).into_owned();
                Some(Frame::GiveUp { reason, is_final: step != 0 })
            }
            false => Some(Frame::Message(Call { what, step }, payload.into())),
        })
    }

    fn fill(&mut self, mut rest: &mut [u8]) -> io::Result<()> {
        while !rest.is_empty() {
            match self.stream.read(rest) {
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
                }
                Ok(n) => {
                    self.heard.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
                    rest = &mut rest[n..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn send_all(mut stream: TcpStream, frames: Receiver<Option<Frame>>) {
    let mut send = |frame: Option<Frame>| {
        let (what, step, payload) = match frame {
            Some(Frame::Message(Call { what, step }, payload)) => (what, step, payload),
            Some(Frame::GiveUp { reason, is_final }) => (String::new(), u64::from(is_final), reason.into()),
            None => (String::new(), ALIVE, Bytes::new()),
        };
        let mut head = Vec::with_capacity(HEAD_BYTES + what.len());
        head.extend((what.len() as u16).to_le_bytes());
        head.extend(step.to_le_bytes());
        head.extend((payload.len() as u64).to_le_bytes());
        head.extend(what.as_bytes());
        stream.write_all(&head)?;
        stream.write_all(&payload)
    };
    // Who receives sees that the connection is broken.
    let _ = frames.into_iter().try_for_each(&mut send);
    let _ = stream.shutdown(std::net::Shutdown::Write);
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
