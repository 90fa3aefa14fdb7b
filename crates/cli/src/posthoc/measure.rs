//! What a run knows of what was learned, and of what was not.

use std::path::PathBuf;

use anyhow::Result;
use cluster_tree::ClusterPath;
use corpus::{Corpus, Tokenizer};
use eval::{Answer, AskOptions, HeldOut, MemoryMode, Question, Sample, ask, held_out, read_questions};
use memory_bank::BlockStore;

use super::cloze;
use super::corpora::Corpora;
use crate::config::{Config, EvalSection, PosthocSection};
use crate::evaluate::training_rate;
use crate::prepare::{Prepared, Windows};
use crate::run::Run;

/// Held-out text and questions about it.
pub(super) struct Text {
    pub(super) corpus: Corpus,
    pub(super) questions: Vec<Question>,
    /// Labels of the questions' buckets.
    pub(super) buckets: Vec<String>,
}

/// What every method is asked.
pub(super) struct Asked {
    pub(super) learned: Text,
    pub(super) kept: Text,
    section: EvalSection,
}

/// What was measured of one run.
pub(crate) struct Measured {
    pub(super) learned: OfText,
    pub(super) kept: OfText,
    /// Parameters that were trained.
    pub(super) trained: u64,
    /// Parameters that a token uses.
    pub(super) used: u64,
    pub(super) tokens: u64,
    pub(super) tokens_per_s: f64,
}

/// What was measured on one kind of text.
pub(super) struct OfText {
    pub(super) held_out: HeldOut,
    pub(super) answers: Vec<Answer>,
}

impl Text {
    fn open(
        config: &Config,
        (given, most): (&Option<PathBuf>, usize),
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let prepared = Prepared::of(config);
        let corpus = Corpus::open(&prepared.dir)?;
        corpus.check_tokenizer(tokenizer)?;
        let (questions, buckets) = match given {
            Some(path) => {
                let labels = (1..=eval::N_BUCKETS).map(|bucket| format!("bucket {bucket}")).collect();
                (read_questions(path)?, labels)
            }
            None => cloze::questions(&Windows::open(&prepared)?, most)?,
        };
        Ok(Self { corpus, questions, buckets })
    }
}

impl Asked {
    pub(super) fn open(
        config: &Config,
        section: &PosthocSection,
        corpora: &Corpora,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let most = section.n_questions;
        Ok(Self {
            learned: Text::open(&corpora.learned, (&section.questions, most), tokenizer)?,
            kept: Text::open(&corpora.kept, (&section.kept_questions, most), tokenizer)?,
            section: config.eval.clone(),
        })
    }

    /// Measures a run with one kind of memory.
    pub(super) fn measure(&self, run: &Run, mode: MemoryMode) -> Result<Measured> {
        let anchor = run.anchor.config().n_parameters();
        let spec = run.bank.as_ref().map(|bank| bank.store().spec().clone());
        let fetched = spec.as_ref().map_or(0, |spec| spec.fetch_len());
        let trained = match (&spec, mode) {
            (Some(spec), MemoryMode::Fetched) => spec.bank_len(),
            (Some(_), MemoryMode::Generic) => fetched,
            (Some(_), _) => 0,
            (None, _) => anchor,
        };
        Ok(Measured {
            learned: self.on(run, mode, &self.learned)?,
            kept: self.on(run, mode, &self.kept)?,
            trained,
            used: if mode == MemoryMode::None { anchor } else { anchor + fetched },
            tokens: run.state.tokens_seen,
            tokens_per_s: training_rate(&run.dir)?,
        })
    }

    fn on(&self, run: &Run, mode: MemoryMode, text: &Text) -> Result<OfText> {
        let (model, section) = (run.model(), &self.section);
        let n = match section.sequences {
            0 => text.corpus.n_validation(),
            n => n.min(text.corpus.n_validation()),
        };
        let held_out = held_out(&model, &text.corpus, mode, &Sample::whole(n, section.batch), &[])?;
        let paths = self.paths(run, mode, &text.questions)?;
        let options = AskOptions {
            batch: section.batch,
            max_new_tokens: section.max_answer_tokens,
            score_choices: section.choices,
        };
        let answers = ask(&model, &run.tokenizer, (&text.questions, &paths), options)?;
        Ok(OfText { held_out, answers })
    }

    /// The paths that questions fetch: each the path of its prompt.
    fn paths(&self, run: &Run, mode: MemoryMode, questions: &[Question]) -> Result<Vec<Option<ClusterPath>>> {
        if mode == MemoryMode::Fetched && !questions.is_empty() {
            let prompts: Vec<&str> = questions.iter().map(|question| question.prompt.as_str()).collect();
            return Ok(run.retriever()?.paths(&prompts)?.into_iter().map(Some).collect());
        }
        let path = match mode {
            MemoryMode::Generic => Some(ClusterPath::generic(run.tree.n_levels())?),
            _ => None,
        };
        Ok(vec![path; questions.len()])
    }
}
