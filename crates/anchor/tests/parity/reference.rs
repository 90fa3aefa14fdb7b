//! The checkpoints of `tests/checkpoints`, and what transformers computes with them.

use std::path::{Path, PathBuf};

use anchor::{Anchor, FetchedMemory, Input, hf};
use candle_core::{DType, Device};
use safetensors::{Dtype, SafeTensors};

pub(crate) const CPU: (&Device, DType) = (&Device::Cpu, DType::F32);

/// All of them.
pub(crate) const FAMILIES: [&str; 11] = [
    "gemma2",
    "gemma3",
    "gemma3_nested",
    "llama2",
    "llama3",
    "llama_linear",
    "mistral",
    "openelm",
    "qwen2",
    "qwen3",
    "smollm",
];

pub(crate) fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints").join(family)
}

/// A copy of a checkpoint, to be changed; `config` is the file that describes it.
pub(crate) fn copy(family: &str, config: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder(family)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::copy(folder(family).join(config), to.path().join("config.json")).unwrap();
    to
}

pub(crate) fn read(folder: &Path) -> Anchor {
    hf::read(folder, CPU).unwrap_or_else(|error| panic!("{error}")).0
}

/// reference.safetensors of a family.
pub(crate) struct Reference(Vec<u8>);

impl Reference {
    pub(crate) fn of(family: &str) -> Self {
        Self(std::fs::read(folder(family).join("reference.safetensors")).unwrap())
    }

    pub(crate) fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    pub(crate) fn numbers(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::I64, "{name}");
        view.data().as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as u32).collect()
    }
}

/// The logits of all tokens of a batch, row after row.
pub(crate) fn logits(anchor: &Anchor, input: Input) -> Vec<f32> {
    let hidden = anchor.hidden(input, &FetchedMemory::none(), None).unwrap();
    anchor.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest distance of two numbers.
pub(crate) fn furthest(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "numbers");
    assert!(found.iter().all(|x| x.is_finite()), "a number is not finite");
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
