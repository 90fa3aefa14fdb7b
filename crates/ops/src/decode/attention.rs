use rayon::prelude::*;

use crate::buffer::Shared;
use crate::gemm::{COLUMNS, Kernel, ROWS, Tile, best_kernel};
use crate::math::{exp_sub_sum, max, scale, soft_cap};
use crate::{Precision, Scoring};

/// Keys and values of a decoder's layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Heads of keys and values of each layer, G.
    pub kv_heads: Vec<usize>,
    /// Width of a head, K.
    pub head_width: usize,
}

/// How the rows of a step attend in one layer.
#[derive(Clone, Copy, Debug)]
pub struct Attending {
    /// The layer.
    pub layer: usize,
    /// Heads of queries, H, a multiple of those of keys: each of these serves H/G one after another.
    pub heads: usize,
    /// Positions that a row sees, its own the last; all without one.
    pub window: Option<usize>,
    /// What products of queries and keys become.
    pub scoring: Scoring,
}

/// Keys and values of many sequences in pages of 32 positions, which sequences take and give back.
///
/// A page holds, for each layer and head, its keys as [K, 32] and its values as [⌈K/32⌉, 32, 32]: both are
/// panels of right operands, so that products read them where they are.
pub struct KvPages {
    shape: KvShape,
    /// Where each layer begins in a page, and the numbers of a page.
    layers: Vec<usize>,
    page_len: usize,
    values: Vec<f32>,
    free: Vec<u32>,
    n_pages: usize,
}

/// The pages of one sequence.
#[derive(Debug, Default)]
pub struct SequenceCache {
    pages: Vec<u32>,
    len: usize,
}

impl SequenceCache {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none are.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that it has room for.
    pub fn capacity(&self) -> usize {
        self.pages.len() * KvPages::PAGE
    }

    /// `n` more positions have been written to every layer.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn advance(&mut self, n: usize) {
        assert!(self.len + n <= self.capacity(), "{n} positions after {} of {}", self.len, self.capacity());
        self.len += n;
    }
}

/// Rows of one sequence in a step.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    /// Its pages; the rows stand at its length and on.
    pub cache: &'a SequenceCache,
    /// The first of its rows.
    pub first_row: usize,
    /// How many.
    pub n_rows: usize,
}

impl KvPages {
    /// Positions of a page.
    pub const PAGE: usize = COLUMNS;

    /// Room for `n_positions`, in whole pages. Memory is taken from the system when a page is first used.
    pub fn new(shape: KvShape, n_positions: usize) -> Self {
        let n_pages = n_positions.div_ceil(Self::PAGE);
        let mut page_len = 0;
        let mut layers = vec![];
        for layer in 0..shape.kv_heads.len() {
            layers.push(page_len);
            page_len += Self::layer_len(&shape, layer);
        }
        let values = vec![0.0; n_pages * page_len];
        Self { shape, layers, page_len, values, free: (0..n_pages as u32).rev().collect(), n_pages }
    }

    /// Bytes of a position.
    pub fn position_bytes(shape: &KvShape) -> usize {
        let len: usize = (0..shape.kv_heads.len()).map(|layer| Self::layer_len(shape, layer)).sum();
        len * size_of::<f32>() / Self::PAGE
    }

    fn keys_len(shape: &KvShape, layer: usize) -> usize {
        shape.kv_heads[layer] * shape.head_width * Self::PAGE
    }

    /// Numbers of a page in one layer: keys, then values.
    fn layer_len(shape: &KvShape, layer: usize) -> usize {
        let values = shape.kv_heads[layer] * shape.head_width.next_multiple_of(COLUMNS) * Self::PAGE;
        Self::keys_len(shape, layer) + values
    }

    /// All pages.
    pub fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Pages that no sequence has.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Pages for a sequence of up to `n_positions`; none when there are not as many.
    pub fn reserve(&mut self, n_positions: usize) -> Option<SequenceCache> {
        let first = self.free.len().checked_sub(n_positions.div_ceil(Self::PAGE))?;
        Some(SequenceCache { pages: self.free.split_off(first), len: 0 })
    }

