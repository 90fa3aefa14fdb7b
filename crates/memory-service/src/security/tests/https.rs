//! Connections that anyone may make, with TLS.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use super::super::{Error, HttpStream, Https, Role, tls};
use super::{LIMIT, authority, files};

/// A client without a certificate of its own.
fn client(roots: RootCertStore) -> TlsConnector {
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn a_client_without_a_certificate_is_taken_and_one_without_tls_is_not() {
    let dir = authority();
    let files = files(dir.path(), Role::Shard, "web");
    let https = Https::reloading(files.cert.clone(), files.key.clone()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async {
        let (tcp, peer) = listener.accept().await.unwrap();
        HttpStream::accept(tcp, peer, Some(&https), LIMIT).await
    };
    let connect = async {
        let connector = client(tls::roots(&files.ca, SystemTime::now()).unwrap());
        let tcp = TcpStream::connect(address).await.unwrap();
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
        stream.write_all(b"asked").await.unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).await.unwrap();
        answer
    };
    let serve = async {
        let mut stream = accept.await.unwrap();
        let mut asked = [0; 5];
        stream.read_exact(&mut asked).await.unwrap();
        stream.write_all(b"answered").await.unwrap();
        stream.flush().await.unwrap();
        asked
    };
    let (asked, answer) = tokio::join!(serve, connect);
    assert_eq!((&asked, &answer), (b"asked", b"answered"));

    let plain = async {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        tcp
    };
    let accept = async {
        let (tcp, peer) = listener.accept().await.unwrap();
        HttpStream::accept(tcp, peer, Some(&https), LIMIT).await
    };
    let (refused, _tcp) = tokio::join!(accept, plain);
    assert!(matches!(refused.err(), Some(Error::Connection { .. })));
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let dir = authority();
    let (one, two) = (files(dir.path(), Role::Shard, "one"), files(dir.path(), Role::Shard, "two"));
    Https::read(&one.cert, &one.key).unwrap();
    let error = Https::read(&one.cert, &two.key).err().unwrap().to_string();
    assert!(error.contains("two.key is not the key of"), "{error}");
    assert!(Https::read(&dir.path().join("none.pem"), &one.key).is_err());
}
