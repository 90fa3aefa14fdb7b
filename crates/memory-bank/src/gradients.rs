use std::collections::BTreeMap;

use cluster_tree::ClusterId;
use rayon::prelude::*;

use crate::{Block, BlockSpec, Error, Result};

/// The largest magnitude that a gradient may have: beyond it, the square of the sum over thousands
/// of ranks would not fit an f32, and the second moment of the block would be lost for good.
pub const MAX_GRADIENT: f32 = 1e15;

/// One push: gradients that fit their blocks, at most one a block.
#[derive(Clone, PartialEq, Debug)]
pub struct Gradients(BTreeMap<ClusterId, Vec<f32>>);

impl Gradients {
    /// Checks a push against the spec. Fails on a block that the spec does not have, on a wrong
    /// length, on a value that is not finite or above [`MAX_GRADIENT`], and on two gradients of one
    /// block.
    pub fn new(spec: &BlockSpec, blocks: Vec<Block>) -> Result<Self> {
        let mut places = BTreeMap::new();
        for (second, Block { id, values }) in blocks.iter().enumerate() {
            spec.check(*id)?;
            let expected = spec.block_len(usize::from(id.level));
            if values.len() != expected {
                return Err(Error::GradientLength { id: *id, expected, found: values.len() });
            }
            if let Some(first) = places.insert(*id, second) {
                return Err(Error::RepeatedGradient { id: *id, first, second });
            }
        }
        match blocks.par_iter().find_first(|block| !is_bounded(&block.values)) {
            Some(block) => Err(value_error(block)),
            None => Ok(Self(blocks.into_iter().map(|block| (block.id, block.values)).collect())),
        }
    }

    /// In the order of ids.
    pub(crate) fn into_blocks(self) -> impl Iterator<Item = (ClusterId, Vec<f32>)> {
        self.0.into_iter()
    }
}

/// Compares bit patterns: without the sign, those of NaN and infinity are above every number's, and
/// integers vectorise where a comparison that minds NaN does not.
fn is_bounded(values: &[f32]) -> bool {
    values.iter().map(|value| magnitude_bits(*value)).fold(0, u32::max) <= MAX_GRADIENT.to_bits()
}

fn magnitude_bits(value: f32) -> u32 {
    value.to_bits() & !(1 << 31)
}

fn value_error(block: &Block) -> Error {
    let is_wrong = |value: &f32| magnitude_bits(*value) > MAX_GRADIENT.to_bits();
    let position = block.values.iter().position(is_wrong).unwrap_or_default();
    Error::GradientValue { id: block.id, position, value: block.values[position], limit: MAX_GRADIENT }
}
