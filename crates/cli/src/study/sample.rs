//! The texts that a study routes.

use std::collections::HashMap;

use anyhow::Result;
use retrieve::Oracle;

use crate::routing::Windows;
use crate::run::Run;

/// Words of the prompts that are cut from held-out windows.
const PROMPT_WORDS: [usize; 3] = [8, 16, 32];

/// What the texts of one kind are of the corpus.
pub(super) enum Origin {
    /// Whole windows, by their index in the corpus.
    Windows(Vec<usize>),
    /// The beginnings of held-out windows, by the place of each among the held-out texts.
    Beginnings(Vec<usize>),
    /// Nothing of it.
    Questions,
}

/// Texts of one kind with their embeddings, at least one.
pub(super) struct Texts {
    pub(super) kind: String,
    pub(super) texts: Vec<String>,
    /// `[N, D]`.
    pub(super) embeddings: Vec<f32>,
    pub(super) origin: Origin,
}

/// Training windows, held-out windows, the beginnings of these, and questions: the kinds that there are.
pub(super) struct Sample {
    pub(super) kinds: Vec<Texts>,
    /// Which of the kinds is the held-out windows, if there are any.
    pub(super) held_out: Option<usize>,
}

/// At most `n` of `values`, spread evenly.
pub(super) fn spread<T: Clone>(values: &[T], n: usize) -> Vec<T> {
    let take = n.min(values.len());
    (0..take).map(|i| values[i * values.len() / take].clone()).collect()
}

/// The first `n` words of `text`, if it has more.
fn first_words(text: &str, n: usize) -> Option<String> {
    let mut words = text.split_whitespace();
    let first: Vec<&str> = words.by_ref().take(n).collect();
    words.next().map(|_| first.join(" "))
}

impl Sample {
    /// At most `n` texts of each kind, spread evenly over those there are.
    pub(super) fn of(run: &Run, windows: &Windows, n: usize) -> Result<Self> {
        let of_windows = |kind: &str, held_out: bool| -> Result<Texts> {
            let chosen = spread(&windows.of(held_out)?, n);
            let text = |&window: &usize| Ok(run.tokenizer.decode(&windows.store.window_tokens(window)?)?);
            let texts = chosen.iter().map(text).collect::<Result<Vec<_>>>()?;
            let embeddings = chosen.iter().flat_map(|&window| windows.embedding(window)).copied().collect();
            Ok(Texts { kind: kind.into(), texts, embeddings, origin: Origin::Windows(chosen) })
        };
        let (training, held_out) =
            (of_windows("training windows", false)?, of_windows("held-out windows", true)?);
        let embedder = run.embedder()?;
        let embedded = |kind: String, texts: Vec<String>, origin: Origin| -> Result<Texts> {
            let embeddings = embedder.embed(&texts.iter().map(String::as_str).collect::<Vec<_>>())?;
            Ok(Texts { kind, texts, embeddings, origin })
        };
        let mut others = vec![];
        for words in PROMPT_WORDS {
            let prompt = |(i, text): (usize, &String)| Some((i, first_words(text, words)?));
            let (of, texts) = held_out.texts.iter().enumerate().filter_map(prompt).unzip();
            others.push(embedded(format!("{words} words"), texts, Origin::Beginnings(of))?);
        }
        if let Some(path) = &run.config.eval.questions {
            let prompts: Vec<String> = eval::read_questions(path)?.into_iter().map(|q| q.prompt).collect();
            others.push(embedded("questions".into(), spread(&prompts, n), Origin::Questions)?);
        }
        let held_out_kind = (!held_out.texts.is_empty()).then_some(usize::from(!training.texts.is_empty()));
        let mut kinds = vec![training, held_out];
        kinds.extend(others);
        kinds.retain(|kind| !kind.texts.is_empty());
        Ok(Self { kinds, held_out: held_out_kind })
    }

    /// Knows the leaf that each window of the sample is packed in.
    pub(super) fn oracle(&self, run: &Run, windows: &Windows) -> Result<Oracle> {
        let mut paths = HashMap::new();
        for kind in &self.kinds {
            let Origin::Windows(chosen) = &kind.origin else { continue };
            for (text, &window) in kind.texts.iter().zip(chosen) {
                paths.insert(text.clone(), run.tree.path_of_leaf(windows.leaves[window])?);
            }
        }
        Ok(Oracle::new(run.tree.clone(), paths)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_and_prompts_shorter_than_their_text() {
        assert_eq!(spread(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 4), [0, 2, 5, 7]);
        assert_eq!(spread(&[1, 2], 9), [1, 2]);
        assert!(spread::<u8>(&[], 9).is_empty());
        assert_eq!(first_words(" one  two\nthree", 2).as_deref(), Some("one two"));
        assert_eq!(first_words("one two", 2), None);
    }
}
