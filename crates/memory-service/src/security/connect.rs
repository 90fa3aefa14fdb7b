use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Error, Protocol, ReloadingTls, Result, Role, Stream};

/// Makes streams of the connections that a server accepts.
#[derive(Clone)]
pub struct Acceptor {
    /// The certificates; `None` for connections without TLS.
    pub tls: Option<Arc<ReloadingTls>>,
    /// What is spoken.
    pub protocol: Protocol,
    /// How long a client may be silent: in the handshake of TLS, and later until its system, asked
    /// whether the connection is still there, is taken for gone.
    pub silence: Duration,
}

impl Acceptor {
    /// Takes a connection, with TLS only from a client that shows a good certificate. Waits for that
    /// client: call it in a task for each connection, and bound the tasks.
    pub async fn accept(&self, tcp: TcpStream) -> Result<Stream> {
        let peer = tcp.peer_addr().map_err(Error::connection("a client that has gone"))?;
        tune(&tcp, peer, self.silence).map_err(Error::connection(peer))?;
        let Some(tls) = &self.tls else { return Ok(Stream::plain(tcp, peer)) };
        let config = tls.current(Instant::now().into_std()).server(self.protocol);
        let handshake = timeout(self.silence, TlsAcceptor::from(config).accept(tcp)).await;
        let handshake =
            handshake.map_err(|_| Error::Timeout { peer: peer.to_string(), limit: self.silence })?;
        Stream::tls(handshake.map_err(Error::connection(peer))?.into(), peer, self.protocol)
    }
}

/// Connects to servers.
#[derive(Clone)]
pub struct Connector {
    /// The certificates; `None` for connections without TLS.
    pub tls: Option<Arc<ReloadingTls>>,
    /// What is spoken.
    pub protocol: Protocol,
    /// The time that a connection has, from the name of the host to the end of the handshake of TLS.
    pub timeout: Duration,
    /// How long the server's system may be silent, asked whether the connection is still there.
    pub silence: Duration,
}

impl Connector {
    /// Connects to a host: a DNS name, or an address, with or without the brackets of IPv6. With TLS,
    /// its certificate must be one of a shard, for this host.
    ///
    /// A server that refuses the own certificate says so only when the stream is first read: in TLS 1.3
    /// the client is done before the server has looked at it.
    pub async fn connect(&self, host: &str, port: u16) -> Result<Stream> {
        let attempt = timeout(self.timeout, self.connect_without_limit(host, port)).await;
        attempt.unwrap_or_else(|_| Err(Error::Timeout { peer: named(host, port), limit: self.timeout }))
    }

    async fn connect_without_limit(&self, host: &str, port: u16) -> Result<Stream> {
        let failed = || Error::connection(named(host, port));
        let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let tcp = TcpStream::connect((host, port)).await.map_err(failed())?;
        let peer = tcp.peer_addr().map_err(failed())?;
        tune(&tcp, peer, self.silence).map_err(failed())?;
        let Some(tls) = &self.tls else { return Ok(Stream::plain(tcp, peer)) };
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::Host { found: host.chars().take(300).collect() })?;
        let config = tls.current(Instant::now().into_std()).client(self.protocol);
        let tls = TlsConnector::from(config).connect(name, tcp).await.map_err(failed())?;
        let stream = Stream::tls(tls.into(), peer, self.protocol)?;
        // An authority that does not know our roles may let any certificate be a server's.
        match stream.peer_identity() {
            Some(found) if found.role() != Role::Shard => {
                Err(Error::NotAShard { peer: named(host, port), found: found.clone() })
            }
            _ => Ok(stream),
        }
    }
}

/// Sends what is written at once, and finds out about a peer that is gone without a word: its system is
/// asked when a connection is idle, and must acknowledge what is sent.
///
/// A system whose congestion control is BBR paces what it sends, over loopback too, where there is no
/// congestion: there, one without pacing is chosen.
fn tune(tcp: &TcpStream, peer: SocketAddr, silence: Duration) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    // The system counts in whole seconds, up to 32,767: half of the time idle, then three questions.
    let pause = |part: u64| Duration::from_secs((silence.as_secs() / part).clamp(1, 32_767));
    let asked = TcpKeepalive::new().with_time(pause(2)).with_interval(pause(6));
    #[cfg(target_os = "linux")]
    let asked = asked.with_retries(3);
    SockRef::from(tcp).set_tcp_keepalive(&asked)?;
    #[cfg(target_os = "linux")]
    SockRef::from(tcp).set_tcp_user_timeout(Some(silence))?;
    #[cfg(target_os = "linux")]
    if peer.ip().to_canonical().is_loopback() {
        // Every Linux has it; without it, what is sent arrives all the same.
        let _ = SockRef::from(tcp).set_tcp_congestion(b"reno");
    }
    Ok(())
}

/// A server as messages name it.
fn named(host: &str, port: u16) -> String {
    format!("{host}:{port}")
}
