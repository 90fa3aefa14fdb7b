//! Tests over several parts of [`super`], on real files and real connections.

mod certs;
mod files;
mod grpc;
mod https;
mod log;
mod reload;
mod tls;
mod workers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, SanType};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::certs::{Authority, Issue, issue, make_ca, params, valid};
use super::{Acceptor, Connector, Protocol, ReloadingTls, Result, Role, Stream, Tls, TlsFiles};

const LIMIT: Duration = Duration::from_secs(30);

/// A folder with an authority.
fn authority() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    make_ca(dir.path()).unwrap();
    dir
}

fn to_issue(role: Role, name: &str) -> Issue {
    let hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    Issue { role, name: name.to_owned(), hosts, days: 7 }
}

fn files(dir: &Path, role: Role, name: &str) -> TlsFiles {
    issue(dir, &to_issue(role, name)).unwrap()
}

/// A certificate of any kind, by the authority of a folder.
fn sign_with(dir: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) -> TlsFiles {
    let now = SystemTime::now();
    let mut params = params(name).unwrap();
    valid(&mut params, now, 7);
    change(&mut params);
    let (cert, key) = Authority::read(dir, now).unwrap().sign(params).unwrap();
    let write = |file: String, text: String| -> PathBuf {
        let path = dir.join(file);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (cert, key) = (write(format!("{name}.pem"), cert), write(format!("{name}.key"), key));
    TlsFiles { cert, key, ca: dir.join("ca.pem") }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn reloading(files: TlsFiles) -> Arc<ReloadingTls> {
    Arc::new(Tls::reloading(files).unwrap())
}

fn acceptor(tls: Option<Arc<ReloadingTls>>) -> Acceptor {
    Acceptor { tls, protocol: Protocol::Bulk, silence: LIMIT }
}

fn connector(tls: Option<Arc<ReloadingTls>>) -> Connector {
    Connector { tls, protocol: Protocol::Bulk, timeout: LIMIT, silence: LIMIT }
}

/// One connection over loopback, as both sides see it.
async fn meet(server: &Acceptor, client: &Connector, host: &str) -> (Result<Stream>, Result<Stream>) {
    let listener = TcpListener::bind((host, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let accept = async { server.accept(listener.accept().await.unwrap().0).await };
    tokio::join!(accept, client.connect(host, port))
}

/// What a side says of a connection that the other one must refuse.
fn refusal(stream: Result<Stream>) -> String {
    let message = stream.expect_err("must be refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// Sends a word from one end to the other.
async fn carries(from: &mut Stream, to: &mut Stream) {
    from.write_all(b"word").await.unwrap();
    from.flush().await.unwrap();
    let mut word = [0; 4];
    to.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"word");
}
