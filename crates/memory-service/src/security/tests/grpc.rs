//! Calls of gRPC: what a handler knows of its caller.

use futures::stream;
use hyper_util::rt::TokioIo;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::server::health_reporter;

use super::*;
use crate::security::{Caller, Permission, Tokens, authorize};

const TOKEN: &str = "reader-0123456789";

/// A channel over one connection, to a server that takes a call of health for one that needs `needs`.
async fn channel(
    server: Acceptor,
    client: Connector,
    tokens: Option<Arc<Tokens>>,
    needs: Permission,
) -> Channel {
    let check = move |request: Request<()>| -> std::result::Result<Request<()>, Status> {
        let caller = Caller::of_request(&request, tokens.as_deref()).expect("a stream of ours");
        authorize(&caller, needs)?;
        Ok(request)
    };
    let (accepted, connected) = meet(&server, &client, "127.0.0.1").await;
    let incoming = stream::iter([accepted]);
    let service = InterceptedService::new(health_reporter().1, check);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let mut connected = connected.ok().map(TokioIo::new);
    let connect = tower::service_fn(move |_| {
        let connected = connected.take().ok_or(std::io::Error::from(std::io::ErrorKind::NotConnected));
        async move { connected }
    });
    Endpoint::from_static("http://bank").connect_with_connector(connect).await.unwrap()
}

async fn call(channel: &Channel, authorization: Option<&str>) -> Code {
    let mut request = Request::new(HealthCheckRequest::default());
    if let Some(value) = authorization {
        request.metadata_mut().insert("authorization", value.parse().unwrap());
    }
    HealthClient::new(channel.clone()).check(request).await.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn a_handler_knows_the_certificate_of_its_caller() {
    let dir = authority();
    let protocol = Protocol::Grpc;
    let server = Acceptor { protocol, ..acceptor(Some(reloading(files(dir.path(), Role::Shard, "s0")))) };
    for (role, expected) in [(Role::Worker, Code::Ok), (Role::Reader, Code::PermissionDenied)] {
        let own = reloading(files(dir.path(), role, &role.to_string()));
        let client = Connector { protocol, ..connector(Some(own)) };
        let channel = channel(server.clone(), client, None, Permission::Write).await;
        assert_eq!(call(&channel, None).await, expected, "{role}");
    }
}

#[tokio::test]
async fn a_handler_knows_the_token_of_every_request() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.toml");
    super::files::write_private(&path, &format!("read = ['{TOKEN}']"));
    let tokens = Some(Arc::new(Tokens::read(&path).unwrap()));
    let bearer = format!("Bearer {TOKEN}");
    for (needs, expected) in [(Permission::Read, Code::Ok), (Permission::Write, Code::PermissionDenied)] {
        let channel = channel(acceptor(None), connector(None), tokens.clone(), needs).await;
        assert_eq!(call(&channel, Some(&bearer)).await, expected);
        assert_eq!(call(&channel, None).await, Code::Unauthenticated);
        assert_eq!(call(&channel, Some("Bearer of-something-else")).await, Code::Unauthenticated);
    }
}
