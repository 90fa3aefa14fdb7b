//! Who may do what, over real connections.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use memory_bank::{BlockStore, Placement, Step};
use memory_service::security::certs::{Issue, issue, make_ca};
use memory_service::security::{Role, Tls, Tokens};
use memory_service::{RemoteBank, RemoteOptions, Retry, ServeOptions};

use crate::support::{Served, all_ids, bits, gradients, listener, options, reference, remote, serve_options};

/// A shard with certificates of `dir`, with a bulk stream or without.
async fn served(dir: &Path, bulk: bool) -> [Served; 1] {
    let files = issue(dir, &issue_of(Role::Shard, "shard")).unwrap();
    let tls = Some(Arc::new(Tls::reloading(files).unwrap()));
    let bulk = if bulk { Some(listener().await) } else { None };
    [Served::start(options(1, Placement::WHOLE), ServeOptions { tls, bulk, ..serve_options() }).await]
}

fn issue_of(role: Role, name: &str) -> Issue {
    let hosts = if role == Role::Shard { vec!["127.0.0.1".to_owned()] } else { vec![] };
    Issue { role, name: name.to_owned(), hosts, days: 1 }
}

fn as_role(dir: &Path, role: Role, options: RemoteOptions) -> RemoteOptions {
    let files = issue(dir, &issue_of(role, &format!("the-{role}"))).unwrap();
    let retry = Retry { seconds: 0, ..Retry::default() };
    RemoteOptions { tls: Some(Arc::new(Tls::reloading(files).unwrap())), retry, ..options }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_decide_over_both_ports() {
    for bulk in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        make_ca(dir.path()).unwrap();
        let served = served(dir.path(), bulk).await;
        let worker = RemoteBank::connect(as_role(dir.path(), Role::Worker, remote(&served))).await.unwrap();
        worker.push(Step(1), 0, gradients(1, 0)).await.unwrap();
        let blocks = worker.fetch(Step(1), &all_ids()).await.unwrap();
        assert!(bits(&blocks) == bits(&reference(1, 1)));
        let error = worker.restore(None).await.unwrap_err().to_string();
        assert!(error.contains("no store for checkpoints"), "{error}");

        let reader = RemoteBank::connect(as_role(dir.path(), Role::Reader, remote(&served))).await.unwrap();
        let blocks = reader.fetch(Step(1), &all_ids()).await.unwrap();
        assert!(bits(&blocks) == bits(&reference(1, 1)));
        let restored = reader.restore(None).await.map(|_| ());
        for error in [reader.push(Step(2), 0, vec![]).await, reader.save(Step(1)).await, restored] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("PermissionDenied"), "{error}");
        }
        assert_eq!(served[0].live.applied(), Step(1));

        // Without a certificate, and with one of another authority.
        let bare = RemoteOptions { retry: Retry { seconds: 0, ..Retry::default() }, ..remote(&served) };
        assert!(RemoteBank::connect(bare).await.is_err());
        let other = tempfile::tempdir().unwrap();
        make_ca(other.path()).unwrap();
        assert!(RemoteBank::connect(as_role(other.path(), Role::Worker, remote(&served))).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_decide_without_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.toml");
    let token = |name: &str| format!("{name}-0123456789abcdef");
    let text = format!("read = [{:?}]\nwrite = [{:?}]\n", token("read"), token("write"));
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    for bulk in [false, true] {
        let tokens = Some(Arc::new(Tokens::reloading(&path).unwrap()));
        let bulk = if bulk { Some(listener().await) } else { None };
        let serving = ServeOptions { tokens, bulk, ..serve_options() };
        let served = [Served::start(options(1, Placement::WHOLE), serving).await];
        let connect = async |token: Option<String>| {
            let retry = Retry { seconds: 0, ..Retry::default() };
            RemoteBank::connect(RemoteOptions { token, retry, ..remote(&served) }).await
        };
        for wrong in [None, Some("read-0123456789abcdeg".to_owned())] {
            let error = connect(wrong).await.err().unwrap().to_string();
            assert!(error.contains("Unauthenticated"), "{error}");
        }
        let writer = connect(Some(token("write"))).await.unwrap();
        writer.push(Step(1), 0, gradients(1, 0)).await.unwrap();
        let reader = connect(Some(token("read"))).await.unwrap();
        assert!(bits(&reader.fetch(Step(1), &all_ids()).await.unwrap()) == bits(&reference(1, 1)));
        let error = reader.push(Step(2), 0, vec![]).await.unwrap_err().to_string();
        assert!(error.contains("PermissionDenied"), "{error}");
        // Nor does it end what the writer may do by the number of a later attempt.
        let options = RemoteOptions { token: Some(token("read")), attempt: 9, ..remote(&served) };
        let error = RemoteBank::connect(options).await.err().unwrap().to_string();
        assert!(error.contains("PermissionDenied"), "{error}");
        writer.push(Step(2), 0, vec![]).await.unwrap();
    }
}
