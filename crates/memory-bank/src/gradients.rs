use std::collections::{BTreeMap, BTreeSet};

use cluster_tree::ClusterId;
use half::bf16;
use rayon::prelude::*;

use crate::{Block, BlockSpec, Error, Result};

/// The largest magnitude that a gradient may have: beyond it, the square of the sum over thousands
/// of ranks would not fit an f32, and the second moment of the block would be lost for good.
pub const MAX_GRADIENT: f32 = 1e15;

/// The numbers of one block, in the precision in which they came.
#[derive(Clone, PartialEq, Debug)]
pub enum Values {
    /// Single precision.
    F32(Vec<f32>),
    /// The upper half of single precision.
    Bf16(Vec<bf16>),
}

impl Values {
    /// How many numbers these are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes in memory, for what arrives in little-endian.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice_mut(values),
            Self::Bf16(values) => bytemuck::cast_slice_mut(values),
        }
    }

    /// The first number whose magnitude is not a gradient's, with its position.
    fn first_wrong(&self) -> Option<(usize, f32)> {
        let limit = bf16_limit();
        match self {
            Self::F32(values) => first_wrong(values),
            Self::Bf16(values) if values.iter().map(|&x| magnitude_bf16(x)).fold(0, u16::max) <= limit => {
                None
            }
            Self::Bf16(values) => {
                let is_wrong = |value: &bf16| magnitude_bf16(*value) > limit;
                values.iter().position(is_wrong).map(|position| (position, values[position].to_f32()))
            }
        }
    }
}

impl Default for Values {
    fn default() -> Self {
        Self::F32(Vec::new())
    }
}

/// One push: gradients that fit their blocks, at most one a block.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Gradients(BTreeMap<ClusterId, Values>);

impl Gradients {
    /// Checks a push against the spec. Fails on a block that the spec does not have, on a wrong
    /// length, on a value that is not finite or above [`MAX_GRADIENT`], and on two gradients of one
    /// block.
    pub fn new(spec: &BlockSpec, blocks: Vec<Block>) -> Result<Self> {
        Self::check(spec, &blocks)?;
        Ok(Self(blocks.into_iter().map(|block| (block.id, Values::F32(block.values))).collect()))
    }

    /// Adds a gradient, in either precision. Fails where [`Gradients::new`] does: what arrives block by
    /// block is best checked at once, while the block is still in the cache.
    pub fn insert(&mut self, spec: &BlockSpec, id: ClusterId, values: Values) -> Result<()> {
        check_size(spec, id, values.len())?;
        if let Some((position, value)) = values.first_wrong() {
            return Err(Error::GradientValue { id, position, value, limit: MAX_GRADIENT });
        }
        match self.0.insert(id, values) {
            None => Ok(()),
            Some(_) => Err(Error::RepeatedGradient { id }),
        }
    }

    /// Fails where [`Gradients::new`] does, and leaves the blocks with the caller: who sends them to
    /// several shards finds out before one of them has applied its part.
    pub fn check(spec: &BlockSpec, blocks: &[Block]) -> Result<()> {
        let mut ids = BTreeSet::new();
        for block in blocks {
            check_size(spec, block.id, block.values.len())?;
            if !ids.insert(block.id) {
                return Err(Error::RepeatedGradient { id: block.id });
            }
        }
        let wrong = blocks.par_iter().find_map_first(|block| {
            let (position, value) = first_wrong(&block.values)?;
            Some(Error::GradientValue { id: block.id, position, value, limit: MAX_GRADIENT })
        });
        wrong.map_or(Ok(()), Err)
    }

    /// The blocks that have a gradient.
    pub fn ids(&self) -> impl Iterator<Item = ClusterId> {
        self.0.keys().copied()
    }

    /// In the order of ids.
    pub(crate) fn into_blocks(self) -> impl Iterator<Item = (ClusterId, Values)> {
        self.0.into_iter()
    }
}

/// Fails on a block that the spec does not have, and on a gradient of another length than the block's.
fn check_size(spec: &BlockSpec, id: ClusterId, found: usize) -> Result<()> {
    spec.check(id)?;
    match spec.block_len(usize::from(id.level)) {
        expected if expected == found => Ok(()),
        expected => Err(Error::GradientLength { id, expected, found }),
    }
}

/// The first number whose magnitude is not a gradient's, with its position.
fn first_wrong(values: &[f32]) -> Option<(usize, f32)> {
    if is_bounded(values) {
        return None;
    }
    let is_wrong = |value: &f32| magnitude(*value) > MAX_GRADIENT.to_bits();
    values.iter().position(is_wrong).map(|position| (position, values[position]))
}

/// Compares bit patterns: without the sign, those of NaN and infinity are above every number's, and
/// integers vectorise where a comparison that minds NaN does not.
fn is_bounded(values: &[f32]) -> bool {
    values.iter().map(|&value| magnitude(value)).fold(0, u32::max) <= MAX_GRADIENT.to_bits()
}

fn magnitude(value: f32) -> u32 {
    value.to_bits() & !(1 << 31)
}

fn magnitude_bf16(value: bf16) -> u16 {
    value.to_bits() & !(1 << 15)
}

/// The largest magnitude in bf16 that is at most [`MAX_GRADIENT`].
fn bf16_limit() -> u16 {
    (MAX_GRADIENT.to_bits() >> 16) as u16
}
