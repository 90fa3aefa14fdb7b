//! Connections: who is let in, and who is not.

use std::io::IoSlice;

use rcgen::ExtendedKeyUsagePurpose;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS12;
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::server::Connected;

use super::*;
use crate::security::certs::{issue_at, make_ca_at};
use crate::security::{Identity, Token};

/// A client that is not ours: with any certificate or none, and any name of a protocol.
struct Foreign<'a> {
    own: Option<&'a TlsFiles>,
    alpn: &'a str,
    versions: &'a [&'static SupportedProtocolVersion],
}

impl Foreign<'_> {
    /// What the server says of it.
    async fn meets(&self, server: &Acceptor, ca: &Path) -> Result<Stream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match self.own {
            None => config.with_no_client_auth(),
            Some(files) => {
                let chain = vec![CertificateDer::from_pem_file(&files.cert).unwrap()];
                let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
                config.with_client_auth_cert(chain, key).unwrap()
            }
        };
        if !self.alpn.is_empty() {
            config.alpn_protocols = vec![self.alpn.into()];
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let accept = async { server.accept(listener.accept().await.unwrap().0).await };
        let connect = async {
            let tcp = TcpStream::connect(addr).await.unwrap();
            let name = ServerName::try_from("127.0.0.1").unwrap();
            TlsConnector::from(Arc::new(config)).connect(name, tcp).await
        };
        // Whatever the client believes, the server decides.
        tokio::join!(accept, connect).0
    }
}

const BULK: &str = "anchorage-bulk/1";
const VERSIONS: &[&SupportedProtocolVersion] = rustls::ALL_VERSIONS;

#[tokio::test]
async fn both_sides_know_each_other_and_carry_bytes_on_both_ports() {
    let dir = authority();
    let shard = reloading(files(dir.path(), Role::Shard, "s0"));
    let worker = reloading(files(dir.path(), Role::Worker, "w0"));
    for protocol in [Protocol::Grpc, Protocol::Bulk] {
        let server = Acceptor { protocol, ..acceptor(Some(shard.clone())) };
        let client = Connector { protocol, ..connector(Some(worker.clone())) };
        for host in ["127.0.0.1", "localhost"] {
            let (server, client) = meet(&server, &client, host).await;
            let (mut server, mut client) = (server.unwrap(), client.unwrap());
            assert_eq!(server.peer_identity(), Some(&Identity::new(Role::Worker, "w0").unwrap()));
            assert_eq!(client.peer_identity(), Some(&Identity::new(Role::Shard, "s0").unwrap()));
            let caller = server.connect_info();
            assert_eq!(caller, server.caller());
            assert_eq!((caller.peer, caller.token), (server.peer(), Token::NotRead));
            assert_eq!(caller.to_string(), format!("worker/w0 at {}", server.peer()));
            assert!(server.tcp().nodelay().unwrap() && client.tcp().nodelay().unwrap());
            carries(&mut client, &mut server).await;
            carries(&mut server, &mut client).await;
        }
    }
}

#[tokio::test]
async fn without_tls_nobody_is_known() {
    let (server, client) = meet(&acceptor(None), &connector(None), "127.0.0.1").await;
    let (mut server, mut client) = (server.unwrap(), client.unwrap());
    assert!(server.peer_identity().is_none() && client.peer_identity().is_none());
    assert_eq!(server.caller().to_string(), server.peer().to_string());
    assert!(server.tcp().nodelay().unwrap() && client.tcp().nodelay().unwrap());
    carries(&mut client, &mut server).await;
    carries(&mut server, &mut client).await;
}

#[tokio::test]
async fn several_buffers_are_written_at_once() {
    let dir = authority();
    let shard = Some(reloading(files(dir.path(), Role::Shard, "s0")));
    let worker = Some(reloading(files(dir.path(), Role::Worker, "w0")));
    for (server, client) in
        [(acceptor(None), connector(None)), (acceptor(shard.clone()), connector(worker.clone()))]
    {
        let (server, client) = meet(&server, &client, "127.0.0.1").await;
        let (mut server, mut client) = (server.unwrap(), client.unwrap());
        assert!(client.is_write_vectored());
        let bufs = [IoSlice::new(b"one"), IoSlice::new(b"two"), IoSlice::new(b"three")];
        assert_eq!(client.write_vectored(&bufs).await.unwrap(), 11);
        client.shutdown().await.unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "onetwothree");
    }
}

