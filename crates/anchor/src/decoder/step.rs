use std::sync::Arc;

use ops::decode::{FfnRun, KvPages, Reading, SequenceCache, add_ffn, norm_rope_rows, rms_norm_rows};

use super::{Decoder, Layer, PackedBlock, PathMemory};
use crate::{Error, Result};

/// Which of a segment's tokens are scored: the scores of a token are those of the one after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// None: the prompt goes on in a later step.
    None,
    /// The last one.
    Last,
    /// All of them.
    All,
}

/// What one sequence adds in a step.
pub struct Segment<'a> {
    /// Its next tokens, at least one.
    pub tokens: &'a [u32],
    /// What it holds so far; the tokens are appended.
    pub cache: &'a mut SequenceCache,
    /// Its memory.
    pub memory: &'a PathMemory,
    /// Which of its tokens are scored.
    pub scores: Scores,
}

/// Scores of next tokens, [rows, V]: segments in the order they were given, each its tokens in order.
pub struct Logits {
    values: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    /// Tokens that were scored.
    pub fn n_rows(&self) -> usize {
        self.values.len() / self.vocab_size
    }

    /// The scores of one, [V].
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.vocab_size..][..self.vocab_size]
    }
}

/// The rows of a step, sequences in the order of their blocks, so that those that share one stand together.
struct Rows<'a> {
    readings: Vec<Reading<'a>>,
    memories: Vec<&'a PathMemory>,
    positions: Vec<u32>,
}

impl Decoder {
    /// One step: every segment's tokens go through all layers and into its cache.
    ///
    /// # Errors
    /// When a segment has no tokens or no room, a token or position is out of range, or memory was made for
    /// another anchor; nothing is appended then.
    pub fn step(&self, pages: &mut KvPages, segments: &mut [Segment]) -> Result<Logits> {
        self.check(segments)?;
        let mut order: Vec<usize> = (0..segments.len()).collect();
        let blocks =
            |i: &usize| segments[*i].memory.blocks().iter().map(|block| (block.id(), Arc::as_ptr(block)));
        order.sort_by(|a, b| blocks(a).cmp(blocks(b)));
        let logits = ops::on_pool(|| {
            let (rows, mut x) = self.rows(&order, segments);
            for (i, layer) in self.layers.iter().enumerate() {
                self.attend((i, layer), pages, &rows, &mut x);
                self.feed_forward((i, layer), &rows, &mut x);
            }
            self.logits(&order, segments, &rows, &x)
        });
        for segment in segments {
            segment.cache.advance(segment.tokens.len());
        }
        Ok(logits)
    }

