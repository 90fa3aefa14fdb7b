//! Workers that are processes, here or elsewhere. They find each other through rank 0: each tells it where
//! it listens, and is told where all others do. Then everyone connects to the ranks below its own.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::link::link;
use crate::stream::{Side, Stream, refusal};
use crate::{Error, Mesh, Result};

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
    /// Certificates of both sides; without them connections are not encrypted, and whoever knows the job's
    /// name is taken for a worker.
    pub tls: Option<TlsConfigs>,
    /// How long to wait for the others to come.
    pub join: Duration,
    /// Set by who wants to wait no longer.
    pub stop: Arc<AtomicBool>,
    /// After how long without a byte a worker that is waited for is late.
    pub patience: Duration,
}

/// TLS of a worker's connections, ready made: which certificates it accepts is not decided here.
#[derive(Clone, Debug)]
pub struct TlsConfigs {
    /// For those that it accepts.
    pub server: Arc<rustls::ServerConfig>,
    /// For those that it makes.
    pub client: Arc<rustls::ClientConfig>,
}

/// Whether rank 0, at this `host:port`, is reached by workers of its own machine only.
pub fn is_on_this_machine(master: &str) -> bool {
    let (host, _) = master.rsplit_once(':').unwrap_or((master, ""));
    host == "localhost"
        || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_loopback())
}

/// Between two tries to connect, or two looks for who does.
const PAUSE: Duration = Duration::from_millis(20);
/// How long one who has connected may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// How long one try to connect may take: a network that drops packets now may not a little later.
const CONNECT: Duration = Duration::from_secs(10);
/// How many may be about to say who they are at once.
const MOST_GREETING: usize = 1024;
/// How long workers that all have come may take to connect to each other.
const CONNECTING: Duration = Duration::from_secs(30);

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
    let link = |stream: Option<Stream>| stream.map(|stream| link(stream, options.patience)).transpose();
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

    /// Of a connection: a certificate that is not accepted now will not be in a moment.
    fn by(error: &io::Error, what: &str) -> Self {
        refusal(error).map_or_else(|| Self::for_now(format!("{what}: {error}")), Self::from)
    }
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self { reason, is_transient: false }
    }
}

/// Connections by rank; `None` for one's own.
type Streams = Vec<Option<Stream>>;

/// What a worker has once rank 0 knows it: a connection to that, where it listens, and where the others do.
type Introduced = (Stream, TcpListener, Vec<SocketAddr>);

/// What joining gives, or why it does not.
type Joined<T> = std::result::Result<T, Failed>;

/// Who has come, and from where.
type Met = (io::Result<(Hello, Stream)>, SocketAddr);

struct Joining<'a> {
    options: &'a TcpOptions,
    deadline: Instant,
}

