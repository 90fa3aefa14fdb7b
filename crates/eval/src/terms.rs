//! What a cluster is about: class-based tf-idf over the words of its texts (Grootendorst,
//! arXiv 2203.05794), in two passes over the texts and with a memory that does not grow with them.

use std::collections::{BTreeMap, HashMap};

/// Words kept while counting; when there are more, the rarest are dropped.
const MAX_WORDS: usize = 1 << 20;

/// Texts that have a word, at least: what one text alone says is no topic.
const MIN_TEXTS: u32 = 2;

/// A word that more than one text in this many has is a stop word, of whatever language: tf-idf alone
/// keeps them where classes are few.
const MAX_TEXTS: u64 = 3;

/// How much likelier a term is in its class than in all texts; what all classes share has a ratio of
/// about 1.
const MIN_RATIO: f64 = 2.0;

/// The longest word in characters: past it, it is an address or code.
const MAX_CHARS: usize = 32;

/// Counts the words of all texts; the first pass.
#[derive(Default)]
pub struct WordCounter {
    /// Occurrences, and texts that have it.
    words: HashMap<String, (u64, u32)>,
    n_words: u64,
    n_texts: u64,
}

/// The words of a corpus, each with an id, and how often they occur.
pub struct Vocabulary {
    ids: HashMap<String, u32>,
    words: Vec<String>,
    frequencies: Vec<u64>,
    /// Of all texts, rare ones included.
    n_words: u64,
}

/// The words of one class.
#[derive(Clone, Debug, Default)]
pub struct ClassWords {
    /// Occurrences by id.
    counts: HashMap<u32, u64>,
    /// Of all its texts, rare ones included.
    n_words: u64,
}

/// A term of a class: its id in the [`Vocabulary`], and its weight there.
pub type Term = (u32, f64);

/// The terms of the clusters of a level, best first, by index.
pub type LevelTerms = BTreeMap<u32, Vec<Term>>;

/// The lower-cased words of a text: runs of letters and digits that begin with a letter and have 2
/// to 32 characters.
fn words(lowered: &str) -> impl Iterator<Item = &str> {
    lowered.split(|c: char| !c.is_alphanumeric()).filter(|word| {
        let n = word.chars().take(MAX_CHARS + 1).count();
        (2..=MAX_CHARS).contains(&n) && word.starts_with(char::is_alphabetic)
    })
}

impl WordCounter {
    /// Counts the words of a text.
    pub fn add(&mut self, text: &str) {
        let lowered = text.to_lowercase();
        let mut words: Vec<&str> = words(&lowered).collect();
        self.n_words += words.len() as u64;
        self.n_texts += 1;
        words.sort_unstable();
        for same in words.chunk_by(|a, b| a == b) {
            match self.words.get_mut(same[0]) {
                Some((n, texts)) => (*n, *texts) = (*n + same.len() as u64, texts.saturating_add(1)),
                None => _ = self.words.insert(same[0].to_owned(), (same.len() as u64, 1)),
            }
        }
        let mut rare = 1;
        while self.words.len() > MAX_WORDS {
            self.words.retain(|_, (_, texts)| *texts > rare);
            rare += 1;
        }
    }

    /// The words that at least two texts have and at most a third of them.
    pub fn finish(self) -> Vocabulary {
        let mut kept: Vec<(String, u64)> = self
            .words
            .into_iter()
            .filter(|(_, (_, texts))| *texts >= MIN_TEXTS && u64::from(*texts) * MAX_TEXTS <= self.n_texts)
            .map(|(word, (n, _))| (word, n))
            .collect();
        kept.sort_unstable();
        let (words, frequencies): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
        let ids = words.iter().cloned().zip(0..).collect();
        Vocabulary { ids, words, frequencies, n_words: self.n_words }
    }
}

