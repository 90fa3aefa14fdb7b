//! Certificates and tokens that change while they are used.

use std::cell::Cell;
use std::fs;
use std::time::Instant;

use super::*;
use crate::security::{Permission, Tokens};

const SECOND: Duration = Duration::from_secs(1);

/// Puts the files of one certificate in the place of those of another, as a rotation does.
fn replace(old: &TlsFiles, new: &TlsFiles) {
    for (old, new) in [(&old.cert, &new.cert), (&old.key, &new.key), (&old.ca, &new.ca)] {
        if old != new {
            atomic_file::write(old, &fs::read(new).unwrap()).unwrap();
        }
    }
}

fn name(tls: &ReloadingTls, now: Instant) -> String {
    tls.current(now).identity().to_string()
}

#[test]
fn files_are_looked_at_once_a_second() {
    let dir = authority();
    let old = files(dir.path(), Role::Shard, "s0");
    let new = files(dir.path(), Role::Shard, "s1");
    let tls = reloading(old.clone());
    let start = Instant::now();
    assert_eq!(name(&tls, start), "shard/s0");
    replace(&old, &new);
    assert_eq!(name(&tls, start + SECOND - Duration::from_nanos(1)), "shard/s0");
    assert_eq!(name(&tls, start + SECOND), "shard/s1");
    let held = tls.current(start + SECOND);
    assert!(Arc::ptr_eq(&held, &tls.current(start + 9 * SECOND)), "nothing changed, nothing is read");
}

#[test]
fn a_broken_file_leaves_what_was_there_and_is_told_once() {
    let dir = authority();
    let old = files(dir.path(), Role::Shard, "s0");
    let new = files(dir.path(), Role::Shard, "s1");
    let tls = reloading(old.clone());
    let start = Instant::now();
    let lines = log::lines(|| {
        // Half of a rotation: the new certificate with the old key.
        atomic_file::write(&old.cert, &fs::read(&new.cert).unwrap()).unwrap();
        for seconds in 0..5 {
            assert_eq!(name(&tls, start + seconds * SECOND), "shard/s0");
        }
        assert!(tls.reload().is_err());
        fs::remove_file(&old.key).unwrap();
        for seconds in 5..9 {
            assert_eq!(name(&tls, start + seconds * SECOND), "shard/s0");
        }
        replace(&old, &new);
        assert_eq!(name(&tls, start + 9 * SECOND), "shard/s1");
    });
    let warning = "WARN memory_service::security::reload message=not reloaded, what was there before stays: ";
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(lines[0], format!("{warning}{} is not the key of {}", old.key.display(), old.cert.display()));
    assert!(lines[1].starts_with(&format!("{warning}{}: ", old.key.display())), "{lines:?}");
}

#[tokio::test]
async fn a_rotated_certificate_counts_for_new_connections_and_old_ones_live_on() {
    let dir = authority();
    let shard = files(dir.path(), Role::Shard, "s0");
    let next = files(dir.path(), Role::Shard, "s1");
    let tls = reloading(shard.clone());
    let server = acceptor(Some(tls.clone()));
    let client = connector(Some(reloading(files(dir.path(), Role::Worker, "w0"))));
    let (before, before_client) = meet(&server, &client, "127.0.0.1").await;
    let (mut before, mut before_client) = (before.unwrap(), before_client.unwrap());
    replace(&shard, &next);
    tls.reload().unwrap();
    let (after, after_client) = meet(&server, &client, "127.0.0.1").await;
    assert!(after.is_ok());
    assert_eq!(before_client.peer_identity().unwrap().to_string(), "shard/s0");
    assert_eq!(after_client.unwrap().peer_identity().unwrap().to_string(), "shard/s1");
    carries(&mut before_client, &mut before).await;
    carries(&mut before, &mut before_client).await;
}

