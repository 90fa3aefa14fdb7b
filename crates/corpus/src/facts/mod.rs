//! The facts corpus: a closed world whose every fact is known, so that long-tail recall can be
//! measured. A model is trained on the documents, then asked closed-book questions by frequency.
//!
//! The world holds the elements and most countries, with facts that are not contested, and
//! fictional people, companies and places whose facts are independent uniform draws, so that
//! nothing about them can be guessed. Every document tells one entity; each fact of an entity is
//! stated in the same number of its documents, give or take one, and that number is part of every
//! question. What is contested about a real entity is left out rather than decided.

mod catalog;
mod documents;
mod error;
mod files;
mod names;
mod options;
mod questions;
mod template;
#[cfg(test)]
mod tests;
mod world;

use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use catalog::Catalog;
pub use error::{Error, Result};
pub use files::{BucketSummary, FileSummary, Summary};
pub use options::{N_BUCKETS, Options};
pub use questions::N_CHOICES;

/// A world: its entities, the documents that tell them, the questions that ask for them.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The options that it was made with.
    pub options: Options,
    /// Elements, countries, then fictional entities family by family.
    pub entities: Vec<Entity>,
    /// Training documents, shuffled.
    pub corpus: Vec<Document>,
    /// Documents of the same entities and facts, none of them in the corpus word for word; shuffled.
    pub validation: Vec<Document>,
    /// Two for each fact, in the order of the entities.
    pub questions: Vec<Question>,
}

impl Facts {
    /// Makes the world of `options`: a pure function, the same on every machine.
    ///
    /// # Errors
    /// [`Error::Option`] for options that are out of range, or that ask for more names or facts
    /// than there are; [`Error::NoNewDocument`] where validation documents run out of new wordings.
    pub fn generate(options: &Options) -> Result<Self> {
        let catalog = Catalog::embedded()?;
        options.check(&catalog)?;
        let mut entities = world::build(options, &catalog);
        let (corpus, validation) = documents::tell(options, &catalog, &mut entities)?;
        let questions = questions::ask(options, &catalog, &entities);
        Ok(Self { options: options.clone(), entities, corpus, validation, questions })
    }

    /// Writes `corpus.jsonl`, `validation.jsonl` and `questions.jsonl` into `dir`, which is made if
    /// absent, then `facts.json` with their counts and hashes. No file is ever half-written.
    ///
    /// # Errors
    /// [`Error::Io`] with the path that failed.
    pub fn write(&self, dir: &Path) -> Result<Summary> {
        files::write(self, dir)
    }
}

/// What an entity is; the label of its documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A chemical element.
    Element,
    /// A member state of the United Nations.
    Country,
    /// A fictional person.
    Person,
    /// A fictional company.
    Company,
    /// A fictional place.
    Place,
}

impl Kind {
    /// All kinds, real ones first.
    pub const ALL: [Self; 5] = [Self::Element, Self::Country, Self::Person, Self::Company, Self::Place];
    const FICTIONAL: [Self; 3] = [Self::Person, Self::Company, Self::Place];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Element => "element",
            Self::Country => "country",
            Self::Person => "person",
            Self::Company => "company",
            Self::Place => "place",
        }
    }
}

/// Something that documents tell of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entity {
    /// What it is.
    pub kind: Kind,
    /// Full name as within a sentence, unique in the world: "gold", "the Gambia", "Alba Renwick".
    pub name: String,
    /// Index of the family that shares its root; none for real entities.
    pub family: Option<usize>,
    /// Frequency bucket, 1 (rarest) to 5.
    pub bucket: usize,
    /// Training documents that tell it.
    pub documents: usize,
    /// What is true of it, at most one value a relation.
    pub facts: Vec<Fact>,
}

/// One value of one entity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// Name of the relation, such as "capital" or "birth_year".
    pub relation: String,
    /// Position among the relations of the kind.
    relation_index: usize,
    /// The value.
    pub value: String,
    /// Training documents that state it.
    pub exposures: usize,
}

/// A line of `corpus.jsonl` or `validation.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// "train/0000000" or "validation/0000000", numbered along the file.
    pub id: String,
    /// Kind of the entity.
    pub label: Kind,
    /// Full name of the entity.
    pub entity: String,
    /// An opening sentence, then one sentence a fact.
    pub text: String,
}

/// A line of `questions.jsonl`: complete `prompt` with a space, `answer` and a full stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// "kind/entity/relation/phrasing", unique.
    pub id: String,
    /// A sentence cut right before the value, without the space.
    pub prompt: String,
    /// What follows, without the space and without the full stop.
    pub answer: String,
    /// Full name of the entity.
    pub entity: String,
    /// Kind of the entity.
    pub kind: Kind,
    /// Name of the relation.
    pub relation: String,
    /// Training documents that tell the entity.
    pub frequency: usize,
    /// Training documents that state this fact.
    pub exposures: usize,
    /// Frequency bucket of the entity, 1 (rarest) to 5.
    pub bucket: usize,
    /// Whether the corpus uses the wording of the prompt.
    pub phrasing: Phrasing,
    /// The answer among other values of the relation, in random order: [`N_CHOICES`], or all values
    /// of a relation that has fewer (continent has 6, period has 7).
    pub choices: Vec<String>,
}

/// Where the wording of a question comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phrasing {
    /// A training template: the corpus states facts in these words.
    Train,
    /// A held-out template: the corpus never does.
    HeldOut,
}

impl Phrasing {
    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOut => "held_out",
        }
    }
}

/// Independent random streams of one seed, so that a change in one draw leaves the others alone.
#[derive(Clone, Copy)]
enum Stream {
    Names,
    Values,
    Buckets,
    Corpus,
    Validation,
    Order,
    Questions,
}

impl Stream {
    fn rng(self, seed: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(self as u64);
        rng
    }
}

/// `n` of `list` without repeats and in random order, or all where it has fewer.
fn draw<'a>(list: impl IntoIterator<Item = &'a String>, n: usize, rng: &mut ChaCha8Rng) -> Vec<&'a str> {
    let mut list: Vec<&str> = list.into_iter().map(String::as_str).collect();
    let (drawn, _) = list.partial_shuffle(rng, n);
    drawn.to_vec()
}
