//! Embeds texts again and again for a benchmark that alternates with a peer:
//! `embed FOLDER|hashed TEXTS.jsonl [--threads N]`, the texts being the values of `text`.
//!
//! Each line of the standard input is answered by one of JSON: the seconds that embedding all texts once took,
//! their bytes and their number. `write PATH` writes the embeddings, [N, D] f32 in little-endian, as well.

use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use embed::{Embedder, Hashed, HashedOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, path, threads) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [model, path] => (model, path, std::thread::available_parallelism()?.get()),
        [model, path, "--threads", n] => (model, path, n.parse()?),
        _ => return Err("expected FOLDER|hashed TEXTS.jsonl [--threads N]".into()),
    };
    ops::init_process(threads);
    let mut texts = vec![];
    for line in std::fs::read_to_string(path)?.lines() {
        let document: serde_json::Value = serde_json::from_str(line)?;
        texts.push(document["text"].as_str().ok_or("a line without a text")?.to_owned());
    }
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let embedder: Box<dyn Embedder> = match model {
        "hashed" => Box::new(Hashed::fit(HashedOptions::default(), &texts)?),
        name => Box::new(bert::open(Path::new(name))?),
    };
    let bytes: usize = texts.iter().map(|text| text.len()).sum();
    let mut output = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let start = Instant::now();
        let rows = ops::on_pool(|| embedder.embed(&texts))?;
        let seconds = start.elapsed().as_secs_f64();
        if let Some(path) = line?.strip_prefix("write ") {
            let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
            std::fs::write(path, bytes)?;
        }
        let documents = texts.len();
        writeln!(
            output,
            "{}",
            serde_json::json!({"seconds": seconds, "bytes": bytes, "documents": documents})
        )?;
        output.flush()?;
    }
    Ok(())
}
