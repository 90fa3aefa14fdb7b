use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use tonic::transport::server::Connected;

use super::{Caller, Error, Identity, Protocol, Result, Token};

/// A connection of either side, with or without TLS.
#[derive(Debug)]
pub struct Stream {
    io: Io,
    peer: SocketAddr,
    identity: Option<Identity>,
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// A connection without TLS.
    pub(super) fn plain(tcp: TcpStream, peer: SocketAddr) -> Self {
        Self { io: Io::Plain(tcp), peer, identity: None }
    }

    /// A connection after its handshake. Refuses a peer whose certificate has no identity, or who has
    /// not agreed on the protocol (TLS lets peers that do not name one pass).
    pub(super) fn tls(tls: TlsStream<TcpStream>, peer: SocketAddr, protocol: Protocol) -> Result<Self> {
        let (_, session) = tls.get_ref();
        let found = session.alpn_protocol().unwrap_or_default();
        if found != protocol.alpn().as_bytes() {
            let (peer, expected) = (peer.to_string(), protocol.alpn().to_owned());
            return Err(Error::Protocol { peer, expected, found: String::from_utf8_lossy(found).into() });
        }
        let certificate = session.peer_certificates().and_then(|chain| chain.first());
        // Both sides' verifiers ask for one; without it there is nothing to parse.
        let certificate = certificate.map_or(&[][..], |certificate| certificate.as_ref());
        let identity = Identity::of_certificate(certificate)
            .map_err(|source| Error::Peer { peer: peer.to_string(), source: Box::new(source) })?;
        Ok(Self { io: Io::Tls(Box::new(tls)), peer, identity: Some(identity) })
    }

    /// The address of the other side.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Whose certificate the other side has; `None` without TLS.
    pub fn peer_identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// The other side as one who asks. Nothing is allowed to it before [`Caller::with_token`] says what
    /// its token is worth.
    pub fn caller(&self) -> Caller {
        Caller { peer: self.peer, identity: self.identity.clone(), token: Token::NotRead }
    }

    /// The connection below.
    #[cfg(test)]
    pub(super) fn tcp(&self) -> &TcpStream {
        match &self.io {
            Io::Plain(tcp) => tcp,
            Io::Tls(tls) => tls.get_ref().0,
        }
    }
}

/// Handlers of gRPC find the [`Caller`] among the extensions of a request.
impl Connected for Stream {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller()
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Io::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Io::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_flush(cx),
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