    fn check(&self, segments: &[Segment]) -> Result<()> {
        let config = &self.config;
        for (i, segment) in segments.iter().enumerate() {
            let wrong = |what, found: String| Err(Error::Segment { segment: i, what, found });
            let end = segment.cache.len() + segment.tokens.len();
            if segment.tokens.is_empty() {
                return wrong("at least one token", "none".into());
            }
            if end > config.max_seq_len.min(segment.cache.capacity()) {
                let (limit, room) = (config.max_seq_len, segment.cache.capacity());
                return wrong(
                    "positions of the anchor and room for them",
                    format!("{end}, of {limit} and {room}"),
                );
            }
            if let Some(token) = segment.tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
                return wrong("tokens of the vocabulary", format!("{token} of {}", config.vocab_size));
            }
            let shape = (config.n_layers, config.d_model);
            if let Some(other) = segment.memory.blocks().iter().find(|block| block.shape() != shape) {
                let (found_layers, found_width) = other.shape();
                return Err(Error::MemoryShape {
                    found_layers,
                    found_width,
                    layers: shape.0,
                    width: shape.1,
                });
            }
        }
        Ok(())
    }

    /// The rows in this order of segments, and their embedded tokens [N, D].
    fn rows<'a>(&self, order: &[usize], segments: &'a [Segment]) -> (Rows<'a>, Vec<f32>) {
        let mut rows = Rows { readings: vec![], memories: vec![], positions: vec![] };
        let d = self.config.d_model;
        let n = segments.iter().map(|segment| segment.tokens.len()).sum::<usize>();
        let mut x = vec![0.0; n * d];
        let table = self.token_embedding.as_ref().unwrap_or(&self.output);
        for segment in order.iter().map(|&i| &segments[i]) {
            let (first_row, n_rows) = (rows.positions.len(), segment.tokens.len());
            for (&token, x) in segment.tokens.iter().zip(x[first_row * d..].chunks_exact_mut(d)) {
                table.row(token as usize, x);
            }
            let first = segment.cache.len() as u32;
            rows.positions.extend(first..first + n_rows as u32);
            rows.readings.push(Reading { cache: segment.cache, first_row, n_rows });
            rows.memories.push(segment.memory);
        }
        (rows, x)
    }

    /// x += attention(norm(x))
    fn attend(&self, (index, layer): (usize, &Layer), pages: &mut KvPages, rows: &Rows, x: &mut [f32]) {
        let (n, a, eps) = (rows.positions.len(), self.config.attention_width(), self.config.norm_eps);
        let mut normed = vec![0.0; x.len()];
        rms_norm_rows(x, &layer.attention_norm, eps, &mut normed);
        let mut qkv = vec![0.0; n * 3 * a];
        layer.qkv.multiply(&normed, &mut qkv);
        let part = |which: usize| {
            let qkv = &qkv;
            move |row: usize| &qkv[(3 * row + which) * a..][..a]
        };
        let (mut q, mut k) = (vec![0.0; n * a], vec![0.0; n * a]);
        let rope = (&self.rope, eps);
        norm_rope_rows(part(0), &layer.query_norm, rope, &rows.positions, &mut q);
        norm_rope_rows(part(1), &layer.key_norm, rope, &rows.positions, &mut k);
        pages.append(index, &rows.readings, |row| &k[row * a..][..a], part(2));
        let mut mixed = vec![0.0; n * a];
        pages.attend(index, &rows.readings, &q, &mut mixed);
        layer.attention_output.multiply_add(&mixed, x);
    }

    /// x += FFN(norm(x)) + Σ_levels memory(norm(x))
    fn feed_forward(&self, (index, layer): (usize, &Layer), rows: &Rows, x: &mut [f32]) {
        let (n, d) = (rows.positions.len(), self.config.d_model);
        let mut normed = vec![0.0; x.len()];
        rms_norm_rows(x, &layer.ffn_norm, self.config.norm_eps, &mut normed);
        let mut levels = vec![vec![FfnRun { weights: &layer.ffn, rows: 0..n }]];
        let n_levels = rows.memories.iter().map(|memory| memory.blocks().len()).max().unwrap_or(0);
        levels.extend((0..n_levels).map(|level| rows.runs(level, index)));
        add_ffn(&normed, x, d, &levels);
    }

    /// The scores that are asked for, in the order of the segments.
    fn logits(&self, order: &[usize], segments: &[Segment], rows: &Rows, x: &[f32]) -> Logits {
        let (d, vocab_size) = (self.config.d_model, self.config.vocab_size);
        let mut place = vec![0; order.len()];
        order.iter().zip(&rows.readings).for_each(|(&i, reading)| place[i] = reading.first_row);
        let mut scored = vec![];
        for (segment, first) in segments.iter().zip(place) {
            let n = segment.tokens.len();
            let which = match segment.scores {
                Scores::None => n..n,
                Scores::Last => n - 1..n,
                Scores::All => 0..n,
            };
            scored.extend_from_slice(&x[(first + which.start) * d..(first + which.end) * d]);
        }
        let mut hidden = vec![0.0; scored.len()];
        rms_norm_rows(&scored, &self.final_norm, self.config.norm_eps, &mut hidden);
        let mut values = vec![0.0; scored.len() / d * vocab_size];
        self.output.multiply(&hidden, &mut values);
        Logits { values, vocab_size }
    }
}

impl Rows<'_> {
    /// The rows of each block of a level, in one layer.
    fn runs(&self, level: usize, layer: usize) -> Vec<FfnRun<'_>> {
        let mut runs: Vec<(&Arc<PackedBlock>, FfnRun)> = vec![];
        for (reading, memory) in self.readings.iter().zip(&self.memories) {
            let Some(block) = memory.blocks().get(level) else { continue };
            let (first, end) = (reading.first_row, reading.first_row + reading.n_rows);
            match runs.last_mut() {
                Some((last, run)) if Arc::ptr_eq(last, block) && run.rows.end == first => run.rows.end = end,
                _ => runs.push((block, FfnRun { weights: block.layer(layer), rows: first..end })),
            }
        }
        runs.into_iter().map(|(_, run)| run).collect()
    }
}
