//! Our side of bench/serve: times decoding steps of one anchor, without a server around them.
//!
//! `decode FOLDER --make SIZE` writes what both sides read (weights, blocks, settings) and ends. `decode FOLDER
//! [--threads N] [--weights f32|bf16]` answers lines `MEMORY BATCH CONTEXT STEPS` by a line of JSON with the seconds of
//! the context's step and of each that follows. MEMORY is `none`, or `PATHS-DTYPE`: PATHS `different` gives each sequence blocks of its own at every level,
//! `shared` all of them one path; DTYPE is how blocks are held: f32, bf16 or int8.

use std::collections::HashMap;
use std::fs;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anchor::{Anchor, AnchorConfig, Decoder, DecoderOptions, PackedBlock, PathMemory, Scores, Segment};
use candle_core::{DType, Device};
use cluster_tree::ClusterId;
use memory_bank::{Block, BlockDtype, BlockSpec, Encoded};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Blocks of a level: as many as sequences that differ at every level.
const N_BLOCKS: usize = 16;

/// What both sides are told.
#[derive(Serialize, Deserialize)]
struct Bench {
    anchor: AnchorConfig,
    width: Vec<usize>,
}

impl Bench {
    fn of(size: &str) -> Result<Self> {
        // 160M of arXiv 2510.02375, and a smaller one.
        let (d_model, n_layers, n_heads, head_width, ffn_width, vocab_size) = match size {
            "160m" => (512, 35, 12, 32, 2048, 50_432),
            "small" => (256, 6, 4, 64, 704, 8192),
            _ => return Err(format!("--make {size}: expected 160m or small").into()),
        };
        let anchor = AnchorConfig {
            vocab_size,
            d_model,
            n_layers,
            n_heads,
            head_width,
            ffn_width,
            tied_embeddings: true,
            max_seq_len: 2048,
            rope_base: 100_000.0,
            norm_eps: 1e-5,
            form: anchor::Form::default(),
        };
        Ok(Self { anchor, width: vec![d_model / 2, d_model / 8, d_model / 32] })
    }

    fn spec(&self) -> BlockSpec {
        BlockSpec::ffn(self.anchor.n_layers, self.anchor.d_model, self.width.clone(), vec![N_BLOCKS, 1, 1])
    }
}

/// Writes weights, and the blocks of each level as they stand in the bank.
fn make(folder: &Path, size: &str) -> Result<()> {
    let bench = Bench::of(size)?;
    fs::create_dir_all(folder)?;
    fs::write(folder.join("bench.json"), serde_json::to_vec(&bench)?)?;
    Anchor::new(bench.anchor.clone(), 1, (&Device::Cpu, DType::F32))?
        .save(&folder.join("anchor.safetensors"))?;
    let spec = bench.spec();
    for level in spec.levels() {
        let mut random = ChaCha8Rng::seed_from_u64(level as u64);
        let mut bytes = vec![];
        for _ in 0..N_BLOCKS * spec.block_len(level) {
            let value = (random.next_u32() as f32 / u32::MAX as f32 - 0.5) * 0.05;
            bytes.extend(value.to_le_bytes());
        }
        fs::write(folder.join(format!("memory-{level}.bin")), bytes)?;
    }
    Ok(())
}

struct Side {
    folder: PathBuf,
    bench: Bench,
    decoder: Decoder,
    blocks: HashMap<String, Vec<Vec<Arc<PackedBlock>>>>,
}

impl Side {
    /// The blocks of all levels, held in one way.
    fn blocks(&mut self, name: &str) -> Result<&Vec<Vec<Arc<PackedBlock>>>> {
        if !self.blocks.contains_key(name) {
            let dtype = match name {
                "f32" => BlockDtype::F32,
                "bf16" => BlockDtype::Bf16,
                "int8" => BlockDtype::Int8,
                _ => return Err(format!("{name}: expected f32, bf16 or int8").into()),
            };
            let spec = self.bench.spec();
            let mut levels = vec![];
            for level in spec.levels() {
                let bytes = fs::read(self.folder.join(format!("memory-{level}.bin")))?;
                let (numbers, _) = bytes.as_chunks::<4>();
                let mut blocks = vec![];
                for (index, numbers) in numbers.chunks_exact(spec.block_len(level)).enumerate() {
                    let id = ClusterId { level: level as u8, index: index as u32 };
                    let values = numbers.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
                    let encoded = Encoded::encode(dtype, spec.d_model, &Block { id, values })?;
                    blocks.push(Arc::new(PackedBlock::pack(id, &encoded, &spec)?));
                }
                levels.push(blocks);
            }
            self.blocks.insert(name.into(), levels);
        }
        Ok(&self.blocks[name])
    }

