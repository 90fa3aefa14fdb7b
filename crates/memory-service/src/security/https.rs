use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{Error, Reloading, Result, TlsFiles, tls};

/// The certificate of a server that anyone may connect to, who then shows an API key.
pub struct Https {
    config: Arc<ServerConfig>,
}

/// A certificate that follows its files.
pub type ReloadingHttps = Reloading<Https>;

impl Https {
    /// Reads a certificate and its key, both in PEM. The error names the one that is missing, expired, or of
    /// another certificate.
    pub fn read(cert: &Path, key: &Path) -> Result<Self> {
        let files = TlsFiles { cert: cert.to_owned(), key: key.to_owned(), ca: PathBuf::new() };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let chain = tls::certificates(&files.cert, SystemTime::now())?;
        let own = tls::own(&files, chain, &provider)?;
        let mut config = tls::server(own, WebPkiClientVerifier::no_client_auth(), provider)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { config: Arc::new(config) })
    }

    /// The same, read again whenever a file changes.
    pub fn reloading(cert: PathBuf, key: PathBuf) -> Result<ReloadingHttps> {
        Reloading::new(vec![cert.clone(), key.clone()], move || Self::read(&cert, &key))
    }
}

/// A connection that speaks HTTP, with or without TLS.
pub enum HttpStream {
    /// Without.
    Plain(TcpStream),
    /// With.
    Tls(Box<TlsStream<TcpStream>>),
}

impl HttpStream {
    /// Makes one of a connection that was accepted. A client has `limit` for the handshake of TLS: call it in
    /// a task for each connection, and bound the tasks.
    pub async fn accept(
        tcp: TcpStream,
        peer: SocketAddr,
        https: Option<&ReloadingHttps>,
        limit: Duration,
    ) -> Result<Self> {
        tcp.set_nodelay(true).map_err(Error::connection(peer))?;
        let Some(https) = https else { return Ok(Self::Plain(tcp)) };
        let config = Arc::clone(&https.current(Instant::now()).config);
        let handshake = timeout(limit, TlsAcceptor::from(config).accept(tcp)).await;
        let handshake = handshake.map_err(|_| Error::Timeout { peer: peer.to_string(), limit })?;
        Ok(Self::Tls(Box::new(handshake.map_err(Error::connection(peer))?)))
    }
}

impl AsyncRead for HttpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for HttpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
