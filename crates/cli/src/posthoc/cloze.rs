//! Questions made from text: the last word of a sentence.
//!
//! The rule. A sentence begins after a full stop and a space, or in a new line, with a capital, and ends in a full
//! stop; it has 8 to 40 words and no other full stop. Its last word is asked for: 4 or more lower-case letters, which
//! the training documents have at least once. The first piece of a window is left out, as it may begin within a
//! sentence. Sentences are taken evenly over the windows of the documents that are asked about. Buckets are fifths of the questions by how often
//! the training documents have the word; words as frequent as each other are of one bucket. The three other choices
//! are words that other questions of the bucket ask for, or of the next ones where it has too few.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use eval::{N_BUCKETS, Question, TRAIN};
use rayon::prelude::*;

use crate::prepare::Windows;

/// Windows read at a time.
const BATCH: usize = 1024;
/// Words of a sentence.
const WORDS: std::ops::RangeInclusive<usize> = 8..=40;
/// Letters of a word that is asked for, at least.
const LETTERS: usize = 4;
/// Choices beside the true one.
const OTHERS: usize = 3;

/// A sentence without its last word, and that.
type Cloze = (String, String);

/// Which documents of a corpus are asked about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum About {
    /// Those that are trained on.
    Read,
    /// Those that are not.
    HeldOut,
}

/// At most `most` questions about documents of a prepared corpus, and the labels of their buckets.
pub(super) fn questions(
    windows: &Windows,
    about: About,
    most: usize,
) -> Result<(Vec<Question>, Vec<String>)> {
    let (training, held_out) = divided(windows)?;
    let counts = word_counts(windows, &training)?;
    let asked = match about {
        About::Read => &training,
        About::HeldOut => &held_out,
    };
    let mut found: Vec<Cloze> = vec![];
    for batch in asked.chunks(BATCH) {
        found.extend(windows.texts(batch)?.iter().flat_map(|text| clozes(text)));
    }
    found.retain(|(_, word)| counts.contains_key(word));
    let take = most.min(found.len());
    let chosen: Vec<Cloze> = (0..take).map(|i| found[i * found.len() / take].clone()).collect();
    Ok(bucketed(chosen, &counts))
}

/// Windows of training documents, and of those held out.
fn divided(windows: &Windows) -> Result<(Vec<usize>, Vec<usize>)> {
    let (mut training, mut held_out) = (vec![], vec![]);
    for window in 0..windows.store.n_windows() {
        match windows.store.is_validation(windows.store.window(window)?.document)? {
            true => held_out.push(window),
            false => training.push(window),
        }
    }
    Ok((training, held_out))
}

fn word_counts(windows: &Windows, of: &[usize]) -> Result<HashMap<String, u64>> {
    let mut counts: HashMap<String, u64> = HashMap::new();
    for batch in of.chunks(BATCH) {
        let texts = windows.texts(batch)?;
        let counted = texts.par_iter().map(|text| {
            let mut counts: HashMap<&str, u64> = HashMap::new();
            text.split(|c: char| !c.is_alphabetic()).for_each(|word| *counts.entry(word).or_default() += 1);
            counts
        });
        for (word, n) in counted.collect::<Vec<_>>().into_iter().flatten() {
            *counts.entry(word.into()).or_default() += n;
        }
    }
    Ok(counts)
}

/// The sentences of a text that can be asked about.
fn clozes(text: &str) -> impl Iterator<Item = Cloze> + '_ {
    // What follows the last full stop of a line has no end.
    let whole = |line: &str| {
        let line = line.trim();
        let mut pieces: Vec<String> = line.split(". ").map(String::from).collect();
        if let Some(last) = pieces.pop().and_then(|last| last.strip_suffix('.').map(String::from)) {
            pieces.push(last);
        }
        pieces
    };
    text.lines().flat_map(whole).skip(1).filter_map(|sentence| {
        let (prompt, word) = sentence.trim().rsplit_once(' ')?;
        let is_word = word.len() >= LETTERS && word.chars().all(|c| c.is_ascii_lowercase());
        let is_sentence = prompt.starts_with(|c: char| c.is_uppercase())
            && WORDS.contains(&sentence.split_whitespace().count())
            && !prompt.contains('.');
        (is_word && is_sentence).then(|| (prompt.to_string(), word.to_string()))
    })
}