    fn memories(&mut self, memory: &str, batch: usize) -> Result<Vec<PathMemory>> {
        let Some((paths, dtype)) = memory.split_once('-') else {
            return Ok(vec![PathMemory::default(); batch]);
        };
        let blocks = self.blocks(dtype)?;
        let path = |i: usize| {
            let index = if paths == "shared" { 0 } else { i % N_BLOCKS };
            PathMemory::new(blocks.iter().map(|level| Arc::clone(&level[index])).collect())
        };
        Ok((0..batch).map(path).collect())
    }

    /// Seconds of the step of the context, then of each of `steps` steps of one token, and the scores of the first
    /// sequence in the end.
    fn time(&mut self, memory: &str, [batch, context, steps]: [usize; 3]) -> Result<(Vec<f64>, Vec<f32>)> {
        let memories = self.memories(memory, batch)?;
        let vocab_size = self.bench.anchor.vocab_size;
        let token =
            |sequence: usize, position: usize| ((sequence * 7919 + position * 31 + 5) % vocab_size) as u32;
        let mut pages = self.decoder.pages(batch * (context + steps).next_multiple_of(32));
        let mut caches = vec![];
        for _ in 0..batch {
            caches.push(pages.reserve(context + steps).ok_or("no pages")?);
        }
        let (mut seconds, mut last) = (vec![], vec![]);
        for step in 0..=steps {
            let (first, n) = if step == 0 { (0, context) } else { (context + step - 1, 1) };
            let tokens: Vec<Vec<u32>> =
                (0..batch).map(|i| (first..first + n).map(|position| token(i, position)).collect()).collect();
            let parts = tokens.iter().zip(&mut caches).zip(&memories);
            let mut segments: Vec<Segment> = parts
                .map(|((tokens, cache), memory)| Segment { tokens, cache, memory, scores: Scores::Last })
                .collect();
            let began = Instant::now();
            let logits = self.decoder.step(&mut pages, &mut segments)?;
            seconds.push(began.elapsed().as_secs_f64());
            last = logits.row(0)[..64].to_vec();
        }
        Ok((seconds, last))
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = PathBuf::from(arguments.first().ok_or("expected a folder")?);
    let option = |name: &str| {
        let place = arguments.iter().position(|argument| argument == name)?;
        arguments.get(place + 1).map(String::as_str)
    };
    ops::init_process(option("--threads").map_or(Ok(2), str::parse)?);
    if let Some(size) = option("--make") {
        return make(&folder, size);
    }
    let bench: Bench = serde_json::from_slice(&fs::read(folder.join("bench.json"))?)?;
    let anchor = Anchor::load(&folder.join("anchor.safetensors"), (&Device::Cpu, DType::F32))?;
    let weights = if option("--weights") == Some("bf16") { BlockDtype::Bf16 } else { BlockDtype::F32 };
    let decoder = Decoder::new(&anchor, DecoderOptions { weights })?;
    drop(anchor);
    let mut side = Side { folder, bench, decoder, blocks: HashMap::new() };
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [memory, batch, context, steps] = words[..] else {
            return Err(format!("{line}: expected MEMORY BATCH CONTEXT STEPS").into());
        };
        let (seconds, logits) = side.time(memory, [batch.parse()?, context.parse()?, steps.parse()?])?;
        let (prefill, seconds) = seconds.split_first().ok_or("no steps")?;
        println!("{}", serde_json::json!({"prefill": prefill, "seconds": seconds, "logits": logits}));
    }
    Ok(())
}
