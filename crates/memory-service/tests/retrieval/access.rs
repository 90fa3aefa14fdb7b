//! Who may ask, how much at once, and where a server listens.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use memory_service::proto::retrieval::{InfoRequest, RouteRequest};
use memory_service::security::certs::{Issue, issue, make_ca};
use memory_service::security::{Role, Tls, Tokens};
use memory_service::{RETRIEVAL_READY, RetrievalLimits, RetrievalOptions, serve_retrieval};
use tokio::net::TcpListener;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::support::{Client, Echo, Served};

fn wait() -> RouteRequest {
    RouteRequest { texts: vec!["wait".to_owned()], ..RouteRequest::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_beyond_the_limits_is_refused_with_a_hint() {
    let limits = RetrievalLimits { requests: 1, request_s: 600, ..RetrievalLimits::default() };
    let source = Echo::default();
    let served = Served::start(source.clone(), RetrievalOptions { limits, ..Default::default() }).await;
    let mut first = served.client();
    let waiting = tokio::spawn(async move { first.route(wait()).await });
    let mut client = served.client();
    source.arrived.acquire().await.unwrap().forget();
    let short = RouteRequest { texts: vec!["a".to_owned()], ..RouteRequest::default() };
    let status = client.route(short).await.unwrap_err();
    let expected = (Code::ResourceExhausted, "1 of 1 requests are in use");
    assert_eq!((status.code(), status.message()), expected);
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "50");
    // What is served is told all the same.
    client.info(InfoRequest {}).await.unwrap();
    source.gate.add_permits(1);
    waiting.await.unwrap().unwrap();
    client.route(RouteRequest { texts: vec!["a".to_owned()], ..RouteRequest::default() }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_tells_that_it_is_ready_and_finishes_what_is_under_way() {
    let source = Echo::default();
    let served = Served::start(source.clone(), RetrievalOptions::default()).await;
    let mut health = HealthClient::new(served.channel(None));
    for service in ["", RETRIEVAL_READY] {
        let request = HealthCheckRequest { service: service.to_owned() };
        assert_eq!(health.check(request).await.unwrap().into_inner().status, 1, "{service:?}");
    }
    let mut client = served.client();
    client.info(InfoRequest {}).await.unwrap();
    let waiting = tokio::spawn(async move { client.route(wait()).await });
    source.arrived.acquire().await.unwrap().forget();
    let stopping = tokio::spawn(served.stop());
    source.gate.add_permits(1);
    waiting.await.unwrap().unwrap();
    stopping.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_and_roles_decide() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.toml");
    fs::write(&path, "read = [\"read-0123456789abcdef\"]\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let tokens = Some(Arc::new(Tokens::reloading(&path).unwrap()));
    let served = Served::start(Echo::default(), RetrievalOptions { tokens, ..Default::default() }).await;
    let mut client = served.client();
    for (shown, code) in [
        (None, Some(Code::Unauthenticated)),
        (Some("Bearer wrong-0123456789abcde"), Some(Code::Unauthenticated)),
        (Some("Bearer read-0123456789abcdef"), None),
    ] {
        let mut request = Request::new(InfoRequest {});
        if let Some(shown) = shown {
            request.metadata_mut().insert("authorization", shown.parse().unwrap());
        }
        assert_eq!(client.info(request).await.err().map(|status| status.code()), code);
    }

    make_ca(dir.path()).unwrap();
    let tls = |role: Role, hosts: &[&str]| {
        let hosts = hosts.iter().map(ToString::to_string).collect();
        let files = issue(dir.path(), &Issue { role, name: format!("the-{role}"), hosts, days: 1 }).unwrap();
        Some(Arc::new(Tls::reloading(files).unwrap()))
    };
    let options = RetrievalOptions { tls: tls(Role::Shard, &["127.0.0.1"]), ..Default::default() };
    let served = Served::start(Echo::default(), options).await;
    let mut reader = Client::new(served.channel(tls(Role::Reader, &[])));
    reader.info(InfoRequest {}).await.unwrap();
    assert!(served.client().info(InfoRequest {}).await.is_err(), "answered without a certificate");
}

#[tokio::test]
async fn others_are_served_with_certificates_or_when_told() {
    let open = || async { TcpListener::bind("0.0.0.0:0").await.unwrap() };
    let served = serve_retrieval(Echo::default(), open().await, RetrievalOptions::default(), async {}).await;
    let error = served.unwrap_err().to_string();
    assert!(error.starts_with("0.0.0.0:") && error.contains("--insecure"), "{error}");
    let insecure = RetrievalOptions { insecure: true, ..RetrievalOptions::default() };
    serve_retrieval(Echo::default(), open().await, insecure, async {}).await.unwrap();
}
