use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::transport::server::Connected;

use crate::security::{Acceptor, Caller, Stream};

/// Accepts connections until the receiver is dropped, handshakes beside each other. Beyond `limit` open
/// ones, the next wait to be accepted.
pub(crate) fn accept(
    listener: TcpListener,
    acceptor: Acceptor,
    limit: usize,
) -> mpsc::Receiver<Held<Stream>> {
    let (accepted, connections) = mpsc::channel(16);
    let free = Arc::new(Semaphore::new(limit.clamp(1, Semaphore::MAX_PERMITS)));
    tokio::spawn(async move {
        loop {
            let permit = tokio::select! {
                permit = Arc::clone(&free).acquire_owned() => permit,
                () = accepted.closed() => return,
            };
            let Ok(permit) = permit else { return };
            let tcp = tokio::select! {
                tcp = listener.accept() => tcp,
                () = accepted.closed() => return,
            };
            match tcp {
                Ok((tcp, peer)) => {
                    let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
                    tokio::spawn(async move {
                        match acceptor.accept(tcp).await {
                            // Nobody takes it once the server stops.
                            Ok(stream) => drop(accepted.send(Held { stream, _permit: permit }).await),
                            Err(error) => tracing::warn!(%peer, %error, "connection refused"),
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, most likely: wait for some to be closed.
                    tracing::warn!(%error, "cannot accept connections");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    connections
}

/// A connection that counts as open until it is dropped.
pub(crate) struct Held<S> {
    pub(crate) stream: S,
    _permit: OwnedSemaphorePermit,
}

impl<S: Connected<ConnectInfo = Caller>> Connected for Held<S> {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Held<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
