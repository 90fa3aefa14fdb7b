//! The run report: everything a run has measured, as one self-contained page.
//!
//! [`html`] is a pure function of a [`Report`], [`route_study_html`] of a [`RouteStudy`], and [`posthoc_html`] of
//! a [`Posthoc`]. The page holds its own style and its charts as inline SVG,
//! asks the network for nothing, and follows the reader's light or dark setting.

mod axis;
mod card;
mod charts;
mod format;
mod headline;
mod page;
mod palette;
mod posthoc;
mod routes;
mod sections;
mod strip;
mod svg;
mod tables;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Deserializer, Serialize};

use crate::Rate;

pub use card::{card_places, model_card};
pub use format::count;
pub use page::html;
pub use posthoc::{MethodRow, Posthoc, Reading, Side, posthoc_html};
pub use routes::{MissLoss, MissedLoss, RouteStudy, RouterStudy, TextAgreement, route_study_html};

/// Everything that a page shows. Written as `report.json` too, so that it can be rendered again; JSON has no
/// NaN, so a non-finite number is written as null and read as NaN.
///
/// Memories are named `none`, `generic`, `always_on`, `fetched` and `random`: these have a colour, a mark and
/// an explanation of their own. A section without data is left out of the page.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The run's name.
    pub run: String,
    /// Facts about the run, each a name and a value ready to print.
    pub summary: Vec<(String, String)>,
    /// Loss while training.
    pub curves: Vec<Curve>,
    /// Loss on held-out documents with each memory.
    pub memories: Vec<MemoryRow>,
    /// Exact match by frequency bucket.
    pub recall: Vec<RecallRow>,
    /// The same questions in a wording that the training text never uses.
    pub recall_held_out: Vec<RecallRow>,
    /// The same by choice scoring: is the true answer the likeliest of the choices?
    pub recall_choice: Vec<RecallRow>,
    /// Labels of the buckets, rarest first. A last word that all share ("4–9 exposures") names the axis.
    pub buckets: Vec<String>,
    /// Exact match by relation.
    pub relations: Vec<RelationRow>,
    /// Perplexity by label of the document.
    pub labels: Vec<LabelRow>,
    /// Documents in each cluster, by level, coarse to fine; any order within a level.
    pub cluster_sizes: Vec<Vec<u64>>,
    /// Questions and what was answered.
    pub samples: Vec<Sample>,
}

/// A loss by tokens seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// What it is of; the name of a memory gives it that memory's colour.
    pub name: String,
    /// Measured on held-out documents, not on the batch.
    pub validation: bool,
    /// (tokens seen, loss in nats per token), in any order.
    #[serde(deserialize_with = "pairs_with_nulls")]
    pub points: Vec<(u64, f64)>,
}

/// Loss on held-out documents with one memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryRow {
    /// The memory's name.
    pub memory: String,
    /// Nats per token.
    pub loss: Rate,
    /// e^loss.
    #[serde(deserialize_with = "number_or_null")]
    pub perplexity: f64,
    /// Parameters that one token uses: the anchor's and the memory's.
    pub parameters: u64,
    /// A remark, or nothing.
    pub note: String,
}

/// Accuracy by frequency bucket with one memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RecallRow {
    /// The memory's name.
    pub memory: String,
    /// Share of questions answered, 0 to 1, rarest bucket first; none where nothing was asked.
    pub buckets: Vec<Option<Rate>>,
}

/// Exact match on one relation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RelationRow {
    /// What is asked about an entity.
    pub relation: String,
    /// Questions asked.
    pub n: usize,
    /// (memory, share of questions answered, 0 to 1).
    #[serde(deserialize_with = "pairs_with_nulls")]
    pub by_memory: Vec<(String, f64)>,
}

/// Perplexity on the documents of one label.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LabelRow {
    /// The label: a book, a kind of text.
    pub label: String,
    /// Tokens measured.
    pub tokens: u64,
    /// (memory, perplexity).
    #[serde(deserialize_with = "pairs_with_nulls")]
    pub by_memory: Vec<(String, f64)>,
}

/// One question and what was answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The text to complete.
    pub prompt: String,
    /// How it truly goes on.
    pub answer: String,
    /// The cluster path that the prompt was routed to, ready to print.
    pub path: String,
    /// (memory, continuation).
    pub outputs: Vec<(String, String)>,
}

fn number_or_null<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn pairs_with_nulls<'de, D: Deserializer<'de>, K: Deserialize<'de>>(
    from: D,
) -> Result<Vec<(K, f64)>, D::Error> {
    let pairs = Vec::<(K, Option<f64>)>::deserialize(from)?;
    Ok(pairs.into_iter().map(|(key, value)| (key, value.unwrap_or(f64::NAN))).collect())
}
