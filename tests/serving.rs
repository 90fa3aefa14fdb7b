//! `anchorage serve`: a run that is trained, served, asked, and told to stop.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command};

use serde_json::{Value, json};

use crate::support::Workdir;

/// A server, killed when the test fails.
pub(crate) struct Served {
    child: Child,
    line: String,
    address: String,
}

impl Served {
    pub(crate) fn start(workdir: &Workdir, run: &str) -> Self {
        let args = ["serve", run, "--listen", "127.0.0.1:0"];
        let mut child = workdir.command(&args).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit_once("http://").map(|(_, address)| address.to_owned());
        let address = address.unwrap_or_else(|| {
            let mut errors = String::new();
            child.stderr.as_mut().unwrap().read_to_string(&mut errors).unwrap();
            panic!("expected an address, found {line:?}: {errors}")
        });
        Self { child, line, address }
    }

    /// Status and body.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut tcp = TcpStream::connect(&self.address).unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        write!(tcp, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut reply = String::new();
        tcp.read_to_string(&mut reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    pub(crate) fn complete(&self, body: &Value) -> Value {
        let (status, reply) = self.ask("POST", "/v1/completions", &body.to_string());
        assert_eq!(status, 200, "{body}: {reply}");
        serde_json::from_str(&reply).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_run_is_served_asked_and_told_to_stop() {
    let workdir = Workdir::new();
    workdir.ok(&["train", "run.toml"]);
    let mut served = Served::start(&workdir, "run");
    assert!(served.line.starts_with("serving run (step 12, "), "{}", served.line);

    // It says what `generate` says.
    let prompt = "The element";
    let args = ["generate", "run", prompt, "--max-new-tokens", "8", "--temperature", "0"];
    let (text, told) = workdir.ok(&args);
    let reply = served.complete(&json!({"prompt": prompt, "max_tokens": 8, "temperature": 0}));
    let path = reply["anchorage"]["path"].as_str().unwrap();
    assert!(told.contains(&format!("memory: {path}\n")), "{told}: {path}");
    assert_eq!(format!("{prompt}{}\n", reply["choices"][0]["text"].as_str().unwrap()), text);
    assert_eq!(reply["anchorage"]["step"], 12);

    // With memory a text scores as another one.
    let score = |memory: &str| {
        let body = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1, "memory": memory});
        served.complete(&body)["choices"][0]["logprobs"]["token_logprobs"].clone()
    };
    assert_ne!(score("auto"), score("off"));
    for (path, part) in [("/v1/models", "\"run\""), ("/v1/explain", "children"), ("/", "<!doctype html>")] {
        let (status, body) = served.ask("GET", path, "");
        assert!(status == 200 && body.contains(part), "{path}: {status} {body}");
    }
    let pid = served.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(served.child.wait().unwrap().success());

    workdir.fails(&["serve", "run", "--set", "train.steps=3"], &["expected a key of [serve]"]);
    workdir.fails(&["serve", "run", "--set", "serve.lisen=3"], &["did you mean `listen`?"]);
    workdir.fails(
        &["serve", "run", "--listen", "0.0.0.0:0"],
        &["serve.listen: 0.0.0.0:0 can be reached by others"],
    );
    workdir.fails(&["serve", "run", "--keys", "none.toml"], &["serve.keys", "none.toml"]);
    workdir.fails(
        &["serve", "run", "--set", "serve.limits.requests=0"],
        &["limits.requests: expected at least 1"],
    );
    workdir.fails(&["serve", "nothing"], &["nothing: expected a run folder, found no config.toml"]);
}
