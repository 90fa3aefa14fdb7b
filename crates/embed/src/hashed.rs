mod features;
mod file;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::embedder::{Embedder, embed_rows, sha256};
use crate::{Error, Result};
use features::{Words, mix};

/// Entries of the table of inverse document frequencies; features share them by their hash.
const N_BUCKETS: usize = 1 << 18;

/// Dimensions that a word touches, one in each of as many equal slices of the vector: a feature so
/// keeps its norm exactly, and no one dimension holds much of it.
const WORD_POSITIONS: usize = 16;

/// Dimensions that an n-gram touches. Fewer do, since it is one of many; time goes into n-grams.
const GRAM_POSITIONS: usize = 4;

/// The largest D: a position within a slice is chosen by 15 bits, which must be even enough.
const MAX_DIM: usize = 4096;

/// Weight of a feature that no fitted text has. It says nothing about where the fitted texts lie and
/// would only turn a prompt away from them; a text of nothing else is still placed by it.
const UNSEEN_IDF: f32 = 1e-3;

/// Texts whose features are counted in one parallel batch of a fit.
const FIT_BATCH: usize = 1024;

/// What a [`Hashed`] embedder is, apart from the corpus it was fitted on.
#[derive(Copy, Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HashedOptions {
    /// Dimension D of the embeddings: a multiple of 16, at most 4,096.
    pub dim: usize,
    /// Seed of the random projection.
    pub seed: u64,
    /// Weight of all the character n-grams of a word together, relative to the word itself; 0 is
    /// words only.
    pub char_weight: f32,
}

impl Default for HashedOptions {
    fn default() -> Self {
        Self { dim: 512, seed: 0, char_weight: 1.0 }
    }
}

impl HashedOptions {
    /// Fails on an option out of range.
    pub fn check(&self) -> Result<()> {
        let HashedOptions { dim, .. } = *self;
        if dim == 0 || !dim.is_multiple_of(WORD_POSITIONS) || dim > MAX_DIM {
            let expected = "a multiple of 16 from 16 to 4096";
            return Err(Error::Option { option: "dim", expected, found: dim.to_string() });
        }
        if !self.char_weight.is_finite() || self.char_weight < 0.0 {
            let found = self.char_weight.to_string();
            return Err(Error::Option {
                option: "char_weight",
                expected: "a finite number from 0 up",
                found,
            });
        }
        Ok(())
    }
}

/// TF-IDF over words and their character n-grams, hashed and projected to D dimensions.
///
/// A word that the text has `tf` times adds (1 + ln tf) · idf(word)² times its own random direction,
/// and each of its m n-grams (3 to 5 characters) `char_weight` · (1 + ln tf) · idf(n-gram)² / √m
/// times its own. With N texts fitted and df of them holding a feature,
/// idf = ln((1 + N) / (1 + df)) + 1, squared so that a name outweighs a word of every sentence by far:
/// a prompt of a few words goes where the documents about that name are. A direction is 16
/// positions of ±1/4 for a word and 4 of ±1/2 for an n-gram, drawn from the feature's hash and the
/// seed; no matrix is stored.
pub struct Hashed {
    options: HashedOptions,
    /// Texts that the document frequencies were counted on.
    n_texts: u64,
    idf: Vec<f32>, // [N_BUCKETS]
    /// What the seed makes of it: decides the direction of every feature.
    projection: u64,
    fingerprint: String,
}

#[derive(Default)]
struct Scratch {
    words: Words,
    grams: Vec<u64>,
}

impl Hashed {
    /// Counts document frequencies over `texts`, which are read once and never held all at once: a
    /// sample of the corpus is enough. Texts without any word count as texts. Fails on an option out
    /// of range and when there are no texts.
    pub fn fit<T: AsRef<str> + Sync>(
        options: HashedOptions,
        texts: impl IntoIterator<Item = T>,
    ) -> Result<Self> {
        options.check()?;
        let mut texts = texts.into_iter();
        let mut frequencies = vec![0u32; N_BUCKETS];
        let mut n_texts = 0u64;
        loop {
            let batch: Vec<T> = texts.by_ref().take(FIT_BATCH).collect();
            if batch.is_empty() {
                break;
            }
            n_texts += batch.len() as u64;
            let buckets: Vec<Vec<u32>> = batch
                .par_iter()
                .map_init(Scratch::default, |scratch, text| {
                    distinct_buckets(&options, scratch, text.as_ref())
                })
                .collect();
            for bucket in buckets.into_iter().flatten() {
                let frequency = &mut frequencies[bucket as usize];
                *frequency = frequency.saturating_add(1);
            }
        }
        if n_texts == 0 {
            return Err(Error::NoTexts);
        }
        let idf = frequencies.iter().map(|&df| inverse_frequency(n_texts, df)).collect();
        Ok(Self::new(options, n_texts, idf))
    }

    fn new(options: HashedOptions, n_texts: u64, idf: Vec<f32>) -> Self {
        let table: Vec<u8> = idf.iter().flat_map(|value| value.to_le_bytes()).collect();
        let fingerprint = sha256(&[
            file::FORMAT.as_bytes(),
            &(options.dim as u64).to_le_bytes(),
            &options.seed.to_le_bytes(),
            &options.char_weight.to_le_bytes(),
            &table,
        ]);
        let projection = mix(options.seed.wrapping_add(GOLDEN));
        Self { options, n_texts, idf, projection, fingerprint }
    }

    /// The options it was fitted with.
    pub fn options(&self) -> HashedOptions {
        self.options
    }