impl ClassWords {
    /// Counts the words of a text of this class.
    pub fn add(&mut self, vocabulary: &Vocabulary, text: &str) {
        let lowered = text.to_lowercase();
        for word in words(&lowered) {
            self.n_words += 1;
            if let Some(&id) = vocabulary.ids.get(word) {
                *self.counts.entry(id).or_default() += 1;
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.n_words += other.n_words;
        for (id, n) in other.counts {
            *self.counts.entry(id).or_default() += n;
        }
    }
}

impl Vocabulary {
    /// The word of an id.
    ///
    /// # Panics
    /// If no term has this id, as a slice does.
    pub fn word(&self, id: u32) -> &str {
        &self.words[id as usize]
    }

    /// The `n` terms of a class with the largest weight, `tf · ln(1 + A / f)`: `tf` how often the
    /// class has the term, `f` how often all texts have it, `A` the mean number of words of the
    /// `n_classes` classes that all texts are divided into. Ties go to the word that sorts first.
    pub fn top_terms(&self, class: &ClassWords, n_classes: usize, n: usize) -> Vec<Term> {
        let (all, own) = (self.n_words as f64, class.n_words as f64);
        let mean = all / n_classes.max(1) as f64;
        // A class that holds nearly everything cannot differ from everything by much.
        let ratio = MIN_RATIO.min((1.0 + all / own) / 2.0);
        let weight = |(&id, &tf): (&u32, &u64)| {
            let (tf, f) = (tf as f64, self.frequencies[id as usize] as f64);
            (tf * all >= ratio * f * own).then(|| (id, tf * (1.0 + mean / f).ln()))
        };
        let mut terms: Vec<Term> = class.counts.iter().filter_map(weight).collect();
        terms.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        terms.truncate(n);
        terms
    }

    /// The `n` top terms of every cluster of a tree that has texts, level by level; the second pass.
    ///
    /// `texts` are (leaf, text) in ascending order of their leaves, so that only the clusters of one
    /// path are counted at a time. `branching` is children per level and `n_classes` clusters with
    /// texts per level, coarse to fine. Ends at the first error of `texts`.
    pub fn tree_terms<E>(
        &self,
        branching: &[usize],
        n_classes: &[usize],
        texts: impl Iterator<Item = Result<(u32, String), E>>,
        n: usize,
    ) -> Result<Vec<LevelTerms>, E> {
        let mut done = vec![LevelTerms::new(); branching.len()];
        // The path that is being counted: the words of a cluster that its finished children held.
        let mut open: Vec<(u32, ClassWords)> = vec![];
        let mut close = |open: &mut Vec<(u32, ClassWords)>, keep: usize| {
            while open.len() > keep {
                let Some((index, class)) = open.pop() else { return };
                let level = open.len();
                done[level].insert(index, self.top_terms(&class, n_classes[level], n));
                if let Some((_, parent)) = open.last_mut() {
                    parent.merge(class);
                }
            }
        };
        for item in texts {
            let (leaf, text) = item?;
            let mut path = vec![leaf; branching.len()];
            for level in (1..branching.len()).rev() {
                path[level - 1] = path[level] / branching[level] as u32;
            }
            let shared = open.iter().zip(&path).take_while(|((index, _), now)| index == *now).count();
            close(&mut open, shared);
            open.extend(path[shared..].iter().map(|&index| (index, ClassWords::default())));
            if let Some((_, class)) = open.last_mut() {
                class.add(self, &text);
            }
        }
        close(&mut open, 0);
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Leaves of a tree of 2 × 2; each text has 6 words.
    const TEXTS: [(u32, &str); 6] = [
        (0, "The star and the star shines"),
        (0, "The star and a2 3d planet moon"),
        (1, "The comet and the comet planet"),
        (1, "The comet and the comet moon!"),
        (3, "The treaty and the war war"),
        (3, "THE WAR, and the king treaty"),
    ];

    fn vocabulary() -> Vocabulary {
        let mut counter = WordCounter::default();
        TEXTS.iter().for_each(|(_, text)| counter.add(text));
        counter.finish()
    }

    fn all_terms(vocabulary: &Vocabulary, n: usize) -> Vec<BTreeMap<u32, Vec<(String, f64)>>> {
        let texts = TEXTS.iter().map(|&(leaf, text)| Ok::<_, ()>((leaf, text.to_owned())));
        let levels = vocabulary.tree_terms(&[2, 2], &[2, 3], texts, n).unwrap();
        let named = |terms: Vec<Term>| {
            terms.into_iter().map(|(id, weight)| (vocabulary.word(id).to_owned(), weight)).collect()
        };
        let level = |level: LevelTerms| level.into_iter().map(|(i, terms)| (i, named(terms))).collect();
        levels.into_iter().map(level).collect()
    }

    #[test]
    fn a_word_weighs_by_its_class_and_by_all_classes() {
        let vocabulary = vocabulary();
        // "3d" begins with a digit; "shines", "king" and "a2" are in one text only. Each text has 6 words.
        // "and" and "the" are in all. "planet" and "moon" are left, each in two of six.
        assert_eq!(vocabulary.words, ["comet", "moon", "planet", "star", "treaty", "war"]);
        assert_eq!(vocabulary.n_words, 36);
        let levels = all_terms(&vocabulary, 12);
        // A term with its occurrences in the class and in all texts.
        let expect = |(level, index): (usize, u32), expected: &[(&str, f64, f64)]| {
            let mean = [36.0 / 2.0, 36.0 / 3.0][level];
            let found = &levels[level][&index];
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for ((word, weight), (other, tf, f)) in found.iter().zip(expected) {
                assert_eq!(word, other);
                assert!((weight - tf * (1.0 + mean / f).ln()).abs() < 1e-12, "{word}: {weight}");
            }
        };
        expect((0, 0), &[("comet", 4.0, 4.0), ("star", 3.0, 3.0), ("moon", 2.0, 2.0), ("planet", 2.0, 2.0)]);
        expect((0, 1), &[("war", 3.0, 3.0), ("treaty", 2.0, 2.0)]);
        // Half of "moon" and "planet" is in a third of the words: less than twice as likely there.
        expect((1, 0), &[("star", 3.0, 3.0)]);
        expect((1, 3), &[("war", 3.0, 3.0), ("treaty", 2.0, 2.0)]);
        assert_eq!(levels[1].keys().copied().collect::<Vec<_>>(), [0, 1, 3]);
    }

    #[test]
    fn words_of_every_class_are_no_terms_and_only_the_best_are_kept() {
        let levels = all_terms(&vocabulary(), 1);
        for terms in levels.iter().flat_map(BTreeMap::values) {
            assert_eq!(terms.len(), 1);
            assert!(!["the", "and"].contains(&terms[0].0.as_str()), "{terms:?}");
        }
    }

    #[test]
    fn an_error_ends_the_pass() {
        let texts = [Ok((0, "star".to_owned())), Err("unreadable")].into_iter();
        assert_eq!(vocabulary().tree_terms(&[2, 2], &[1, 1], texts, 3), Err("unreadable"));
    }
}
