//! Sums and messages between workers that are threads, over channels and over sockets.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use collective::{Call, Error, Leaves, Mesh, TcpOptions, TreeSum, all_reduce, join, local};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const PATIENCE: Duration = Duration::from_secs(20);

fn tcp(world_size: usize, patience: Duration) -> Vec<TcpOptions> {
    // Rank 0 takes the port over.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = |rank| TcpOptions {
        rank,
        world_size,
        master: format!("127.0.0.1:{port}"),
        job: "test/1".into(),
        tls: None,
        join: PATIENCE,
        stop: Arc::default(),
        patience,
    };
    (0..world_size).map(options).collect()
}

/// Runs `work` on every worker of a job, over channels or sockets, and returns what each made.
fn on_all<T: Send>(world_size: usize, sockets: bool, work: impl Fn(&mut Mesh) -> T + Sync) -> Vec<T> {
    on_all_patient((world_size, PATIENCE), sockets, work)
}

fn on_all_patient<T: Send>(
    (world_size, patience): (usize, Duration),
    sockets: bool,
    work: impl Fn(&mut Mesh) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = match sockets {
            true => tcp(world_size, patience)
                .into_iter()
                .map(|options| scope.spawn(move || work(&mut join(&options).unwrap())))
                .collect(),
            false => local(world_size, patience)
                .into_iter()
                .map(|mut mesh| scope.spawn(move || work(&mut mesh)))
                .collect(),
        };
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The array of one leaf: magnitudes so far apart that another order of additions gives other bits.
fn leaf(leaf: usize, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(leaf as u64);
    (0..len).map(|_| rng.random_range(-1.0f32..1.0) * 10f32.powi(rng.random_range(-6..6))).collect()
}

fn parts(leaves: Leaves, rank: usize, len: usize) -> Vec<Vec<f32>> {
    let mut sum = TreeSum::new(leaves.n, leaves.of(rank));
    leaves.of(rank).for_each(|i| sum.push_array(i..i + 1, leaf(i, len)));
    sum.finish_arrays().into_iter().map(|(_, values)| values).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_sum_has_the_same_bits_on_any_number_of_workers() {
    let len = 1003;
    for n in [1, 2, 3, 6, 7, 12, 16] {
        let one = parts(Leaves { n, world_size: 1 }, 0, len);
        assert_eq!(one.len(), 1);
        for world_size in 1..=n.min(5) {
            let leaves = Leaves { n, world_size };
            for sockets in [false, true] {
                let sums = on_all(world_size, sockets, |mesh| {
                    let parts = parts(leaves, mesh.rank(), len);
                    let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
                    let mut sum = vec![f32::NAN; len];
                    all_reduce(mesh, &Call::new("gradients", 1), leaves, &parts, &mut sum).unwrap();
                    sum
                });
                for sum in sums {
                    assert!(bits(&sum) == bits(&one[0]), "{n} leaves, {world_size} workers, {sockets}");
                }
            }
        }
    }
    // The additions of one after the other give other bits: the test would see an order that is not kept.
    let in_turn = (1..16).fold(leaf(0, len), |mut sum, i| {
        sum.iter_mut().zip(leaf(i, len)).for_each(|(sum, value)| *sum += value);
        sum
    });
    assert!(bits(&in_turn) != bits(&parts(Leaves { n: 16, world_size: 1 }, 0, len)[0]));
}

/// As of blocks, which few micro-batches touch.
#[test]
fn a_sum_with_leaves_missing_has_the_same_bits_on_any_number_of_workers() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..2000 {
        let n = rng.random_range(1..40);
        let touched: Vec<usize> = (0..n).filter(|_| rng.random_bool(0.3)).collect();
        let of = |own: std::ops::Range<usize>| {
            let mut sum = TreeSum::new(n, own.clone());
            let mine = touched.iter().filter(|&leaf| own.contains(leaf));
            mine.for_each(|&i| sum.push_array(i..i + 1, leaf(i, 3)));
            sum.finish_arrays()
        };
        let whole = of(0..n);
        assert_eq!(whole.len(), usize::from(!touched.is_empty()));
        let world_size = rng.random_range(1..=n);
        let leaves = Leaves { n, world_size };
        let mut sum = TreeSum::new(n, 0..n);
        for rank in 0..world_size {
            of(leaves.of(rank)).into_iter().for_each(|(range, values)| sum.push_array(range, values));
        }
        let together = sum.finish_arrays();
        let values = |parts: &[(_, Vec<f32>)]| parts.iter().map(|(_, v)| bits(v)).collect::<Vec<_>>();
        assert!(values(&together) == values(&whole), "{n} leaves {touched:?} of {world_size} workers");
    }
}

#[test]
fn everyone_gets_what_it_was_sent() {
    for sockets in [false, true] {
        let received = on_all(4, sockets, |mesh| {
            let mut all = vec![];
            for step in 0..20 {
                let rank = mesh.rank();
                let message =
                    |to: usize| Bytes::from(vec![(16 * rank + to) as u8; 1000 * (step * to) % 7001]);
                all.push(
                    mesh.exchange(&Call::new("paths", step as u64), (0..4).map(message).collect()).unwrap(),
                );
            }
            mesh.barrier(&Call::new("end", 20)).unwrap();
            all
        });
        for (rank, all) in received.iter().enumerate() {
            for (step, messages) in all.iter().enumerate() {
                for (from, message) in messages.iter().enumerate() {
                    assert!(message.iter().all(|&byte| byte == (16 * from + rank) as u8));
                    assert_eq!(message.len(), 1000 * (step * rank) % 7001);
                }
            }
        }
    }
}

#[test]
fn a_late_worker_is_named_on_all_others() {
    let patience = Duration::from_millis(300);
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let errors = std::thread::scope(|scope| {
        let threads: Vec<_> = tcp(3, patience)
            .into_iter()
            .map(|options| {
                let wait = &wait;
                scope.spawn(move || {
                    let mut mesh = join(&options).unwrap();
                    mesh.barrier(&Call::new("begin", 1)).unwrap();
                    if mesh.rank() == 2 {
                        // Computes for ever, as far as the others can see.
                        let _ = wait.lock().unwrap().recv();
                        return None;
                    }
                    mesh.barrier(&Call::new("gradients", 12)).err()
                })
            })
            .collect();
        let mut threads = threads.into_iter();
        let errors: Vec<_> = threads.by_ref().take(2).map(|thread| thread.join().unwrap()).collect();
        drop(done);
        assert!(threads.next().unwrap().join().unwrap().is_none());
        errors
    });
    for error in errors {
        let text = error.unwrap().to_string();
        assert!(text.contains("rank 2 is late") && text.contains("gradients of step 12"), "{text}");
    }
}

#[test]
fn a_worker_that_ends_is_named_and_one_that_gives_up_says_why() {
    for sockets in [false, true] {
        let errors = on_all(3, sockets, |mesh| match mesh.rank() {
            1 => {
                mesh.give_up("the disk is full", None);
                None
            }
            _ => mesh.barrier(&Call::new("save", 5)).err(),
        });
        assert_eq!(errors.len(), 3);
        for error in [&errors[0], &errors[2]] {
            let text = error.as_ref().unwrap().to_string();
            assert!(text.contains("rank 1 gave up: the disk is full"), "{text}");
            assert!(!error.as_ref().unwrap().is_transient());
        }
        let errors = on_all(3, sockets, |mesh| match mesh.rank() {
            1 => None,
            _ => mesh.barrier(&Call::new("save", 5)).err(),
        });
        assert!(matches!(errors[0].as_ref().unwrap(), Error::Gone { rank: 1, waiting: 0, .. }), "{errors:?}");
        let text = errors[2].as_ref().unwrap().to_string();
        assert!(text.contains("rank 1 is gone"), "{text}");
        assert!(errors[2].as_ref().unwrap().is_transient());
    }
}

#[test]
fn workers_in_different_calls_say_so() {
    let errors = on_all(2, false, |mesh| {
        let call = if mesh.rank() == 0 { Call::new("save", 4) } else { Call::new("gradients", 5) };
        mesh.barrier(&call).unwrap_err().to_string()
    });
    assert_eq!(errors[0], "rank 1 is in gradients of step 5, and rank 0 in save of step 4");
}

#[test]
fn a_worker_of_another_job_is_refused_and_does_not_disturb() {
    let ours = tcp(2, PATIENCE);
    let stray = TcpOptions { job: "test/0".into(), rank: 1, ..ours[1].clone() };
    let larger = TcpOptions { world_size: 3, rank: 1, ..ours[1].clone() };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| join(&ours[0]).unwrap().barrier(&Call::new("begin", 1)));
        let error = join(&stray).err().unwrap().to_string();
        assert!(error.contains("the job here is test/1, and that of rank 1 is test/0"), "{error}");
        let error = join(&larger).err().unwrap().to_string();
        assert!(error.contains("2 workers are expected here, and 3 by rank 1"), "{error}");
        join(&ours[1]).unwrap().barrier(&Call::new("begin", 1)).unwrap();
        first.join().unwrap().unwrap();
    });
    let short = TcpOptions { join: Duration::from_millis(100), ..tcp(3, PATIENCE)[0].clone() };
    let error = join(&short).err().unwrap().to_string();
    assert!(error.contains("for ranks [1, 2]"), "{error}");
    let error = join(&TcpOptions { rank: 3, ..short }).err().unwrap().to_string();
    assert_eq!(error, "rank is 3, expected a rank below the world size 3");
}

