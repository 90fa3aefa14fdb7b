//! The features of a text, as 64-bit hashes that are the same on every machine and in every version.

use std::ops::Range;

/// Length in characters of the n-grams of a word, its two boundary marks counted.
const GRAM_CHARS: std::ops::RangeInclusive<usize> = 3..=5;

// Characters that no word contains: where a word begins and ends.
const WORD_START: char = '\u{2}';
const WORD_END: char = '\u{3}';

// Where the hash of a word and the hash of an n-gram start: the word "ab" and an n-gram "ab" differ.
const WORD_BASIS: u64 = 0x9ae1_6a3b_2f90_404f;
const GRAM_BASIS: u64 = 0xc2b2_ae3d_27d4_eb4f;

/// A distinct word of a text.
pub(super) struct Word {
    /// Hash of the word itself.
    pub(super) hash: u64,
    /// How often the text has it.
    pub(super) count: u32,
    /// Where [`Words::chars`] holds it, boundary marks included.
    span: Range<usize>,
}

/// The distinct words of one text at a time; the buffers are reused from text to text.
#[derive(Default)]
pub(super) struct Words {
    chars: Vec<char>,
    words: Vec<Word>,
}

impl Words {
    /// Reads a text: its words are the lower-cased runs of Unicode letters and digits, or, in a text
    /// that has none, the runs of anything but white space.
    pub(super) fn read(&mut self, text: &str) {
        self.chars.clear();
        self.words.clear();
        self.split(text, char::is_alphanumeric);
        if self.words.is_empty() {
            self.split(text, |c| !c.is_whitespace());
        }
        self.words.sort_unstable_by(|a, b| a.hash.cmp(&b.hash).then(a.span.start.cmp(&b.span.start)));
        self.words.dedup_by(|next, first| {
            let same = next.hash == first.hash;
            first.count += u32::from(same);
            same
        });
    }

    /// The distinct words of the text read last, in the order of their hashes.
    pub(super) fn distinct(&self) -> &[Word] {
        &self.words
    }

    /// Puts the hashes of the n-grams of a word of the current text into `grams`, repeats included.
    /// A word has at least one: marked, even a single letter is three characters.
    pub(super) fn grams(&self, word: &Word, grams: &mut Vec<u64>) {
        let chars = &self.chars[word.span.clone()];
        grams.clear();
        for start in 0..chars.len() {
            let mut hash = GRAM_BASIS;
            for (index, &c) in chars[start..].iter().take(*GRAM_CHARS.end()).enumerate() {
                hash = absorb(hash, c);
                if index + 1 >= *GRAM_CHARS.start() {
                    grams.push(mix(hash));
                }
            }
        }
    }

    fn split(&mut self, text: &str, belongs: impl Fn(char) -> bool) {
        for word in text.split(|c| !belongs(c)).filter(|word| !word.is_empty()) {
            let start = self.chars.len();
            self.chars.push(WORD_START);
            // Most words, and several times faster.
            if word.is_ascii() {
                self.chars.extend(word.bytes().map(|byte| char::from(byte.to_ascii_lowercase())));
            } else {
                self.chars.extend(word.chars().flat_map(char::to_lowercase));
            }
            self.chars.push(WORD_END);
            let span = start..self.chars.len();
            let hash = mix(self.chars[span.clone()].iter().fold(WORD_BASIS, |hash, &c| absorb(hash, c)));
            self.words.push(Word { hash, count: 1, span });
        }
    }
}

/// One step of FNV-1a, a character at a time.
fn absorb(hash: u64, c: char) -> u64 {
    (hash ^ u64::from(c)).wrapping_mul(0x0000_0100_0000_01b3)
}

/// The output function of SplitMix64: every bit of the input changes half of the output's bits.
pub(super) fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(text: &str) -> Vec<(String, u32)> {
        let mut words = Words::default();
        words.read(text);
        let spell = |word: &Word| words.chars[word.span.start + 1..word.span.end - 1].iter().collect();
        let mut spelled: Vec<(String, u32)> =
            words.words.iter().map(|word| (spell(word), word.count)).collect();
        spelled.sort();
        spelled
    }

    fn counted(words: &[(&str, u32)]) -> Vec<(String, u32)> {
        words.iter().map(|&(word, count)| (word.to_owned(), count)).collect()
    }

    #[test]
    fn words_are_lower_cased_runs_of_letters_and_digits() {
        let text = "Größe 42, größe (Åsa-Łukasz) 北京!";
        let expected = [("42", 1), ("größe", 2), ("åsa", 1), ("łukasz", 1), ("北京", 1)];
        assert_eq!(spelled(text), counted(&expected));
    }

    #[test]
    fn a_text_without_letters_or_digits_falls_back_to_its_marks() {
        assert_eq!(spelled("--- *** ---"), counted(&[("***", 1), ("---", 2)]));
        assert_eq!(spelled("--- a"), counted(&[("a", 1)]));
        assert_eq!(spelled(" \n\t"), counted(&[]));
    }

    #[test]
    fn grams_are_the_marked_word_in_threes_to_fives() {
        let mut words = Words::default();
        let (mut grams, mut wanted) = (Vec::new(), Vec::new());
        words.read("cab");
        words.grams(&words.words[0], &mut grams);
        for gram in ["\u{2}ca", "\u{2}cab", "\u{2}cab\u{3}", "cab", "cab\u{3}", "ab\u{3}"] {
            wanted.push(mix(gram.chars().fold(GRAM_BASIS, absorb)));
        }
        assert_eq!(grams, wanted);
    }

    /// A saved table is read by later versions and other machines: these values may never change.
    #[test]
    fn hashes_are_fixed() {
        let mut words = Words::default();
        words.read("Alba");
        assert_eq!(words.distinct()[0].hash, 0xec68_864c_ebcc_cfd1);
        assert_eq!(mix(1), 0x5692_161d_100b_05e5);
    }
}
