//! A bank in a real object store, behind a link that can be cut in the middle of an object: moto's S3 server, if there
//! is one, or the one at the port `ANCHORAGE_S3_PORT`, whose bucket `bkt` opens with the key `A` and the secret `S`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::shards::{Shard, addresses, assert_same, signal, train, two};
use crate::support::{Workdir, failure};

/// The server, with its process if it is our own, which is killed when it is dropped.
struct Server {
    child: Option<Child>,
    port: u16,
}

impl Server {
    /// With one bucket, `bkt`. `None` without moto, unless this environment promises it.
    fn start() -> Option<Self> {
        if let Ok(port) = std::env::var("ANCHORAGE_S3_PORT") {
            return Some(Self { child: None, port: port.parse().unwrap() });
        }
        let Some(program) = moto() else {
            assert!(std::env::var_os("ANCHORAGE_NEEDS_MOTO").is_none(), "no moto_server");
            eprintln!("not run: no moto_server (pip install 'moto[s3,server]')");
            return None;
        };
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { child: Some(child), port };
        let start = Instant::now();
        while !server.has_bucket() {
            assert!(start.elapsed() < Duration::from_secs(60), "moto_server does not answer");
            std::thread::yield_now();
        }
        Some(server)
    }

    fn has_bucket(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        let request =
            "PUT /bkt HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// In the path, or where the benchmarks' peers are installed.
fn moto() -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::home_dir().unwrap_or_default().join(".cache/anchorage-peers/moto/bin");
    let mut folders = std::env::split_paths(&paths).chain([home]);
    folders.find_map(|folder| Some(folder.join("moto_server")).filter(|program| program.is_file()))
}

/// A process to be killed once the first half of an object, whose path holds this, has been sent.
type Victim = Arc<Mutex<Option<(&'static str, u32)>>>;

/// Leads to the server; returns its port.
fn link(server: u16, victim: &Victim) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let victim = Arc::clone(victim);
    std::thread::spawn(move || {
        for from in listener.incoming() {
            let (from, victim) = (from.unwrap(), Arc::clone(&victim));
            std::thread::spawn(move || {
                let to = TcpStream::connect(("127.0.0.1", server)).unwrap();
                let (mut back, mut answers) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
                // Either end may go at any time.
                let _ = forward(from, to, &victim);
            });
        }
    });
    port
}

/// Request by request, each with the length of its body in its head.
fn forward(from: TcpStream, mut to: TcpStream, victim: &Victim) -> std::io::Result<()> {
    let mut from = BufReader::new(from);
    loop {
        let (mut head, mut line, mut n_bytes) = (String::new(), String::new(), 0);
        while line != "\r\n" {
            line.clear();
            if from.read_line(&mut line)? == 0 {
                return to.shutdown(std::net::Shutdown::Write);
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                n_bytes = value.trim().parse().unwrap();
            }
            head += &line;
        }
        let mut body = vec![0; n_bytes];
        from.read_exact(&mut body)?;
        let is_meant = |&mut (path, _): &mut (&str, u32)| {
            head.starts_with("PUT ") && head.lines().next().is_some_and(|line| line.contains(path))
        };
        let killed = victim.lock().unwrap().take_if(is_meant);
        to.write_all(head.as_bytes())?;
        match killed {
            None => to.write_all(&body)?,
            Some((_, process)) => {
                to.write_all(&body[..n_bytes / 2])?;
                signal(process, "-KILL");
                return Ok(());
            }
        }
    }
}

#[test]
fn a_shard_killed_in_the_middle_of_a_save_to_s3_leaves_the_save_before() {
    let Some(server) = Server::start() else { return };
    let victim = Victim::default();
    let endpoint = format!("http://127.0.0.1:{}", link(server.port, &victim));
    let mut work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let settings = [
        ("AWS_ENDPOINT", endpoint.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "A"),
        ("AWS_SECRET_ACCESS_KEY", "S"),
    ];
    work.environment = settings.map(|(name, value)| (name, value.to_owned())).to_vec();
    let (store, bank) = ("s3://bkt/banks", "s3://bkt/banks/bank");

    let mut shards = two(&work, store);
    let text = addresses(&shards);
    let args = train("run.dir=again", &text);
    *victim.lock().unwrap() = Some(("/00000008/shard-0001", shards[1].id()));
    let worker = work.command(&args).spawn().unwrap();
    while victim.lock().unwrap().is_some() {
        std::thread::yield_now();
    }
    let (verified, _) = work.ok(&["bank", "verify", bank]);
    assert!(verified.contains("whole at step 4"), "{verified}");
    let address = shards[1].address.clone();
    drop(std::mem::replace(&mut shards[1], Shard::start(&work, store, 0, "127.0.0.1:0")));
    shards[1] = Shard::start(&work, store, 1, &address);
    let output = worker.wait_with_output().unwrap();
    if !output.status.success() {
        failure(&output, &["shard"]);
    }
    work.ok(&args);
    assert_same(&work, "again", bank);
    let (verified, _) = work.ok(&["bank", "verify", bank]);
    assert!(verified.contains("whole at step 12"), "{verified}");
}
