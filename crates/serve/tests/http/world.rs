//! A tiny run that is served, and a client.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anchor::{Anchor, AnchorConfig, Decoder, DecoderOptions};
use candle_core::{DType, Device};
use corpus::Tokenizer;
use embed::Embedder;
use generate::engine::{Engine, EngineOptions};
use memory_bank::TierOptions;
use memory_service::security::ApiKeys;
use retrieve::{Beam, Retriever};
use serde_json::Value;
use serve::http::{App, ChatTemplate, HttpLimits, Parts, serve};
use serve::memory::{Banks, Memory, MemoryOptions, Reach, Retrieval, RetrievalParts};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::made_up::{folder, id, identity, save, tree};

/// Longer than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Positions of a sequence.
pub(crate) const POSITIONS: usize = 512;

/// Texts with a `b` in them are on one side of the plane, all others on the other.
struct Sides;

impl Embedder for Sides {
    fn dim(&self) -> usize {
        2
    }

    fn fingerprint(&self) -> &str {
        "sides"
    }

    fn embed(&self, texts: &[&str]) -> embed::Result<Vec<f32>> {
        Ok(texts.iter().flat_map(|text| if text.contains('b') { [-1.0, 0.0] } else { [1.0, 0.0] }).collect())
    }
}

struct Model {
    tokenizer: Arc<Tokenizer>,
    decoder: Arc<Decoder>,
}

fn model() -> &'static Model {
    static MODEL: LazyLock<Model> = LazyLock::new(|| {
        let texts = ["a cat sat on a mat", "a boat by the quay", "naïve 東京"];
        let texts = texts.into_iter().cycle().take(30).map(|text| Ok(text.to_owned()));
        let tokenizer = Tokenizer::train(texts, 290, 1 << 20).unwrap();
        let config = AnchorConfig {
            vocab_size: tokenizer.vocab_size(),
            d_model: 8,
            n_layers: 2,
            n_heads: 2,
            head_width: 4,
            ffn_width: 16,
            tied_embeddings: false,
            max_seq_len: POSITIONS,
            rope_base: 10_000.0,
            norm_eps: 1e-5,
            form: anchor::Form::default(),
        };
        let anchor = Anchor::new(config, 5, (&Device::Cpu, DType::F32)).unwrap().freeze();
        let decoder = Decoder::new(&anchor, DecoderOptions::default()).unwrap();
        Model { tokenizer: Arc::new(tokenizer), decoder: Arc::new(decoder) }
    });
    &MODEL
}

/// What differs between servers.
pub(crate) struct Setting {
    pub(crate) limits: HttpLimits,
    pub(crate) engine: EngineOptions,
    /// The text of a file of keys.
    pub(crate) keys: Option<&'static str>,
    pub(crate) has_chat: bool,
}

impl Default for Setting {
    fn default() -> Self {
        let engine = EngineOptions { kv_mib: 4, ..EngineOptions::default() };
        Self { limits: HttpLimits::default(), engine, keys: None, has_chat: false }
    }
}

/// A server, which ends with this value.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Engine,
    pub(crate) dir: TempDir,
    /// The `memory` folders of two steps of the bank, the first of which is loaded.
    pub(crate) banks: [PathBuf; 2],
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) async fn start(setting: Setting) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ids = [id(0, 0), id(0, 1), id(1, 0), id(1, 4)];
        let banks =
            [save(dir.path(), &identity(), 1, &ids).await, save(dir.path(), &identity(), 2, &ids).await];
        let retriever = Retriever::new(Box::new(Sides), Box::new(Beam::new(tree(), 2).unwrap())).unwrap();
        let retrieval = Retrieval::new(RetrievalParts {
            retriever,
            tree: tree(),
            identity: identity(),
            page: None,
            reach: Reach { bank: "made-up".to_owned(), ..Reach::default() },
            options: MemoryOptions::default(),
        })
        .unwrap();
        retrieval.banks().load(Banks::DEFAULT, folder(&banks[0])).await.unwrap();
        let keys = setting.keys.map(|text| {
            let file = dir.path().join("keys.toml");
            write_private(&file, text);
            ApiKeys::reloading(&file).unwrap()
        });
        let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";
        let chat =
            setting.has_chat.then(|| ChatTemplate::new(template.into(), "<|endoftext|>".into()).unwrap());
        let Model { tokenizer, decoder } = model();
        let engine = Engine::start(decoder.clone(), tokenizer.clone(), setting.engine).unwrap();
        let app = App::new(Parts {
            name: "tiny".into(),
            step: 1,
            n_parameters: 1000,
            positions: engine.max_positions(),
            tokenizer: tokenizer.clone(),
            engine: engine.clone(),
            retrieval: Some(retrieval),
            memory: Memory::Auto,
            chat,
            keys,
            tiers: TierOptions::default(),
            limits: setting.limits,
        })
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(app, listener, None, async { drop(stopped.await) }));
        Self { address, engine, dir, banks, stop: Some(stop), task: Some(task) }
    }

    /// Tells it to stop; the task is done when all requests are.
    pub(crate) fn stop(&mut self) -> JoinHandle<()> {
        self.stop.take().unwrap().send(()).unwrap();
        self.task.take().unwrap()
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    pub(crate) async fn send(&self, method: &str, path: &str, key: &str, body: &[u8]) -> Reply {
        let mut tcp = self.connect().await;
        let authorization =
            if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{authorization}content-length: {}\r\n\r\n",
            body.len()
        );
        // A server that refuses the head may not read the rest.
        let _ = tcp.write_all(&[head.as_bytes(), body].concat()).await;
        read_reply(&mut tcp).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "", b"").await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Reply {
        self.send("POST", path, "", body.as_bytes()).await
    }

    /// A completion that succeeds.
    pub(crate) async fn complete(&self, body: &str) -> Value {
        let reply = self.post("/v1/completions", body).await;
        assert_eq!(reply.status, 200, "{body}: {}", reply.text());
        reply.json()
    }

    /// A number of `/metrics`.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.text();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }
}

pub(crate) fn write_private(file: &std::path::Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(file, text).unwrap();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let line = |line: &'_ str| -> Option<(String, usize)> {
            let (found, _) = line.split_once(':')?;
            Some((found.to_lowercase(), found.len() + 1))
        };
        self.head.lines().find_map(|found| match line(found) {
            Some((found_name, at)) if found_name == name => Some(found[at..].trim()),
            _ => None,
        })
    }

    /// The message of an error.
    pub(crate) fn message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap().to_owned()
    }

    /// The values of server-sent events, the last of which is `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let text = self.text();
        let mut data: Vec<&str> =
            text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// All that comes until the server closes.
pub(crate) async fn read_all(tcp: &mut TcpStream) -> Vec<u8> {
    let mut bytes = vec![];
    // A reset is the end too.
    let _ = timeout(LONG, tcp.read_to_end(&mut bytes)).await.expect("the server closes the connection");
    bytes
}

pub(crate) async fn read_reply(tcp: &mut TcpStream) -> Reply {
    let bytes = read_all(tcp).await;
    let end =
        bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("no head: {bytes:?}"));
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let reply = Reply { status, head, body: bytes[end + 4..].to_vec() };
    match reply.header("transfer-encoding") {
        Some("chunked") => Reply { body: unchunked(&reply.body), ..reply },
        _ => reply,
    }
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = vec![];
    while let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") {
        let len = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        if len == 0 {
            break;
        }
        body.extend(&bytes[end + 2..][..len]);
        bytes = &bytes[end + 2 + len + 2..];
    }
    body
}