    /// Takes the pages of a sequence back.
    pub fn release(&mut self, cache: SequenceCache) {
        self.free.extend(cache.pages);
    }

    /// Where the keys of a page and a layer begin.
    fn at(&self, page: u32, layer: usize) -> usize {
        page as usize * self.page_len + self.layers[layer]
    }

    /// Writes the keys and values of the rows of a step, `key(i)` and `value(i)` [G·K], behind what each sequence
    /// holds; [`SequenceCache::advance`] then counts them.
    ///
    /// # Panics
    /// When a sequence has no room.
    pub fn append<'a>(
        &mut self,
        layer: usize,
        readings: &[Reading],
        key: impl Fn(usize) -> &'a [f32] + Sync,
        value: impl Fn(usize) -> &'a [f32] + Sync,
    ) {
        let head_width = self.shape.head_width;
        let width = self.shape.kv_heads[layer] * head_width;
        let (layer_len, keys_len) = (Self::layer_len(&self.shape, layer), Self::keys_len(&self.shape, layer));
        let wide = head_width.next_multiple_of(COLUMNS);
        for Reading { cache, first_row, n_rows } in readings {
            assert!(cache.len + n_rows <= cache.capacity(), "{n_rows} rows for {cache:?}");
            for row in 0..*n_rows {
                let position = cache.len + row;
                let (page, slot) = (cache.pages[position / Self::PAGE], position % Self::PAGE);
                let first = self.at(page, layer);
                let (keys, values) = self.values[first..][..layer_len].split_at_mut(keys_len);
                if slot == 0 {
                    // Weights of 0 meet what another sequence left there, which may not be finite.
                    values.fill(0.0);
                }
                let (key, value) = (key(first_row + row), value(first_row + row));
                for (to, from) in keys.chunks_exact_mut(Self::PAGE).zip(&key[..width]) {
                    to[slot] = *from;
                }
                for (head, from) in value.chunks_exact(head_width).enumerate() {
                    for (part, from) in from.chunks(COLUMNS).enumerate() {
                        let to = head * wide * Self::PAGE + (part * Self::PAGE + slot) * COLUMNS;
                        values[to..to + from.len()].copy_from_slice(from);
                    }
                }
            }
        }
    }

    /// softmax(q·kᵀ/√K)·v per head: each row of `q` [N, H·K] sees the positions of its sequence up to its own, as far
    /// as the window reaches, which [`KvPages::append`] has written. To `y` [N, H·K].
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn attend(&self, attending: Attending, readings: &[Reading], q: &[f32], y: &mut [f32]) {
        let (heads, kv_heads) = (attending.heads, self.shape.kv_heads[attending.layer]);
        assert!(heads.is_multiple_of(kv_heads), "{heads} heads of {kv_heads} heads of keys");
        let d = heads * self.shape.head_width;
        let n_rows: usize = readings.iter().map(|reading| reading.n_rows).sum();
        assert_eq!((q.len(), y.len()), (n_rows * d, n_rows * d), "elements of q and y");
        let tiles = |reading: &'_ Reading| (0..reading.n_rows).step_by(ROWS).collect::<Vec<_>>();
        let mut tasks = vec![];
        let mut next = 0;
        for reading in readings {
            assert!(reading.first_row == next, "rows of sequences in order");
            assert!(
                reading.cache.len + reading.n_rows <= reading.cache.capacity(),
                "positions of {:?}",
                reading.cache
            );
            next += reading.n_rows;
            for first in tiles(reading) {
                tasks.extend((0..heads).map(|head| (reading, first, head)));
            }
        }
        let (kernel, y) = (best_kernel(Precision::F32), Shared::new(y));
        tasks.into_par_iter().with_min_len(4).for_each_init(Vec::new, |scores, (reading, first, head)| {
            self.attend_tile(kernel, (&attending, head), (reading, first), (q, y), scores);
        });
    }

    /// Up to 8 rows of one head.
    fn attend_tile(
        &self,
        kernel: Kernel,
        (attending, head): (&Attending, usize),
        (reading, first): (&Reading, usize),
        (q, y): (&[f32], Shared),
        scores: &mut Vec<f32>,
    ) {
        let &Attending { layer, heads, window, scoring } = attending;
        let head_width = self.shape.head_width;
        let kv_head = head / (heads / self.shape.kv_heads[layer]);
        let d = heads * head_width;
        let m = ROWS.min(reading.n_rows - first);
        let n_keys = reading.cache.len + first + m;
        // The first position that the row at position n − 1 sees.
        let start = |n: usize| window.map_or(0, |window| n.saturating_sub(window));
        let first_page = start(n_keys - m + 1) / Self::PAGE;
        let first_key = first_page * Self::PAGE;
        let pages = &reading.cache.pages[first_page..n_keys.div_ceil(Self::PAGE)];
        let n = pages.len() * Self::PAGE;
        scores.resize(m * n, 0.0);
        let offset = (reading.first_row + first) * d + head * head_width;
        let q = &q[offset..(reading.first_row + first + m - 1) * d + (head + 1) * head_width];
        let tile = Tile {
            k: head_width,
            a: q.as_ptr().cast(),
            a_row: d,
            a_lane: 1,
            b: std::ptr::null(),
            c: std::ptr::null_mut(),
            c_row: n,
            from: std::ptr::null(),
            from_row: 0,
        };
        for (i, &page) in pages.iter().enumerate() {
            let keys = &self.values[self.at(page, layer) + kv_head * head_width * Self::PAGE..]
                [..head_width * Self::PAGE];
            let to = &mut scores[i * Self::PAGE..];
            // SAFETY: q holds m rows of the head (the slice above), the keys are K x 32, and the scores of the page
            // begin at `to`, n apart, within m rows of n.
            unsafe { kernel(&Tile { b: keys.as_ptr().cast(), c: to.as_mut_ptr(), ..tile }, m) }
        }
        let factor = scoring.factor(head_width);
        for (i, row) in scores.chunks_exact_mut(n).enumerate() {
            let end = n_keys - m + i + 1;
            let (seen, hidden) = row.split_at_mut(end - first_key);
            hidden.fill(0.0);
            let (before, visible) = seen.split_at_mut(start(end) - first_key);
            before.fill(0.0);
            match scoring.cap() {
                None => scale(visible, factor),
                Some(cap) => soft_cap(visible, factor, cap),
            }
            let sum = exp_sub_sum(visible, max(visible));
            scale(visible, 1.0 / sum);
        }
        let wide = head_width.next_multiple_of(COLUMNS);
        let mut sums = [0f32; ROWS * COLUMNS];
        for column in (0..head_width).step_by(COLUMNS) {
            for (i, &page) in pages.iter().enumerate() {
                let first = self.at(page, layer) + Self::keys_len(&self.shape, layer);
                let first = first + (kv_head * wide + column) * Self::PAGE;
                let values = &self.values[first..][..Self::PAGE * COLUMNS];
                let tile = Tile {
                    k: Self::PAGE,
                    a: scores[i * Self::PAGE..].as_ptr().cast(),
                    a_row: n,
                    b: values.as_ptr().cast(),
                    c: sums.as_mut_ptr(),
                    c_row: COLUMNS,
                    from: if i == 0 { std::ptr::null() } else { sums.as_ptr() },
                    from_row: COLUMNS,
                    ..tile
                };
                // SAFETY: the weights of the page lie in m rows of n scores, the values are 32 x 32, and the sums hold
                // 8 rows of 32.
                unsafe { kernel(&tile, m) }
            }
            let width = COLUMNS.min(head_width - column);
            for (row, sums) in sums.chunks_exact(COLUMNS).take(m).enumerate() {
                // SAFETY: the head's columns of these rows are this task's own and lie in y.
                unsafe { y.slice(offset + row * d + column, width) }.copy_from_slice(&sums[..width]);
            }
        }
    }
}