impl Joining<'_> {
    /// Rank 0 waits for all others, and tells each where the rest are.
    fn lead(&self) -> Joined<Streams> {
        let listener = self.listen()?;
        let mut streams: Streams = (0..self.options.world_size).map(|_| None).collect();
        let mut addresses = vec![None; self.options.world_size];
        self.accept(&listener, &mut streams, 1.., |rank, address| addresses[rank] = Some(address))?;
        let peers: Vec<SocketAddr> = addresses.into_iter().flatten().collect();
        for stream in streams.iter_mut().flatten() {
            stream.greet(&Answer::Peers(peers.clone())).map_err(text)?;
        }
        Ok(streams)
    }

    /// Where the others come to; whoever had the port before may need a moment to let go of it. An address
    /// that is this machine's is listened on alone; behind a name or a forwarded address all are.
    fn listen(&self) -> std::result::Result<TcpListener, String> {
        let master = &self.options.master;
        let (host, port) = master.rsplit_once(':').unwrap_or((master, ""));
        let ip = host.trim_matches(['[', ']']).parse::<IpAddr>();
        let mut address = match ip {
            Ok(_) => master.clone(),
            Err(_) if is_on_this_machine(master) => master.clone(),
            Err(_) => format!("{}:{port}", Ipv4Addr::UNSPECIFIED),
        };
        loop {
            match TcpListener::bind(&address) {
                Ok(listener) => return Ok(listener),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    self.left().map_err(|waited| format!("{waited}: {error}"))?;
                    std::thread::park_timeout(PAUSE);
                }
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && address == *master => {
                    address = match ip {
                        Ok(IpAddr::V6(_)) => format!("[{}]:{port}", Ipv6Addr::UNSPECIFIED),
                        _ => format!("{}:{port}", Ipv4Addr::UNSPECIFIED),
                    };
                }
                Err(error) => return Err(format!("{address}: {error}")),
            }
        }
    }

    fn follow(&self) -> Joined<Streams> {
        let TcpOptions { rank, world_size, master, .. } = self.options;
        let (first, listener, peers) = loop {
            match self.introduce(master) {
                Ok(introduced) => break introduced,
                Err(Failed { reason, is_transient: true }) => {
                    self.left().map_err(|waited| format!("{waited}: {reason}"))?;
                    std::thread::park_timeout(PAUSE);
                }
                Err(failed) => return Err(failed),
            }
        };
        let mut streams: Streams = (0..*world_size).map(|_| None).collect();
        streams[0] = Some(first);
        // All have come. One that is gone since is missed by rank 0 too, which begins anew.
        let connecting =
            Joining { options: self.options, deadline: self.deadline.min(Instant::now() + CONNECTING) };
        let for_now = |failed: Failed| Failed::for_now(failed.reason);
        for (low, peer) in (1..*rank).zip(&peers) {
            let mut stream = connecting.connect(peer).map_err(for_now)?;
            stream.greet(&self.hello(0)).map_err(text).map_err(Failed::for_now)?;
            streams[low] = Some(stream);
        }
        connecting.accept(&listener, &mut streams, rank + 1.., |_, _| ()).map_err(Failed::for_now)?;
        Ok(streams)
    }

    /// Tells rank 0 who this is, and learns where the others are.
    fn introduce(&self, master: &String) -> Joined<Introduced> {
        let mut first = self.connect(master)?;
        // The interface by which rank 0 is reached: it tells the others its address.
        let ip: IpAddr = first.tcp().local_addr().map_err(text)?.ip();
        let listener = TcpListener::bind((ip, 0)).map_err(text)?;
        let port = listener.local_addr().map_err(text)?.port();
        match first.greet(&self.hello(port)).and_then(|()| first.greeting(self.deadline)) {
            Ok(Answer::Peers(peers)) => Ok((first, listener, peers)),
            Ok(Answer::No(reason)) => Err(reason.into()),
            Ok(Answer::Later(reason)) => Err(Failed::for_now(reason)),
            // Rank 0 is gone, and may be there again.
            Err(error) => Err(Failed::by(&error, "no answer from rank 0")),
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

    /// Connects, as often as it takes.
    fn connect(&self, to: &(impl ToSocketAddrs + ToString)) -> Joined<Stream> {
        let shake_hands = |tcp| {
            Stream::open(tcp, self.options.tls.as_ref(), (Side::Connects, self.deadline))
                .map_err(|error| Failed::by(&error, "no TLS there"))
        };
        loop {
            // A name may not be known yet.
            let error = match to.to_socket_addrs().map(|mut found| found.next()) {
                Ok(Some(address)) => {
                    // When no time is left the last try tells why.
                    let limit = self.left().unwrap_or(PAUSE).min(CONNECT);
                    match TcpStream::connect_timeout(&address, limit) {
                        Ok(tcp) => return shake_hands(tcp),
                        Err(error) => error.to_string(),
                    }
                }
                Ok(None) => format!("{}: no address", to.to_string()),
                Err(error) => format!("{}: {error}", to.to_string()),
            };
            self.left().map_err(|waited| format!("{waited}: {error}"))?;
            std::thread::park_timeout(PAUSE);
        }
    }

    /// Takes in the workers of `ranks`, in whatever order they come. Each says who it is in a thread of its
    /// own: what comes to an open port may be anything, and say nothing for long.
    fn accept(
        &self,
        listener: &TcpListener,
        streams: &mut Streams,
        ranks: std::ops::RangeFrom<usize>,
        mut came: impl FnMut(usize, SocketAddr),
    ) -> std::result::Result<(), String> {
        listener.set_nonblocking(true).map_err(text)?;
        let (greeted, greetings) = channel();
        let (mut n_greeting, mut refused) = (0, String::new());
        loop {
            // One that has ended before all were here is missing again.
            streams[ranks.start..]
                .iter_mut()
                .for_each(|stream| drop(stream.take_if(|stream| has_ended(stream.tcp()))));
            let missing: Vec<usize> =
                (ranks.start..streams.len()).filter(|&rank| streams[rank].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            // Also while others come again and again.
            self.left().map_err(|waited| format!("{waited} for ranks {missing:?}{refused}"))?;
            match listener.accept() {
                Ok((tcp, from)) if n_greeting < MOST_GREETING => {
                    tcp.set_nonblocking(false).map_err(text)?;
                    self.meet(tcp, from, Sender::clone(&greeted)).map_err(text)?;
                    n_greeting += 1;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // One that has gone before it was looked at, say.
                Err(error) => refused = format!("; last came {error}"),
            }
            let Ok((found, from)) = greetings.recv_timeout(PAUSE) else { continue };
            n_greeting -= 1;
            match found {
                Ok((hello, mut stream)) => match self.check(&hello, &missing) {
                    None => {
                        came(hello.rank, SocketAddr::new(from.ip(), hello.port));
                        streams[hello.rank] = Some(stream);
                    }
                    Some(answer) => drop(stream.greet(&answer)),
                },
                // What is no greeting is no worker: a scan of ports, say.
                Err(error) => {
                    let reason = refusal(&error).unwrap_or_else(|| error.to_string());
                    refused = format!("; {from} was not taken in: {reason}");
                }
            }
        }
    }

    /// Hears who has come.
    fn meet(&self, tcp: TcpStream, from: SocketAddr, greeted: Sender<Met>) -> io::Result<()> {
        let tls = self.options.tls.clone();
        let meet = move || {
            let until = Instant::now() + GREETING;
            tcp.set_write_timeout(Some(GREETING))?;
            let mut stream = Stream::open(tcp, tls.as_ref(), (Side::Accepts, until))?;
            Ok((stream.greeting::<Hello>(until)?, stream))
        };
        // Nobody may wait for it any more.
        let thread = std::thread::Builder::new().name("meet".into());
        thread.spawn(move || drop(greeted.send((meet(), from)))).map(drop)
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

fn text(error: io::Error) -> String {
    error.to_string()
}
