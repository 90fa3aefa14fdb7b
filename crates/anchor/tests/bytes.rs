//! The predicted peak of a training step against what a process really held, a process a case: the operating
//! system counts all bytes of a process together, and what was freed may stay with it.

use std::fs;
use std::process::Command;

use anchor::{
    Anchor, AnchorConfig, Compute, FetchedMemory, Gradients, Input, Precision, Targets, TrainingShape,
};
use candle_core::{DType, Device};
use memory_bank::MemoryKind;

const CASES: [(&str, Compute); 3] = [
    ("f32", Compute { precision: Precision::F32, checkpoint: false }),
    ("f32-checkpoint", Compute { precision: Precision::F32, checkpoint: true }),
    ("bf16-checkpoint", Compute { precision: Precision::Bf16, checkpoint: true }),
];

fn main() {
    if !cfg!(target_os = "linux") {
        return;
    }
    // The program runs itself, with a case as the last argument.
    let wanted = std::env::args().next_back().unwrap_or_default();
    if let Some((_, compute)) = CASES.into_iter().find(|(name, _)| *name == wanted) {
        return check(compute);
    }
    for (name, _) in CASES {
        // glibc gives large pieces back when they are freed, so that the process holds what is in use.
        let mut case = Command::new(std::env::current_exe().unwrap());
        let status = case.arg(name).env("MALLOC_MMAP_THRESHOLD_", "65536").status().unwrap();
        assert!(status.success(), "{name}");
        println!("test the_peak_of_a_step_is_what_was_predicted::{name} ... ok");
    }
}

/// A field of /proc/self/status in bytes.
fn status(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn check(compute: Compute) {
    let config = AnchorConfig {
        vocab_size: 8000,
        d_model: 256,
        n_layers: 6,
        n_heads: 4,
        head_width: 64,
        ffn_width: 704,
        tied_embeddings: true,
        max_seq_len: 256,
        rope_base: 10_000.0,
        norm_eps: 1e-5,
        form: anchor::Form::default(),
    };
    let (batch, len) = (16, 256);
    let tokens: Vec<u32> = (0..batch * len).map(|i| (i * 31 % 8000) as u32).collect();
    let starts = vec![0; batch * len];
    let anchor = Anchor::new(config.clone(), 1, (&Device::Cpu, DType::F32)).unwrap();
    let shape = TrainingShape {
        micro_batch: batch,
        len,
        memory_kind: MemoryKind::Ffn,
        memory_width: 0,
        block_parameters: 0,
    };
    let input = Input { tokens: &tokens, starts: &starts, batch, len };
    let targets = Targets { targets: &tokens, scale: 1e-3, z_loss: 0.0 };
    let mut gradients = Gradients::default();
    let before = status("VmRSS");
    // The second pass finds the memory of the first, as every step of a run.
    for _ in 0..2 {
        gradients.clear();
        let memory = FetchedMemory::none();
        anchor.loss_and_gradients((input, targets), &memory, compute, &mut gradients).unwrap();
    }
    let peak = status("VmHWM") - before;
    // Weights were there before, and nobody made the moments.
    let bytes = config.training_bytes(shape, compute);
    let predicted = bytes.total() - 12 * config.n_parameters();
    let ratio = peak as f64 / predicted as f64;
    println!("{compute:?}: {peak} bytes, predicted {predicted}: {ratio:.2}; {bytes:?}");
    // At most what was predicted: not all gradients are there while all activations are.
    assert!((0.75..1.05).contains(&ratio));
}
