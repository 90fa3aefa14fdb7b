use std::path::Path;

use crate::adamw::squared_norm;
use crate::checkpoint::read_steps;
use crate::manifest::{Manifest, OPTIMIZER, VALUES, Verify, verify};
use crate::tensor_file::{Reader, optimizer_tensors, value_tensors};
use crate::{BlockSpec, Result};

/// What a bank's folder holds, in numbers.
#[derive(Clone, PartialEq, Debug)]
pub struct Inspection {
    /// The folder's manifest.
    pub manifest: Manifest,
    /// The levels with memory, coarse to fine.
    pub levels: Vec<LevelInspection>,
}

/// One level of a bank, the generic block counted where nothing else is said.
#[derive(Clone, PartialEq, Debug)]
pub struct LevelInspection {
    /// The level, 0 the coarsest.
    pub level: usize,
    /// Blocks, the generic one not counted.
    pub n_blocks: u64,
    /// Blocks updated at least once.
    pub n_touched: u64,
    /// Parameters, the generic block not counted.
    pub n_parameters: u64,
    /// Bytes of the level's tensor of weights.
    pub bytes: u64,
    /// Mean number of updates of the touched blocks; 0 when there are none.
    pub mean_updates: f64,
    /// Most updates of one block.
    pub max_updates: u64,
    /// L2 norm of the M3 of all touched blocks together: how far the memory is from adding nothing.
    pub m3_norm: f64,
}

/// Reads the folder of a bank: sizes are checked, and only touched blocks are read.
pub fn inspect(folder: &Path) -> Result<Inspection> {
    let manifest = verify(folder, Verify::Sizes)?;
    let spec = &manifest.spec;
    let mut values = Reader::open(&folder.join(VALUES), &value_tensors(spec))?;
    let mut optimizer = Reader::open(&folder.join(OPTIMIZER), &optimizer_tensors(spec))?;
    let all_steps = read_steps(&mut optimizer, folder, &manifest)?;
    let mut levels = Vec::new();
    for (place, level) in spec.levels().enumerate() {
        let (n_blocks, len) = (spec.n_blocks(level), spec.block_len(level));
        let steps = &all_steps[place];
        let touched: Vec<usize> = (0..=n_blocks).filter(|&row| steps[row] > 0).collect();
        let mut m3_squared = 0.0;
        for row in &touched {
            m3_squared += m3_squared_norm(spec, level, &values.read(place, row * len, len)?);
        }
        levels.push(LevelInspection {
            level,
            n_blocks: n_blocks as u64,
            n_touched: touched.len() as u64,
            n_parameters: n_blocks as u64 * len as u64,
            bytes: (n_blocks as u64 + 1) * len as u64 * size_of::<f32>() as u64,
            mean_updates: steps.iter().sum::<u64>() as f64 / touched.len().max(1) as f64,
            max_updates: steps.iter().copied().max().unwrap_or_default(),
            m3_norm: m3_squared.sqrt(),
        });
    }
    Ok(Inspection { manifest, levels })
}

/// `block` is `[L, 3, r, d]`.
fn m3_squared_norm(spec: &BlockSpec, level: usize, block: &[f32]) -> f64 {
    let matrix_len = spec.width[level] * spec.d_model;
    block.chunks_exact(3 * matrix_len).map(|layer| squared_norm(&layer[2 * matrix_len..])).sum()
}