    /// Number of texts it was fitted on.
    pub fn n_texts(&self) -> u64 {
        self.n_texts
    }

    /// Adds the features of a text to a row of zeros.
    fn fill(&self, scratch: &mut Scratch, text: &str, row: &mut [f32]) {
        let Scratch { words, grams } = scratch;
        words.read(text);
        for word in words.distinct() {
            let tf = 1.0 + (word.count as f32).ln();
            self.add::<WORD_POSITIONS>(word.hash, tf * self.idf_of(word.hash), row);
            if self.options.char_weight > 0.0 {
                words.grams(word, grams);
                let scale = tf * self.options.char_weight / (grams.len() as f32).sqrt();
                for &gram in grams.iter() {
                    self.add::<GRAM_POSITIONS>(gram, scale * self.idf_of(gram), row);
                }
            }
        }
    }

    fn idf_of(&self, hash: u64) -> f32 {
        self.idf[bucket(hash) as usize]
    }

    /// Adds `weight` times the direction of a feature, of `P` positions.
    fn add<const P: usize>(&self, hash: u64, weight: f32, row: &mut [f32]) {
        let weight = weight / (P as f32).sqrt();
        let width = row.len() / P;
        let mut state = hash ^ self.projection;
        let mut bits = 0u64;
        for (slice_index, slice) in row.chunks_exact_mut(width).enumerate() {
            if slice_index % 4 == 0 {
                state = state.wrapping_add(GOLDEN);
                bits = mix(state);
            }
            // 15 bits choose the position, one the sign.
            let position = ((bits & 0x7fff) as usize * width) >> 15;
            slice[position] += if bits & 0x8000 == 0 { weight } else { -weight };
            bits >>= 16;
        }
    }
}

/// The increment of SplitMix64's counter: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Embedder for Hashed {
    fn dim(&self) -> usize {
        self.options.dim
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        embed_rows(texts, self.dim(), |scratch: &mut Scratch, index, row| {
            self.fill(scratch, texts[index], row);
            Ok(())
        })
    }
}

fn bucket(hash: u64) -> u32 {
    // The upper bits: the lower ones choose positions.
    (hash >> 46) as u32
}

fn inverse_frequency(n_texts: u64, df: u32) -> f32 {
    if df == 0 {
        return UNSEEN_IDF;
    }
    let idf = ((1 + n_texts) as f64 / (1.0 + f64::from(df))).ln() + 1.0;
    (idf * idf) as f32
}

/// The buckets of a text's features, each once.
fn distinct_buckets(options: &HashedOptions, scratch: &mut Scratch, text: &str) -> Vec<u32> {
    let Scratch { words, grams } = scratch;
    let mut buckets = Vec::new();
    words.read(text);
    for word in words.distinct() {
        buckets.push(bucket(word.hash));
        if options.char_weight > 0.0 {
            words.grams(word, grams);
            buckets.extend(grams.iter().map(|&gram| bucket(gram)));
        }
    }
    buckets.sort_unstable();
    buckets.dedup();
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(char_weight: f32) -> Hashed {
        let texts = ["red fox", "red hen", "red cow", "blue fox"];
        Hashed::fit(HashedOptions { char_weight, ..HashedOptions::default() }, texts).unwrap()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    }

    #[test]
    fn words_weigh_by_frequency_in_the_text_and_rarity_in_the_corpus() {
        let hashed = fitted(0.0);
        let rows = hashed.embed(&["red", "fox", "newt", "Red red fox RED newt"]).unwrap();
        let rows: Vec<&[f32]> = rows.chunks_exact(512).collect();
        // 4 texts: "red" in 3, "fox" in 2, "newt" in none.
        let idf = |df: f64| ((5.0 / (1.0 + df)).ln() + 1.0).powi(2);
        let weights = [(1.0 + 3f64.ln()) * idf(3.0), idf(2.0), f64::from(UNSEEN_IDF)];
        let mut wanted = vec![0f64; 512];
        for (row, weight) in rows.iter().zip(weights) {
            wanted.iter_mut().zip(*row).for_each(|(sum, &value)| *sum += weight * f64::from(value));
        }
        let norm = wanted.iter().map(|value| value * value).sum::<f64>().sqrt();
        for (value, found) in wanted.iter().zip(rows[3]) {
            assert!((value / norm - f64::from(*found)).abs() < 1e-6);
        }
    }

    #[test]
    fn a_word_touches_one_position_of_each_slice() {
        let row = fitted(0.0).embed(&["newt"]).unwrap();
        for slice in row.chunks_exact(512 / WORD_POSITIONS) {
            let touched: Vec<f32> = slice.iter().copied().filter(|&value| value != 0.0).collect();
            assert_eq!(touched.len(), 1);
            assert!((touched[0].abs() - 0.25).abs() < 1e-6);
        }
        assert!(row.iter().any(|&value| value < 0.0) && row.iter().any(|&value| value > 0.0));
    }

    #[test]
    fn the_grams_of_a_word_together_weigh_as_much_as_the_word() {
        // No feature of these words was fitted, so all have the same idf.
        for word in ["xylograph", "wq", "zzyzxqvt"] {
            let (alone, both) = (fitted(0.0).embed(&[word]).unwrap(), fitted(1.0).embed(&[word]).unwrap());
            let cosine = dot(&alone, &both);
            // 1/√2 but for the chance meetings of directions in 512 dimensions.
            assert!((cosine - 0.5f64.sqrt()).abs() < 0.12, "{word}: {cosine}");
        }
    }
}