/// What one does for all may take longer than the others' patience; not that nothing is heard of it.
#[test]
fn one_that_is_at_work_is_waited_for_and_one_that_is_silent_is_not() {
    let patience = Duration::from_secs(1);
    let wait = |patience: Duration| std::thread::park_timeout(patience);
    for sockets in [false, true] {
        let errors = on_all_patient((3, patience), sockets, |mesh| {
            let call = Call::new("begin", 1);
            if mesh.rank() == 0 {
                mesh.at_work(|| wait(2 * patience));
            }
            mesh.barrier(&call).unwrap();
            // For shards, say: the one who waits lets the others hear of it.
            let begin = Instant::now();
            while mesh.rank() == 1 && begin.elapsed() < 2 * patience {
                mesh.check(&Call::new("memory", 1)).unwrap();
                wait(patience / 10);
            }
            mesh.barrier(&call).unwrap();
            if mesh.rank() == 2 {
                wait(2 * patience);
                return String::new();
            }
            loop {
                if let Err(error) = mesh.check(&Call::new("memory", 2)) {
                    return error.to_string();
                }
                wait(patience / 10);
            }
        });
        assert!(errors[..2].iter().all(|error| error.contains("rank 2 is late")), "{errors:?}");
    }
}

/// Who waits for something else hears of it too, also when messages came before.
#[test]
fn a_look_tells_who_has_given_up_without_waiting() {
    for sockets in [false, true] {
        let errors = on_all(2, sockets, |mesh| {
            let call = Call::new("memory", 3);
            mesh.check(&call).unwrap();
            mesh.barrier(&Call::new("begin", 3)).unwrap();
            if mesh.rank() == 1 {
                // It is a call ahead when it fails.
                let failed = mesh.exchange(&Call::new("other", 3), vec![Bytes::new(); 2]);
                let error = failed.unwrap_err();
                return format!("{error} by {}", error.cause().unwrap());
            }
            mesh.give_up("a shard is lost", Some("shard 1".into()));
            String::new()
        });
        assert!(errors[1].contains("rank 0 gave up: a shard is lost"), "{errors:?}");
        assert!(errors[1].ends_with("by shard 1"), "the cause is told: {errors:?}");
        let errors = on_all(2, sockets, |mesh| {
            if mesh.rank() == 1 {
                mesh.barrier(&Call::new("begin", 1)).unwrap();
                mesh.give_up("a shard is lost", Some("shard 1".into()));
                return None;
            }
            mesh.barrier(&Call::new("begin", 1)).unwrap();
            loop {
                if let Err(error) = mesh.check(&Call::new("memory", 1)) {
                    return Some(error.to_string());
                }
                std::thread::yield_now();
            }
        });
        assert!(errors[0].as_ref().unwrap().contains("rank 1 gave up: a shard is lost"), "{errors:?}");
    }
}

