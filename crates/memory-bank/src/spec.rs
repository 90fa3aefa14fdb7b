use std::ops::Range;

use cluster_tree::ClusterId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, LayerWidths, MemoryKind, MemoryLayers, MemoryPart, Result};

/// The sizes of a bank: one block per cluster, and one generic block per level.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// What the parameters are.
    pub kind: MemoryKind,
    /// Layers of the anchor, L.
    pub n_layers: usize,
    /// Model dimension of the anchor, d.
    pub d_model: usize,
    /// Memory width r per level, coarse to fine; 0 is a level without memory.
    pub width: Vec<usize>,
    /// Branching k per level of the cluster tree, coarse to fine.
    pub branching: Vec<usize>,
    /// Layers of the anchor that have memory; left out of JSON when it is all of them.
    #[serde(default, skip_serializing_if = "MemoryLayers::is_uniform")]
    pub layers: MemoryLayers,
    /// Widths within the anchor's layers, which the sizes of every kind but FFN memory follow from, which has
    /// none: one for all layers, or one for each of the L.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inner: Vec<LayerWidths>,
}

/// A part of a block, and where its numbers are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockPart {
    /// The layer of the anchor.
    pub layer: usize,
    /// What it is.
    pub part: MemoryPart,
    /// Its numbers among those of the block.
    pub range: Range<usize>,
}

impl BlockSpec {
    /// FFN memory in every layer of an anchor of `n_layers` and `d_model`.
    pub fn ffn(n_layers: usize, d_model: usize, width: Vec<usize>, branching: Vec<usize>) -> Self {
        let layers = MemoryLayers::Uniform;
        Self { kind: MemoryKind::Ffn, n_layers, d_model, width, branching, layers, inner: vec![] }
    }

    /// Fails on a spec that describes no bank: a size of 0, other than a width, widths and
    /// branchings of different numbers of levels, no memory at all, or a bank too large to count.
    pub fn validate(&self) -> Result<()> {
        let n_levels = self.width.len();
        let wrong = |field, expected: &str, found: String| {
            Err(Error::Setting { field, expected: expected.to_owned(), found })
        };
        if self.n_layers == 0 {
            return wrong("n_layers", "at least 1", "0".to_owned());
        }
        if self.d_model == 0 {
            return wrong("d_model", "at least 1", "0".to_owned());
        }
        if n_levels == 0 || n_levels > usize::from(u8::MAX) {
            return wrong("width", "1 to 255 levels", format!("{n_levels} levels"));
        }
        if self.width.iter().all(|&width| width == 0) {
            return wrong("width", "a level wider than 0", format!("{:?}", self.width));
        }
        if self.branching.len() != n_levels {
            let (expected, found) = (format!("{n_levels} levels, as in width"), self.branching.len());
            return wrong("branching", &expected, format!("{found} levels"));
        }
        if self.branching.contains(&0) {
            return wrong("branching", "at least 1 at every level", format!("{:?}", self.branching));
        }
        self.layers.validate(self.n_layers)?;
        self.validate_inner()?;
        if !self.is_countable() {
            let expected = "less than 2^32 blocks a level and 2^60 parameters";
            return wrong(
                "branching and width",
                expected,
                format!("{:?} and {:?}", self.branching, self.width),
            );
        }
        Ok(())
    }

    /// Fails on widths within layers that the kind has no use for, or lacks.
    fn validate_inner(&self) -> Result<()> {
        let n = self.inner.len();
        let expected = match self.kind {
            MemoryKind::Ffn if n == 0 => return Ok(()),
            MemoryKind::Ffn => "none with kind ffn".to_owned(),
            _ if n == 1 || n == self.n_layers => match self.inner.iter().find(|widths| !widths.fit()) {
                None => return Ok(()),
                Some(widths) => {
                    let expected =
                        "widths of at least 1, those of queries and keys of whole heads".to_owned();
                    return Err(Error::Setting { field: "inner", expected, found: format!("{widths:?}") });
                }
            },
            kind => format!("1 or {} with kind {kind}", self.n_layers),
        };
        Err(Error::Setting { field: "inner", expected, found: format!("of {n} layers") })
    }

