//! Connections: accepted within a bound, with time limits on what a client is slow at, and finished at the end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use memory_service::security::{HttpStream, ReloadingHttps};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};

use super::app::App;
use super::{HttpLimits, router};

/// Bytes of the head of a request.
const MAX_HEAD: usize = 64 << 10;
/// Lines of a head.
const MAX_HEADERS: usize = 100;

/// Serves a run until `shutdown`. From then on `/ready` fails and nothing is accepted; requests that are under way
/// have `grace_s` to finish.
pub async fn serve(
    app: App,
    listener: TcpListener,
    https: Option<Arc<ReloadingHttps>>,
    shutdown: impl Future<Output = ()>,
) {
    let limits = app.served().limits.clone();
    let free = Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS)));
    let (stop, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let router = router(app.clone());
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = accept(&listener, &free) => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((tcp, peer, permit)) => {
                let client = Client { tcp, peer, https: https.clone(), limits: limits.clone() };
                let (router, stopped) = (router.clone(), stopped.clone());
                connections.spawn(async move {
                    client.serve(router, stopped).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: wait for some to be closed.
                tracing::warn!(%error, "cannot accept connections");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    app.end();
    // Connections hold a receiver while they are open; there may be none.
    let _ = stop.send(true);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if timeout(Duration::from_secs(limits.grace_s), all_ended).await.is_err() {
        tracing::warn!(open = connections.len(), "requests that were not done in time are cut off");
        connections.shutdown().await;
    }
}

/// The next connection, once one more may be open.
async fn accept(
    listener: &TcpListener,
    free: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = Arc::clone(free).acquire_owned().await.map_err(io::Error::other)?;
    let (tcp, peer) = listener.accept().await?;
    Ok((tcp, peer, permit))
}

/// A connection that was accepted.
struct Client {
    tcp: TcpStream,
    peer: SocketAddr,
    https: Option<Arc<ReloadingHttps>>,
    limits: HttpLimits,
}

impl Client {
    async fn serve(self, router: Router, mut stopped: watch::Receiver<bool>) {
        let Self { tcp, peer, https, limits } = self;
        let header = Duration::from_secs(limits.header_s);
        let stream = match HttpStream::accept(tcp, peer, https.as_deref(), header).await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%peer, %error, "connection refused");
                return;
            }
        };
        let io = Timed { io: stream, limit: Duration::from_secs(limits.write_s), waits: None };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(header)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(io), TowerToHyperService::new(router));
        let mut connection = pin!(connection);
        // A sender that is gone is the end too.
        let told = async { drop(stopped.wait_for(|stopped| *stopped).await) };
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = told => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "connection ended early");
        }
    }
}

/// A connection whose client must take what it is sent within a time, or it is closed.
struct Timed<S> {
    io: S,
    limit: Duration,
    /// Runs out while nothing can be written.
    waits: Option<Pin<Box<Sleep>>>,
}

impl<S> Timed<S> {
    fn within<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waits = None;
            return written;
        }
        let limit = self.limit;
        let waits = self.waits.get_or_insert_with(|| Box::pin(sleep(limit)));
        match waits.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.within(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.within(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.io).poll_shutdown(cx);
        self.within(cx, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up_and_a_slow_one_is_not() {
        let limit = Duration::from_secs(3);
        let (ours, mut theirs) = tokio::io::duplex(4);
        let mut io = Timed { io: ours, limit, waits: None };
        let slow = async {
            let mut taken = [0; 4];
            for _ in 0..25 {
                sleep(Duration::from_secs(2)).await;
                tokio::io::AsyncReadExt::read_exact(&mut theirs, &mut taken).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(io.write_all(&[0; 100]), slow);
        written.unwrap();
        let error = io.write_all(&[0; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