#[tokio::test]
async fn a_rotated_authority_lets_its_own_in_and_the_old_one_s_out() {
    let (dir, other) = (authority(), authority());
    let shard = files(dir.path(), Role::Shard, "s0");
    let tls = reloading(shard.clone());
    let server = acceptor(Some(tls.clone()));
    let old_worker = files(dir.path(), Role::Worker, "w0");
    let new_worker = files(other.path(), Role::Worker, "w1");
    let new_shard = files(other.path(), Role::Shard, "s0");
    // Workers know both authorities while they change.
    let both = dir.path().join("both.pem");
    fs::write(&both, [fs::read(&shard.ca).unwrap(), fs::read(&new_shard.ca).unwrap()].concat()).unwrap();
    let old_client = connector(Some(reloading(TlsFiles { ca: both.clone(), ..old_worker })));
    let new_client = connector(Some(reloading(TlsFiles { ca: both, ..new_worker })));

    let (mut held, mut held_client) = match meet(&server, &old_client, "127.0.0.1").await {
        (Ok(held), Ok(client)) => (held, client),
        (held, client) => panic!("{:?} {:?}", held.err(), client.err()),
    };
    assert!(refusal(meet(&server, &new_client, "127.0.0.1").await.0).contains("UnknownIssuer"));

    replace(&shard, &new_shard);
    tls.reload().unwrap();
    let found = meet(&server, &new_client, "127.0.0.1").await.0.unwrap();
    assert_eq!(found.peer_identity().unwrap().to_string(), "worker/w1");
    assert!(refusal(meet(&server, &old_client, "127.0.0.1").await.0).contains("UnknownIssuer"));
    carries(&mut held_client, &mut held).await;
}

/// Clients connect all the time while the files of both sides change one by one, so that most of the
/// time a certificate and a key do not fit.
#[tokio::test]
async fn no_connection_fails_while_certificates_change() {
    let dir = authority();
    let shard = files(dir.path(), Role::Shard, "s");
    let worker = files(dir.path(), Role::Worker, "w");
    let (server_tls, client_tls) = (reloading(shard.clone()), reloading(worker.clone()));
    let (server, client) = (acceptor(Some(server_tls.clone())), connector(Some(client_tls.clone())));
    let (connections, done) = (Cell::new(0), Cell::new(false));
    let connect = async || {
        let (accepted, connected) = meet(&server, &client, "127.0.0.1").await;
        let (mut accepted, mut connected) = (accepted.unwrap(), connected.unwrap());
        carries(&mut connected, &mut accepted).await;
        connections.set(connections.get() + 1);
        [accepted, connected].map(|stream| stream.peer_identity().unwrap().to_string())
    };
    let load = async || {
        while !done.get() {
            connect().await;
        }
    };
    let change = async {
        let mut refused = 0;
        for i in 0..6 {
            let next_shard = files(dir.path(), Role::Shard, &format!("s{i}"));
            let next_worker = files(dir.path(), Role::Worker, &format!("w{i}"));
            for (old, new, tls) in [(&shard, next_shard, &server_tls), (&worker, next_worker, &client_tls)] {
                for (old, new) in [(&old.cert, &new.cert), (&old.key, &new.key)] {
                    atomic_file::write(old, &fs::read(new).unwrap()).unwrap();
                    refused += usize::from(tls.reload().is_err());
                    connect().await;
                }
            }
            assert_eq!(connect().await, [format!("worker/w{i}"), format!("shard/s{i}")]);
        }
        done.set(true);
        refused
    };
    let (_, _, _, refused) = tokio::join!(load(), load(), load(), change);
    assert_eq!(refused, 12, "every certificate came before its key");
    assert!(connections.get() > 2 * 6 * 5, "{}", connections.get());
}

#[test]
fn tokens_follow_their_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.toml");
    super::files::write_private(&path, "read = [\"0123456789abcdef\"]");
    let tokens = Tokens::reloading(&path).unwrap();
    let start = Instant::now();
    assert_eq!(tokens.current(start).permission_of(b"0123456789abcdef"), Some(Permission::Read));
    super::files::write_private(&path, "admin = [\"0123456789abcdef\"]");
    assert_eq!(tokens.current(start + SECOND).permission_of(b"0123456789abcdef"), Some(Permission::Admin));
    super::files::write_private(&path, "admin = [\"short\"]");
    let lines = log::lines(|| {
        let kept = tokens.current(start + 2 * SECOND);
        assert_eq!(kept.permission_of(b"0123456789abcdef"), Some(Permission::Admin));
    });
    assert!(lines.len() == 1 && lines[0].contains("token 1 of admin has 5 characters"), "{lines:?}");
}