    /// Parameters per unit of memory width, c0: of FFN memory 3·L·d (paper section 3), L being the layers with
    /// memory; of LoRA memory Σ (I + O) over its matrices, and of KV memory Σ 2·width of keys.
    pub fn unit(&self) -> u64 {
        u64::try_from(self.unit_wide()).unwrap_or(u64::MAX)
    }

    fn unit_wide(&self) -> u128 {
        let n = self.n_memory_layers();
        match self.inner.len() {
            // Not by layer: a spec may be another's, and of any number of them.
            0 | 1 => self.layer_unit(0).saturating_mul(n as u128),
            _ => self.memory_layers().map(|layer| self.layer_unit(layer)).fold(0, u128::saturating_add),
        }
    }

    /// Parameters of a layer per unit of memory width.
    fn layer_unit(&self, layer: usize) -> u128 {
        self.kind.parts().iter().map(|&part| self.part_unit(part, layer)).sum()
    }

    /// Parameters of a part of a layer per unit of memory width.
    fn part_unit(&self, part: MemoryPart, layer: usize) -> u128 {
        let wide = |n: usize| n as u128;
        match part {
            MemoryPart::Ffn => 3 * wide(self.d_model),
            MemoryPart::Lora(matrix) => {
                let (from, to) = matrix.widths(self.d_model, self.inner_of(layer));
                wide(from) + wide(to)
            }
            MemoryPart::Kv => 2 * wide(self.inner_of(layer).key_value),
        }
    }

    /// The widths within a layer; of FFN memory, whose sizes do not follow from them, zeros.
    pub fn inner_of(&self, layer: usize) -> LayerWidths {
        let none = LayerWidths { query: 0, key_value: 0, head: 0, ffn: 0 };
        self.inner.get(layer).or(self.inner.first()).copied().unwrap_or(none)
    }

    /// How many layers of the anchor have memory.
    pub fn n_memory_layers(&self) -> usize {
        self.layers.count(self.n_layers)
    }