#[tokio::test]
async fn a_shard_connects_to_another_one_over_an_address_of_ipv6() {
    let dir = authority();
    let server = acceptor(Some(reloading(files(dir.path(), Role::Shard, "s0"))));
    let client = connector(Some(reloading(files(dir.path(), Role::Shard, "s1"))));
    let Ok(listener) = TcpListener::bind("[::1]:0").await else { return };
    let port = listener.local_addr().unwrap().port();
    let accept = async { server.accept(listener.accept().await.unwrap().0).await };
    let (server, client) = tokio::join!(accept, client.connect("[::1]", port));
    assert_eq!(server.unwrap().peer_identity().unwrap().to_string(), "shard/s1");
    assert_eq!(client.unwrap().peer_identity().unwrap().to_string(), "shard/s0");
}

#[tokio::test]
async fn certificates_of_another_authority_are_refused_by_either_side() {
    let (dir, other) = (authority(), authority());
    let shard = files(dir.path(), Role::Shard, "s0");
    let stranger = files(other.path(), Role::Admin, "eve");
    // The stranger knows our authority, and shows a certificate of its own.
    let stranger = TlsFiles { ca: shard.ca.clone(), ..stranger };
    let server = acceptor(Some(reloading(shard)));
    let (found, client) = meet(&server, &connector(Some(reloading(stranger))), "127.0.0.1").await;
    let message = refusal(found);
    assert!(message.starts_with("127.0.0.1:") && message.contains("UnknownIssuer"), "{message}");
    let read = client.unwrap().read_u8().await.unwrap_err().to_string();
    assert!(read.contains("UnknownCA") || read.contains("unknown"), "{read}");

    let false_shard = files(other.path(), Role::Shard, "s0");
    let worker = files(dir.path(), Role::Worker, "w0");
    let client = connector(Some(reloading(worker)));
    let (_, found) = meet(&acceptor(Some(reloading(false_shard))), &client, "127.0.0.1").await;
    let message = refusal(found);
    assert!(message.contains("UnknownIssuer"), "{message}");
}

#[tokio::test]
async fn a_client_needs_a_certificate_and_tls() {
    let dir = authority();
    let shard = files(dir.path(), Role::Shard, "s0");
    let server = acceptor(Some(reloading(shard.clone())));
    let foreign = Foreign { own: None, alpn: BULK, versions: VERSIONS };
    let message = refusal(foreign.meets(&server, &shard.ca).await);
    assert!(message.contains("no certificates"), "{message}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let speak = async {
        let mut tcp = TcpStream::connect(addr).await.unwrap();
        tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        tcp
    };
    let accept = async { server.accept(listener.accept().await.unwrap().0).await };
    let (found, _tcp) = tokio::join!(accept, speak);
    refusal(found);
}

