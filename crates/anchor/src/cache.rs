use candle_core::{Result, Tensor};
use ops::Traced;

/// Keys and values of the positions decoded so far, per layer [B, S, H·K].
#[derive(Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
}

impl KvCache {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was decoded yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the keys and values of new positions and returns those of all, as constants.
    pub(crate) fn append(&mut self, layer: usize, k: &Traced, v: &Traced) -> Result<(Traced, Traced)> {
        let (k, v) = (k.value(), v.value());
        let all = match self.layers.get(layer) {
            None => (k.clone(), v.clone()),
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, k], 1)?, Tensor::cat(&[old_v, v], 1)?),
        };
        if layer < self.layers.len() {
            self.layers[layer] = all.clone();
        } else {
            self.layers.push(all.clone());
        }
        Ok((Traced::constant(all.0), Traced::constant(all.1)))
    }

    /// Marks `n` positions as decoded, once every layer has appended them.
    pub(crate) fn advance(&mut self, n: usize) {
        self.len += n;
    }
}
