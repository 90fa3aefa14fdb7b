use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
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
                            Ok(stream) => {
                                drop(accepted.send(Held { stream, sent: 0, _permit: permit }).await)
                            }
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

/// A connection that counts as open until it is dropped. It gives way to others after every MiB that it
/// sends, so that a refusal and an answer about health never wait behind large blocks.
pub(crate) struct Held<S> {
    pub(crate) stream: S,
    /// Bytes sent since others had the thread.
    sent: usize,
    _permit: OwnedSemaphorePermit,
}

/// Bytes after which others have the thread, and the most that one call hands to the system: it copies
/// them before it returns.
const TURN_BYTES: usize = 1 << 20;
/// As many buffers are handed over at once.
const TURN_BUFS: usize = 16;

impl<S> Held<S> {
    /// Pending when this turn is over.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.sent < TURN_BYTES {
            return Poll::Ready(());
        }
        self.sent = 0;
        // Woken once the others had their turn and new events were looked for.
        pin!(tokio::task::yield_now()).poll(cx)
    }
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
        // While what was sent is on its way, and not before the next answer.
        ready!(self.poll_turn(cx));
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx));
        let n_bytes = ready!(Pin::new(&mut self.stream).poll_write(cx, &buf[..buf.len().min(TURN_BYTES)]))?;
        self.sent += n_bytes;
        Poll::Ready(Ok(n_bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx));
        let (mut turn, mut n_bufs, mut left) = ([IoSlice::new(&[]); TURN_BUFS], 0, TURN_BYTES);
        for (to, buf) in turn.iter_mut().zip(bufs.iter().filter(|buf| !buf.is_empty())) {
            *to = IoSlice::new(&buf[..buf.len().min(left)]);
            left -= to.len();
            n_bufs += usize::from(!to.is_empty());
        }
        let n_bytes = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &turn[..n_bufs]))?;
        self.sent += n_bytes;
        Poll::Ready(Ok(n_bytes))
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// In turns, and whatever buffers they come in: empty ones, more than go at once, and longer than a turn.
    #[tokio::test]
    async fn what_is_sent_in_turns_arrives_as_it_is() {
        let lens = [0, 5, 0, TURN_BYTES + 3, 0, 0, 2 * TURN_BYTES, 1].into_iter().chain([7; 40]);
        let parts: Vec<Vec<u8>> = lens.enumerate().map(|(i, len)| vec![i as u8; len]).collect();
        let (sent, mut received) = tokio::io::duplex(TURN_BYTES / 4);
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let mut held = Held { stream: sent, sent: 0, _permit: permit };
        let expected = parts.concat();
        let sending = async move {
            let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut rest = &mut slices[..];
            while !rest.is_empty() {
                let n_bytes = held.write_vectored(rest).await.unwrap();
                assert!(n_bytes > 0);
                IoSlice::advance_slices(&mut rest, n_bytes);
            }
            held.shutdown().await.unwrap();
        };
        let mut found = vec![];
        let (_, n_bytes) = tokio::join!(sending, received.read_to_end(&mut found));
        assert_eq!(n_bytes.unwrap(), expected.len());
        assert!(found == expected);
    }
}