#[tokio::test]
async fn tls_1_2_is_the_oldest_and_other_protocols_are_refused() {
    let dir = authority();
    let shard = files(dir.path(), Role::Shard, "s0");
    let worker = files(dir.path(), Role::Worker, "w0");
    let server = acceptor(Some(reloading(shard.clone())));
    let own = Some(&worker);
    let old = Foreign { own, alpn: BULK, versions: &[&TLS12] };
    let stream = old.meets(&server, &shard.ca).await.unwrap();
    assert_eq!(stream.peer_identity().unwrap().to_string(), "worker/w0");

    let other = Foreign { own, alpn: "h2", versions: VERSIONS };
    refusal(other.meets(&server, &shard.ca).await);
    let silent = Foreign { own, alpn: "", versions: VERSIONS };
    let message = refusal(silent.meets(&server, &shard.ca).await);
    assert!(message.ends_with(r#"speaks "", expected "anchorage-bulk/1""#), "{message}");
}

#[tokio::test]
async fn a_certificate_without_exactly_one_role_is_refused() {
    let dir = authority();
    let shard = files(dir.path(), Role::Shard, "s0");
    let server = acceptor(Some(reloading(shard.clone())));
    let worker = "spiffe://anchorage/role/worker/w0";
    let cases: [(&[&str], &str); 7] = [
        (&[], "the certificate has 0 URIs, expected one"),
        (&[worker, "spiffe://anchorage/role/admin/w0"], "the certificate has 2 URIs, expected one"),
        (&[worker, "https://example.org/"], "the certificate has 2 URIs, expected one"),
        (&["spiffe://anchorage/role/root/w0"], r#"role is "root", expected worker, shard"#),
        (&["spiffe://elsewhere/role/admin/w0"], r#"URI is "spiffe://elsewhere/role/admin/w0", expected"#),
        (&["spiffe://anchorage/role/admin"], r#"URI is "spiffe://anchorage/role/admin", expected"#),
        (&["spiffe://anchorage/role/admin/a/b"], r#"name in the certificate is "a/b", expected"#),
    ];
    for (i, (uris, expected)) in cases.into_iter().enumerate() {
        let odd = sign_with(dir.path(), &format!("odd{i}"), |params| {
            params.subject_alt_names = uris.iter().map(|text| uri(text)).collect();
        });
        let foreign = Foreign { own: Some(&odd), alpn: BULK, versions: VERSIONS };
        let message = refusal(foreign.meets(&server, &shard.ca).await);
        assert!(message.starts_with("127.0.0.1:") && message.contains(expected), "{message}");
        // Its own holder is told, with the name of the file.
        let message = Tls::read(&odd).err().unwrap().to_string();
        assert!(message.starts_with(odd.cert.to_str().unwrap()) && message.contains(expected), "{message}");
    }
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let past = SystemTime::now() - Duration::from_secs(10 * 24 * 3600);
    make_ca_at(dir.path(), past).unwrap();
    let expired = |role, name: &str| {
        let files = issue_at(dir.path(), &Issue { days: 1, ..to_issue(role, name) }, past).unwrap();
        // As a process has it that started when it was valid.
        let read = files.clone();
        let tls = ReloadingTls::new(vec![], move || Tls::read_at(&read, past)).unwrap();
        (files, Some(Arc::new(tls)))
    };
    let (_, old_worker) = expired(Role::Worker, "old-w0");
    let (files_of_shard, old_shard) = expired(Role::Shard, "old-s0");
    let shard = Some(reloading(files(dir.path(), Role::Shard, "s0")));
    let worker = Some(reloading(files(dir.path(), Role::Worker, "w0")));

    let (found, _) = meet(&acceptor(shard), &connector(old_worker), "127.0.0.1").await;
    assert!(refusal(found).to_lowercase().contains("expired"));
    let (_, found) = meet(&acceptor(old_shard), &connector(worker), "127.0.0.1").await;
    assert!(refusal(found).to_lowercase().contains("expired"));
    let message = Tls::read(&files_of_shard).err().unwrap().to_string();
    let expected = format!("{}: the certificate is valid from ", files_of_shard.cert.display());
    assert!(message.starts_with(&expected) && message.contains(", and it is "), "{message}");
}

#[tokio::test]
async fn a_server_must_be_a_shard_of_the_host_that_is_called() {
    let dir = authority();
    let client = connector(Some(reloading(files(dir.path(), Role::Worker, "w0"))));
    let elsewhere = Issue { hosts: vec!["bank.example".to_owned()], ..to_issue(Role::Shard, "s0") };
    let elsewhere = issue(dir.path(), &elsewhere).unwrap();
    let (_, found) = meet(&acceptor(Some(reloading(elsewhere))), &client, "127.0.0.1").await;
    let message = refusal(found);
    assert!(message.contains("not valid for name"), "{message}");

    // Our certificates of other roles are not for servers.
    let admin = files(dir.path(), Role::Admin, "a0");
    let (_, found) = meet(&acceptor(Some(reloading(admin))), &client, "127.0.0.1").await;
    let message = refusal(found);
    assert!(message.contains("extended key usage"), "{message}");

    // And those of an authority that lets them be are seen through.
    let reader = sign_with(dir.path(), "r0", |params| {
        let address = SanType::IpAddress("127.0.0.1".parse().unwrap());
        params.subject_alt_names = vec![uri("spiffe://anchorage/role/reader/r0"), address];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    });
    let (_, found) = meet(&acceptor(Some(reloading(reader))), &client, "127.0.0.1").await;
    let message = refusal(found);
    assert!(message.ends_with("the server is reader/r0, expected a shard"), "{message}");
}

/// A session that is resumed would skip the certificates, which may have expired or changed.
#[test]
fn every_connection_is_a_full_handshake() {
    let dir = authority();
    let shard = files(dir.path(), Role::Shard, "s0");
    let config = Tls::read(&shard).unwrap().server(Protocol::Grpc);
    assert!(!config.session_storage.can_cache() && !config.ticketer.enabled());
    assert_eq!((config.send_tls13_tickets, config.max_early_data_size), (0, 0));
}

#[tokio::test]
async fn nobody_to_connect_to_is_an_error_with_the_host() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let message = refusal(connector(None).connect("127.0.0.1", port).await);
    assert!(message.starts_with(&format!("127.0.0.1:{port}: ")), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_has_as_long_as_it_is_given() {
    let dir = authority();
    let server = acceptor(Some(reloading(files(dir.path(), Role::Shard, "s0"))));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let begun = tokio::time::Instant::now();
    let message = refusal(server.accept(listener.accept().await.unwrap().0).await);
    assert_eq!(begun.elapsed().as_secs(), LIMIT.as_secs());
    assert_eq!(message, format!("{}: no connection after 30s", client.local_addr().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_has_as_long_as_it_is_given() {
    let dir = authority();
    let client = connector(Some(reloading(files(dir.path(), Role::Worker, "w0"))));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let message = refusal(client.connect("127.0.0.1", port).await);
    assert_eq!(message, format!("127.0.0.1:{port}: no connection after 30s"));
}
