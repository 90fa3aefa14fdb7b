use candle_core::{Result, Tensor};

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

    /// Appends the keys and values of new positions and returns those of all. They leave the autograd
    /// graph: it would keep every step's activations alive.
    pub(crate) fn append(&mut self, layer: usize, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = (k.detach(), v.detach());
        let all = match self.layers.get(layer) {
            None => (k, v),
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, &k], 1)?, Tensor::cat(&[old_v, &v], 1)?),
        };
        if layer < self.layers.len() {
            self.layers[layer] = all.clone();
        } else {
            self.layers.push(all.clone());
        }
        Ok(all)
    }

    /// Marks `n` positions as decoded, once every layer has appended them.
    pub(crate) fn advance(&mut self, n: usize) {
        self.len += n;
    }
}