/// Questions with their buckets and choices.
fn bucketed(chosen: Vec<Cloze>, counts: &HashMap<String, u64>) -> (Vec<Question>, Vec<String>) {
    let count = |word: &str| counts.get(word).copied().unwrap_or(0);
    let mut frequencies: Vec<u64> = chosen.iter().map(|(_, word)| count(word)).collect();
    frequencies.sort_unstable();
    // The largest frequency of each bucket but the last.
    let n = frequencies.len();
    let ends: Vec<u64> = (1..N_BUCKETS)
        .filter_map(|i| frequencies.get((i * n / N_BUCKETS).saturating_sub(1)).copied())
        .collect();
    let bucket = |word: &str| 1 + ends.iter().filter(|&&end| count(word) > end).count();
    let mut words: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for (_, word) in &chosen {
        let of_bucket = words.entry(bucket(word)).or_default();
        if !of_bucket.contains(&word.as_str()) {
            of_bucket.push(word);
        }
    }
    let question = |(prompt, answer): &Cloze| {
        let of_bucket = &words[&bucket(answer)];
        let place = of_bucket.iter().position(|word| word == answer).unwrap_or(0);
        // Spread over the bucket; a small one has too few.
        let other = |i: usize| of_bucket[(place + i * of_bucket.len() / (OTHERS + 1)) % of_bucket.len()];
        let mut near: Vec<usize> = words.keys().copied().collect();
        near.sort_by_key(|b| b.abs_diff(bucket(answer)));
        let more = near.iter().flat_map(|b| words[b].iter().copied());
        let mut choices = vec![answer.clone()];
        for choice in (1..=OTHERS).map(other).chain(more) {
            if choices.len() <= OTHERS && !choices.iter().any(|known| known == choice) {
                choices.push(choice.into());
            }
        }
        Question {
            prompt: prompt.clone(),
            answer: answer.clone(),
            relation: "last word".into(),
            bucket: bucket(answer),
            phrasing: TRAIN.into(),
            choices,
        }
    };
    let label = |b: usize| {
        let least = if b == 1 { 1 } else { ends.get(b - 2).map_or(1, |end| end + 1) };
        match ends.get(b - 1) {
            Some(most) if *most <= least => format!("{least} times"),
            Some(most) => format!("{least}–{most} times"),
            None => format!("{least}– times"),
        }
    };
    (chosen.iter().map(question).collect(), (1..=N_BUCKETS).map(label).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_sentences_with_a_plain_last_word_are_asked_about() {
        let text = "he end of one that was cut off. The second sentence of this text has quite enough words. \
                    Too short. It ends with a name that nobody would be asked about here, Paris. \
                    Some numbers such as 1.5 have a stop and are therefore left alone\n\
                    A new line begins a sentence, whatever the line before it ended with. And this one is never ende";
        let found: Vec<Cloze> = clozes(text).collect();
        let expected = [
            ("The second sentence of this text has quite enough", "words"),
            ("A new line begins a sentence, whatever the line before it ended", "with"),
        ];
        assert_eq!(found, expected.map(|(prompt, word)| (prompt.to_string(), word.to_string())));
    }

    #[test]
    fn buckets_are_fifths_and_choices_are_of_the_bucket() {
        let words =
            ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"];
        let chosen: Vec<Cloze> = words.iter().map(|word| ("It is".into(), word.to_string())).collect();
        let counts: HashMap<String, u64> = (1..).zip(words).map(|(n, word)| (word.to_string(), n)).collect();
        let (questions, labels) = bucketed(chosen, &counts);
        let buckets: Vec<usize> = questions.iter().map(|question| question.bucket).collect();
        assert_eq!(buckets, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
        assert_eq!(labels, ["1–2 times", "3–4 times", "5–6 times", "7–8 times", "9– times"]);
        assert_eq!(questions[2].choices, ["charlie", "delta", "alpha", "bravo"]);
        let (none, _) = bucketed(vec![], &counts);
        assert!(none.is_empty());
    }
}
