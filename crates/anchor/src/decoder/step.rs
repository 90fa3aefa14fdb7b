use std::ops::Range;
use std::sync::Arc;

use memory_bank::{LORA_ALPHA, LoraMatrix, MemoryPart};
use ops::decode::{
    Attending, FfnLoraRuns, FfnRun, KvPages, KvRun, KvWeights, LoraRun, Place, Reading, SequenceCache,
    add_ffn, add_ffn_lora, add_kv_memory, add_lora, add_rms_norm_rows, norm_rope_rows, rms_norm_rows,
    soft_cap,
};

use super::{Decoder, Layer, PackedBlock, PathMemory};
use crate::model::{kv_memory_shape, scoring};
use crate::{Error, LayerShape, Result};

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
            segment.memory.blocks().iter().try_for_each(|block| block.check(config))?;
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
            if let Some(factor) = self.config.form.embedding_scale {
                let embedded = &mut x[first_row * d..(first_row + n_rows) * d];
                embedded.iter_mut().for_each(|x| *x *= factor as f32);
            }
            rows.readings.push(Reading { cache: segment.cache, first_row, n_rows });
            rows.memories.push(segment.memory);
        }
        (rows, x)
    }

    /// x += attention(norm(x)), normed once more before it is added where the form has it so.
    fn attend(&self, (index, layer): (usize, &Layer), pages: &mut KvPages, rows: &Rows, x: &mut [f32]) {
        let LayerShape { heads, window, .. } = layer.shape;
        let (n, eps) = (rows.positions.len(), self.config.norm_eps);
        let (a, e) = (layer.shape.query_width(), layer.shape.kv_width());
        let mut normed = vec![0.0; x.len()];
        rms_norm_rows(x, &layer.attention_norm, eps, &mut normed);
        let mut qkv = vec![0.0; n * (a + 2 * e)];
        layer.qkv.multiply(&normed, &mut qkv);
        for (matrix, column) in [(LoraMatrix::Query, 0), (LoraMatrix::Key, a), (LoraMatrix::Value, a + e)] {
            let place = Place { column, row: a + 2 * e };
            rows.add_lora((index, matrix), &normed, (&mut qkv, place));
        }
        let part = |first: usize, width: usize| {
            let qkv = &qkv;
            move |row: usize| &qkv[row * (a + 2 * e) + first..][..width]
        };
        let (mut q, mut k) = (vec![0.0; n * a], vec![0.0; n * e]);
        let rope = (self.rope.of_layer(layer.shape), eps);
        norm_rope_rows(part(0, a), layer.query_norm.as_deref(), rope, &rows.positions, &mut q);
        norm_rope_rows(part(a, e), layer.key_norm.as_deref(), rope, &rows.positions, &mut k);
        pages.append(index, &rows.readings, |row| &k[row * e..][..e], part(a + e, e));
        let mut mixed = vec![0.0; n * a];
        let attending = Attending { layer: index, heads, window, scoring: scoring(&self.config) };
        pages.attend(attending, &rows.readings, &q, &mut mixed);
        let runs = rows.kv_runs(index);
        if !runs.is_empty() {
            let q = unturned((0..n).flat_map(part(0, a)), layer.query_norm.as_deref(), eps);
            add_kv_memory(&q, &mut mixed, kv_memory_shape(&self.config, layer.shape), &runs);
        }
        let (output, place) = ((index, LoraMatrix::Output), Place { column: 0, row: self.config.d_model });
        match &layer.attention_post_norm {
            None => {
                layer.attention_output.multiply_add(&mixed, x);
                rows.add_lora(output, &mixed, (x, place));
            }
            Some(gain) => {
                layer.attention_output.multiply(&mixed, &mut normed);
                rows.add_lora(output, &mixed, (&mut normed, place));
                add_rms_norm_rows(&normed, gain, eps, x);
            }
        }
    }

    /// x += FFN(norm(x)) + Σ_levels memory(norm(x)), the sum normed once more before it is added where the form has
    /// it so.
    fn feed_forward(&self, (index, layer): (usize, &Layer), rows: &Rows, x: &mut [f32]) {
        let mut normed = vec![0.0; x.len()];
        rms_norm_rows(x, &layer.ffn_norm, self.config.norm_eps, &mut normed);
        match &layer.ffn_post_norm {
            None => self.add_ffns((index, layer), rows, &normed, x),
            Some(gain) => {
                let mut added = vec![0.0; x.len()];
                self.add_ffns((index, layer), rows, &normed, &mut added);
                add_rms_norm_rows(&added, gain, self.config.norm_eps, x);
            }
        }
    }

    /// y += FFN(normed) + Σ_levels memory(normed)
    fn add_ffns(&self, (index, layer): (usize, &Layer), rows: &Rows, normed: &[f32], y: &mut [f32]) {
        let (n, d, activation) = (rows.positions.len(), self.config.d_model, self.config.form.activation);
        let mut levels = match rows.ffn_lora(index) {
            Some(lora) => {
                add_ffn_lora((normed, y, d), activation, &layer.ffn, &lora);
                vec![]
            }
            None => vec![vec![FfnRun { weights: &layer.ffn, rows: 0..n }]],
        };
        let run = |(weights, rows)| FfnRun { weights, rows };
        let of_level = |level| rows.runs(level, |block| block.ffn(index)).into_iter().map(run).collect();
        levels.extend((0..rows.n_levels()).map(of_level));
        add_ffn(normed, y, d, activation, &levels);
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
        if let Some(cap) = self.config.form.logit_cap {
            soft_cap(&mut values, 1.0, cap as f32);
        }
        Logits { values, vocab_size }
    }
}

