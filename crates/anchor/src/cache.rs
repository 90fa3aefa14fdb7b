use candle_core::{Result, Tensor};
use ops::Traced;

/// Keys and values of the positions decoded so far, per layer [B, S, H·K].
#[derive(Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    /// Of the positions that are being decoded: what becomes `layers` once all layers have appended.
    pending: Vec<(Tensor, Tensor)>,
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

    /// The keys and values of all positions of a layer, the new ones among them. Layers come in order.
    pub(crate) fn append(&mut self, layer: usize, k: &Traced, v: &Traced) -> Result<(Traced, Traced)> {
        let (k, v) = (k.value(), v.value());
        let all = match self.layers.get(layer) {
            None => (k.clone(), v.clone()),
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, k], 1)?, Tensor::cat(&[old_v, v], 1)?),
        };
        // What an attempt that failed left behind goes.
        self.pending.truncate(layer);
        self.pending.push(all.clone());
        Ok((Traced::constant(all.0), Traced::constant(all.1)))
    }

    /// Keeps what the layers have appended: `n` more positions are decoded.
    pub(crate) fn advance(&mut self, n: usize) {
        self.layers = std::mem::take(&mut self.pending);
        self.len += n;
    }
}