#[test]
fn a_worker_that_ends_while_others_are_awaited_gives_way_to_another_and_silence_holds_up_nobody() {
    let options = tcp(3, PATIENCE);
    std::thread::scope(|scope| {
        let all: Vec<_> = options
            .iter()
            .map(|options| {
                scope.spawn(move || {
                    if options.rank == 1 {
                        // One of its rank has been there, and is gone before the last one comes.
                        let mut first = connect(&options.master);
                        let hello = br#"{"job":"test/1","rank":1,"world_size":3,"port":1}"#;
                        first.write_all(&[&(hello.len() as u32).to_le_bytes(), &hello[..]].concat()).unwrap();
                    }
                    if options.rank == 2 {
                        // Something else looks whether the port is open.
                        drop(connect(&options.master));
                    }
                    let mut mesh = join(options).unwrap();
                    mesh.barrier(&Call::new("begin", 1)).unwrap();
                })
            })
            .collect();
        all.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

fn connect(address: &str) -> TcpStream {
    loop {
        if let Ok(stream) = TcpStream::connect(address) {
            return stream;
        }
        std::thread::yield_now();
    }
}

/// A port that is open is found by others too: what they say, or do not say, is no worker's word.
#[test]
fn whatever_else_comes_to_the_port_ends_no_job() {
    let options = tcp(3, PATIENCE);
    let hello = br#"{"job":"test/1","rank":9,"world_size":3,"port":1}"#;
    let numbered = |text: &[u8]| [&(text.len() as u32).to_le_bytes(), text].concat();
    let sayings: [Vec<u8>; 7] = [
        vec![],
        vec![0],
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        vec![0xff; 100_000],
        numbered(b"{\"job\":"),
        numbered(hello),
        numbered(br#"{"Peers":["127.0.0.1:1"]}"#),
    ];
    let others: Vec<TcpStream> = std::thread::scope(|scope| {
        let first = scope.spawn(|| join(&options[0]).unwrap().barrier(&Call::new("begin", 1)));
        let others = (0..20).flat_map(|_| &sayings).map(|saying| {
            let mut stream = connect(&options[0].master);
            // It may have been closed by now.
            let _ = stream.write_all(saying);
            stream
        });
        // They stay, and say nothing more.
        let others = others.collect();
        let rest: Vec<_> = options[1..]
            .iter()
            .map(|options| scope.spawn(|| join(options).unwrap().barrier(&Call::new("begin", 1))))
            .collect();
        rest.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
        first.join().unwrap().unwrap();
        others
    });
    assert_eq!(others.len(), 140);
}

#[test]
fn who_waits_to_join_can_be_told_to_stop() {
    let options = tcp(2, PATIENCE).remove(0);
    let stop = Arc::clone(&options.stop);
    std::thread::scope(|scope| {
        let joining = scope.spawn(move || join(&options).err().unwrap().to_string());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(joining.join().unwrap().contains("told to stop"));
    });
}
