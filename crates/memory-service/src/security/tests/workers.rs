//! Workers among themselves, as `collective` connects them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use collective::{Call, Mesh, TcpOptions, TlsConfigs, join};

use super::*;
use crate::security::WorkerTls;

fn job(world_size: usize, tls: &[Option<&TlsFiles>]) -> Vec<TcpOptions> {
    // Rank 0 takes the port over.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = |(rank, tls): (usize, &Option<&TlsFiles>)| TcpOptions {
        rank,
        world_size,
        master: format!("127.0.0.1:{port}"),
        job: "job".into(),
        tls: tls.map(|files| {
            let WorkerTls { server, client } = WorkerTls::read(files).unwrap();
            TlsConfigs { server, client }
        }),
        join: LIMIT,
        stop: Arc::default(),
        patience: LIMIT,
    };
    tls.iter().enumerate().map(options).collect()
}

/// What every worker of a job makes of its connections.
fn on_all<T: Send>(job: &[TcpOptions], work: impl Fn(&mut Mesh) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            job.iter().map(|options| scope.spawn(|| work(&mut join(options).unwrap()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn worker(dir: &Path, name: &str) -> TlsFiles {
    // No names of hosts: a worker is placed anywhere.
    issue(dir, &Issue { hosts: vec![], ..to_issue(Role::Worker, name) }).unwrap()
}

/// Messages of all sizes arrive as they were sent, in both directions at once and between all.
#[test]
fn workers_with_certificates_exchange_what_they_would_without() {
    let dir = authority();
    let own = [0, 1, 2].map(|i| worker(dir.path(), &format!("w{i}")));
    let message = |from: usize, to: usize, step: usize| {
        let n_bytes = [0, 1, 4095, 16_384, 70_001, 3_000_007][(from + 2 * to + step) % 6];
        Bytes::from((0..n_bytes).map(|i| (i * 31 + 7 * from + 3 * to + step) as u8).collect::<Vec<_>>())
    };
    on_all(&job(3, &own.each_ref().map(Some)), |mesh| {
        let rank = mesh.rank();
        for step in 0..12 {
            let mine = (0..3).map(|to| message(rank, to, step)).collect();
            let received = mesh.exchange(&Call::new("paths", step as u64), mine).unwrap();
            for (from, found) in received.into_iter().enumerate() {
                assert!(found == message(from, rank, step), "{from} to {rank} in {step}");
            }
        }
    });
}

/// What goes over the network can be read without TLS, and cannot with it.
#[test]
fn what_workers_say_is_sealed() {
    let dir = authority();
    let own = [0, 1].map(|i| worker(dir.path(), &format!("w{i}")));
    let word: &'static [u8] = b"the gradients of step 7";
    for (tls, is_read) in [([None, None], true), (own.each_ref().map(Some), false)] {
        let mut job = job(2, &tls);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let master = std::mem::replace(&mut job[1].master, listener.local_addr().unwrap().to_string());
        // The second one reaches the first through one who listens.
        let heard = std::thread::spawn(move || {
            let inside = listener.accept().unwrap().0;
            let outside = loop {
                if let Ok(stream) = TcpStream::connect(&master) {
                    break stream;
                }
                std::thread::yield_now();
            };
            let carry = |mut from: TcpStream, mut to: TcpStream| {
                std::thread::spawn(move || {
                    let (mut all, mut part) = (Vec::<u8>::new(), [0; 4096]);
                    while let Ok(n @ 1..) = from.read(&mut part) {
                        all.extend(&part[..n]);
                        let _ = to.write_all(&part[..n]);
                    }
                    let _ = to.shutdown(std::net::Shutdown::Write);
                    all
                })
            };
            let there = carry(inside.try_clone().unwrap(), outside.try_clone().unwrap());
            let back = carry(outside, inside);
            [there.join().unwrap(), back.join().unwrap()]
        });
        on_all(&job, |mesh| {
            mesh.all_gather(&Call::new("gradients", 7), Bytes::from_static(word)).unwrap();
            mesh.barrier(&Call::new("end", 7)).unwrap();
        });
        for heard in heard.join().unwrap() {
            assert_eq!(heard.windows(word.len()).any(|part| part == word), is_read);
        }
    }
}

#[test]
fn who_is_no_worker_of_the_authority_is_told_so_and_does_not_disturb() {
    let (dir, other) = (authority(), authority());
    let own = [0, 1].map(|i| worker(dir.path(), &format!("w{i}")));
    let stranger = TlsFiles { ca: own[0].ca.clone(), ..worker(other.path(), "w1") };
    let job = job(2, &own.each_ref().map(Some));
    let with = |tls: TlsConfigs| TcpOptions { tls: Some(tls), ..job[1].clone() };
    let WorkerTls { server, client } = WorkerTls::read(&stranger).unwrap();
    let stranger = with(TlsConfigs { server, client });
    // A shard's certificate is of the authority, and does not make a worker.
    let shard = files(dir.path(), Role::Shard, "s0");
    let chain = crate::security::tls::certificates(&shard.cert, SystemTime::now()).unwrap();
    let WorkerTls { server, client } = WorkerTls::of(&shard, chain).unwrap();
    let shard = with(TlsConfigs { server, client });
    let plain = TcpOptions { tls: None, join: Duration::from_millis(300), ..job[1].clone() };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| join(&job[0]).unwrap().barrier(&Call::new("begin", 1)));
        for (options, alert) in [(&stranger, "UnknownCA"), (&shard, "HandshakeFailure")] {
            let error = join(options).err().unwrap();
            let text = error.to_string();
            assert!(text.contains("this worker's certificate is not accepted there"), "{text}");
            assert!(text.contains(alert) && !error.is_transient(), "{text}");
        }
        let text = join(&plain).err().unwrap().to_string();
        assert!(text.contains("no answer from rank 0"), "{text}");
        // Who says nothing, who says nonsense, and who has the job's name but no certificate.
        let mut silent = TcpStream::connect(&job[0].master).unwrap();
        silent.write_all(&[22]).unwrap();
        TcpStream::connect(&job[0].master).unwrap().write_all(&[0xff; 4096]).unwrap();
        join(&job[1]).unwrap().barrier(&Call::new("begin", 1)).unwrap();
        first.join().unwrap().unwrap();
    });
    // The one who waits tells whom it did not take in.
    for (options, reason) in [(&stranger, "UnknownIssuer"), (&shard, "that of shard/s0, expected a worker")] {
        let first = TcpOptions { join: Duration::from_secs(2), ..job[0].clone() };
        let text = std::thread::scope(|scope| {
            let first = scope.spawn(|| join(&first).err().unwrap().to_string());
            assert!(join(options).is_err());
            first.join().unwrap()
        });
        assert!(text.contains("for ranks [1]; 127.0.0.1:") && text.contains(reason), "{text}");
    }
}

#[test]
fn files_that_make_no_worker_are_named() {
    let dir = authority();
    let shard = files(dir.path(), Role::Shard, "s0");
    let text = WorkerTls::read(&shard).err().unwrap().to_string();
    let expected = "s0.pem: the certificate is that of shard/s0, expected a worker";
    assert!(text.ends_with(expected), "{text}");
    let none = TlsFiles { ca: dir.path().join("none.pem"), ..worker(dir.path(), "w0") };
    let text = WorkerTls::read(&none).err().unwrap().to_string();
    assert!(text.contains("none.pem: "), "{text}");
}