    /// The layers of the anchor that have memory, ascending.
    pub fn memory_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.n_memory_layers()).map(|index| self.layers.at(self.n_layers, index))
    }

    /// The parts of a block of a level, in the order of its numbers: layer by layer, and in each those of
    /// [`MemoryKind::parts`].
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn parts(&self, level: usize) -> Vec<BlockPart> {
        let (width, mut start) = (self.width[level], 0);
        let mut parts = Vec::new();
        for layer in self.memory_layers() {
            for &part in self.kind.parts() {
                let len = self.part_unit(part, layer) as usize * width;
                parts.push(BlockPart { layer, part, range: start..start + len });
                start += len;
            }
        }
        parts
    }

    /// The shape of a block of a level, as files and messages give it, L being the layers with memory: of FFN
    /// memory `[L, 3, r, d]`. Of other kinds, where all layers are of the same widths, `[L, 2, r, width of keys]`
    /// of KV memory and `[L, numbers of a layer]` of LoRA memory; otherwise the number of its numbers.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn block_shape(&self, level: usize) -> Vec<usize> {
        let (n, r) = (self.n_memory_layers(), self.width[level]);
        match self.kind {
            MemoryKind::Ffn => vec![n, 3, r, self.d_model],
            _ if self.inner.len() != 1 => vec![self.block_len(level)],
            MemoryKind::Kv => vec![n, 2, r, self.inner_of(0).key_value],
            MemoryKind::Lora { .. } => vec![n, self.layer_unit(0) as usize * r],
        }
    }

    /// Numbers that share a scale where blocks are held as int8: of FFN memory a row of d, of other kinds as many
    /// as divide the rows of all of its matrices.
    pub fn row_len(&self) -> usize {
        if self.kind == MemoryKind::Ffn {
            return self.d_model;
        }
        let rows = |widths: &LayerWidths| {
            self.kind.parts().iter().fold(0, |all, part| match part {
                MemoryPart::Ffn => gcd(all, self.d_model),
                MemoryPart::Kv => gcd(all, widths.key_value),
                MemoryPart::Lora(matrix) => {
                    let (from, to) = matrix.widths(self.d_model, *widths);
                    gcd(gcd(all, from), to)
                }
            })
        };
        self.inner.iter().map(rows).fold(0, gcd).max(1)
    }

    /// Number of levels of the tree, with memory or without.
    pub fn n_levels(&self) -> usize {
        self.width.len()
    }

    /// Parameters of one block of a level: s = c0·r.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn block_len(&self, level: usize) -> usize {
        self.unit() as usize * self.width[level]
    }

    /// Parameters that one path fetches: Σ s_l.
    pub fn fetch_len(&self) -> u64 {
        self.levels().map(|level| self.block_len(level) as u64).sum()
    }

    /// Parameters of the bank: Σ n_blocks·s_l, the generic blocks not counted.
    pub fn bank_len(&self) -> u64 {
        self.levels().map(|level| self.n_blocks(level) as u64 * self.block_len(level) as u64).sum()
    }

    /// Blocks of a level, the generic one not counted: the product of the branchings down to it.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn n_blocks(&self, level: usize) -> usize {
        self.branching[..=level].iter().product()
    }

    /// The levels that have memory, coarse to fine.
    pub fn levels(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.width.len()).filter(|&level| self.width[level] > 0)
    }

    /// Fails on a block that the bank does not have, which every block of a level of width 0 is.
    pub fn check(&self, id: ClusterId) -> Result<()> {
        self.row(id).map(|_| ())
    }

    /// The row of a block in its level's tensor: its index, and `n_blocks` for the generic block.
    /// Fails as [`BlockSpec::check`] does.
    pub fn row(&self, id: ClusterId) -> Result<usize> {
        let level = usize::from(id.level);
        let has_memory = self.width.get(level).is_some_and(|&width| width > 0);
        let n_blocks = if has_memory { self.n_blocks(level) } else { 0 };
        if has_memory && id.is_generic() {
            Ok(n_blocks)
        } else if (id.index as usize) < n_blocks {
            Ok(id.index as usize)
        } else {
            Err(Error::UnknownBlock { id, n_blocks })
        }
    }

    /// SHA-256, in hex, of the spec: two banks with the same hash hold the same blocks.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new_with_prefix(self.kind.name());
        let mut add = |size: usize| hasher.update((size as u64).to_le_bytes());
        let sizes = [self.n_layers, self.d_model, self.n_levels()];
        sizes.iter().chain(&self.width).chain(&self.branching).for_each(|&size| add(size));
        // FFN memory in all layers has the hash that it had before there was anything else.
        if self.n_memory_layers() != self.n_layers {
            add(self.n_memory_layers());
            self.memory_layers().for_each(&mut add);
        }
        for LayerWidths { query, key_value, head, ffn } in &self.inner {
            [*query, *key_value, *head, *ffn].into_iter().for_each(&mut add);
        }
        crate::manifest::hex(&hasher.finalize())
    }

    /// The inverse of [`BlockSpec::row`], for a row of a level with memory.
    pub(crate) fn id_of_row(&self, level: usize, row: usize) -> ClusterId {
        let index = if row == self.n_blocks(level) { ClusterId::GENERIC } else { row as u32 };
        ClusterId { level: level as u8, index }
    }

    fn is_countable(&self) -> bool {
        let unit = self.unit_wide();
        let (mut n_blocks, mut total) = (1u128, 0u128);
        for (&branching, &width) in self.branching.iter().zip(&self.width) {
            n_blocks = n_blocks.saturating_mul(branching as u128);
            // One block more than the clusters: the generic one.
            total = total.saturating_add((n_blocks + 1).saturating_mul(unit).saturating_mul(width as u128));
            if n_blocks >= u128::from(u32::MAX) || total >= 1 << 60 {
                return false;
            }
        }
        true
    }
}

impl LayerWidths {
    fn fit(&self) -> bool {
        let Self { query, key_value, head, ffn } = *self;
        let heads = head > 0 && key_value > 0 && query > 0 && key_value.is_multiple_of(head);
        heads && query.is_multiple_of(key_value) && ffn > 0
    }
}

/// The greatest common divisor; that of 0 and x is x.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