/// Parts of blocks, and the rows that each serves.
type Runs<'a, T> = Vec<(&'a T, Range<usize>)>;

impl Rows<'_> {
    /// The most blocks of a path.
    fn n_levels(&self) -> usize {
        self.memories.iter().map(|memory| memory.blocks().len()).max().unwrap_or(0)
    }

    /// The rows of each block of a level that has what is asked for.
    fn runs<T>(&self, level: usize, of: impl Fn(&PackedBlock) -> Option<&T>) -> Runs<'_, T> {
        let mut runs: Runs<T> = vec![];
        let mut last: Option<&Arc<PackedBlock>> = None;
        for (reading, memory) in self.readings.iter().zip(&self.memories) {
            let Some(block) = memory.blocks().get(level) else { continue };
            let Some(found) = of(block) else { continue };
            let (first, end) = (reading.first_row, reading.first_row + reading.n_rows);
            let goes_on = last.is_some_and(|last| Arc::ptr_eq(last, block));
            match runs.last_mut().filter(|(_, rows)| goes_on && rows.end == first) {
                Some((_, rows)) => rows.end = end,
                None => runs.push((found, first..end)),
            }
            last = Some(block);
        }
        runs
    }

    /// The additions to a matrix of a layer, per level.
    fn lora_runs(&self, layer: usize, matrix: LoraMatrix) -> Vec<Vec<LoraRun<'_>>> {
        let run = |(weights, rows)| LoraRun { weights, rows };
        let of_level = |level| {
            let runs = self.runs(level, |block| block.lora(layer, MemoryPart::Lora(matrix)));
            runs.into_iter().map(run).collect::<Vec<_>>()
        };
        (0..self.n_levels()).map(of_level).filter(|runs| !runs.is_empty()).collect()
    }

    /// y += the additions to a matrix of a layer, times x.
    fn add_lora(&self, (layer, matrix): (usize, LoraMatrix), x: &[f32], (y, place): (&mut [f32], Place)) {
        let levels = self.lora_runs(layer, matrix);
        levels.iter().for_each(|runs| add_lora(x, (&mut *y, place), LORA_ALPHA, runs));
    }

    /// The additions to the FFN of a layer; none when no row has any.
    fn ffn_lora(&self, layer: usize) -> Option<FfnLoraRuns<'_>> {
        let [gate, up, down] =
            [LoraMatrix::Gate, LoraMatrix::Up, LoraMatrix::Down].map(|of| self.lora_runs(layer, of));
        (!down.is_empty()).then_some(FfnLoraRuns { gate, up, down, alpha: LORA_ALPHA })
    }

    /// The pairs beside those of a layer's attention: of each sequence those of all of its blocks.
    fn kv_runs(&self, layer: usize) -> Vec<KvRun<'_>> {
        let mut runs: Vec<KvRun> = vec![];
        for (reading, memory) in self.readings.iter().zip(&self.memories) {
            let weights: Vec<&KvWeights> =
                memory.blocks().iter().filter_map(|block| block.kv(layer)).collect();
            let (first, end) = (reading.first_row, reading.first_row + reading.n_rows);
            let same = |run: &&mut KvRun| {
                let pairs = run.weights.iter().zip(&weights);
                run.weights.len() == weights.len() && pairs.into_iter().all(|(a, b)| std::ptr::eq(*a, *b))
            };
            match runs.last_mut().filter(|run| run.rows.end == first).filter(same) {
                Some(run) => run.rows.end = end,
                None if weights.is_empty() => {}
                None => runs.push(KvRun { weights, rows: first..end }),
            }
        }
        runs
    }
}

/// Rows of queries as KV memory takes them: normed, but turned by no position.
fn unturned<'a>(rows: impl Iterator<Item = &'a f32>, gain: Option<&[f32]>, eps: f64) -> Vec<f32> {
    let rows: Vec<f32> = rows.copied().collect();
    let Some(gain) = gain else { return rows };
    let mut normed = vec![0.0; rows.len()];
    rms_norm_rows(&rows, gain, eps, &mut normed);
    normed
}
