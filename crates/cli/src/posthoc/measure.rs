//! What a run knows of what was learned, and of what was not.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use cluster_tree::ClusterPath;
use corpus::{Corpus, Tokenizer, hash_inputs};
use eval::{Answer, AskOptions, HeldOut, MemoryMode, Question, Sample, ask, held_out, read_questions};
use memory_bank::BlockStore;
use serde::{Deserialize, Serialize};

use super::cloze::{self, About};
use super::corpora::Corpora;
use crate::config::{Config, EvalSection, PosthocSection};
use crate::evaluate::{select, training_rate};
use crate::prepare::{Prepared, Windows};
use crate::run::{Run, write_whole};

/// Held-out text, and questions.
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
    /// Hash of all that is asked.
    hash: String,
}

/// What was measured of one run.
#[derive(Serialize, Deserialize)]
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
#[derive(Serialize, Deserialize)]
pub(super) struct OfText {
    pub(super) held_out: HeldOut,
    pub(super) answers: Vec<Answer>,
}

impl Text {
    fn open(
        config: &Config,
        (given, about, most): (&Option<PathBuf>, About, usize),
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let prepared = Prepared::of(config);
        let corpus = Corpus::open(&prepared.dir)?;
        corpus.check_tokenizer(tokenizer)?;
        let (questions, buckets) = match given {
            Some(path) => {
                let labels = (1..=eval::N_BUCKETS).map(|bucket| format!("bucket {bucket}")).collect();
                (select(read_questions(path)?, config.eval.questions_per_bucket), labels)
            }
            None => cloze::questions(&Windows::open(&prepared)?, about, most)?,
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
        let learned = Text::open(&corpora.learned, (&section.questions, About::Read, most), tokenizer)?;
        let kept = Text::open(&corpora.kept, (&section.kept_questions, About::HeldOut, most), tokenizer)?;
        let mut parts = vec!["measured.v1".to_string(), serde_json::to_string(&config.eval)?];
        for text in [&learned, &kept] {
            parts.push(text.corpus.fingerprint().hash());
            parts.extend(text.questions.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?);
        }
        Ok(Self { learned, kept, section: config.eval.clone(), hash: hash_inputs(&parts) })
    }

    /// Measures a run with one kind of memory, unless its folder has what the same measurement found before.
    pub(super) fn measure(&self, name: &str, run: &Run, mode: MemoryMode) -> Result<Measured> {
        let parts = [&self.hash, &toml::to_string(&run.config)?, &serde_json::to_string(&run.state)?];
        let inputs = hash_inputs(&parts);
        let file = run.dir.join(format!("measured-{}.json", mode.name()));
        let found = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some((of, measured)) = found
            && inputs == *String::as_str(&of)
        {
            eprintln!("{:>18}: {name}: measured already", "measure");
            return Ok(measured);
        }
        eprintln!("{:>18}: {name}", "measure");
        let measured = self.measure_anew(run, mode)?;
        write_whole(&file, &serde_json::to_vec(&(inputs, &measured))?)?;
        Ok(measured)
    }

    fn measure_anew(&self, run: &Run, mode: MemoryMode) -> Result<Measured> {
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
