use serde::{Deserialize, Serialize};

use super::catalog::Catalog;
use super::error::{Error, Result};

/// Number of frequency buckets.
pub const N_BUCKETS: usize = 5;

/// What a world holds and how often it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Seed of every draw: the same options give the same bytes.
    pub seed: u64,
    /// Families of fictional entities; each holds the three counts below.
    pub families: usize,
    /// People in a family.
    pub people_per_family: usize,
    /// Companies in a family.
    pub companies_per_family: usize,
    /// Places in a family.
    pub places_per_family: usize,
    /// Documents of one entity in each bucket, the rarest bucket first; increasing.
    pub ladder: [usize; N_BUCKETS],
    /// Share of all entities in each bucket, the rarest first; they sum to 1.
    pub shares: [f64; N_BUCKETS],
    /// Facts that a document states.
    pub facts_per_document: usize,
    /// Validation documents as a share of the corpus documents, 0 to 0.5, spread over the entities in
    /// proportion to their documents.
    pub validation_share: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0,
            families: 128,
            people_per_family: 5,
            companies_per_family: 2,
            places_per_family: 1,
            ladder: [6, 14, 32, 80, 200],
            shares: [0.36, 0.26, 0.18, 0.12, 0.08],
            facts_per_document: 4,
            validation_share: 0.03,
        }
    }
}

impl Options {
    /// Refuses what cannot be made, by itself or from the names and facts of `catalog`.
    pub(super) fn check(&self, catalog: &Catalog) -> Result<()> {
        let names = &catalog.names;
        at_most("families", self.families, names.max_families())?;
        at_most("people_per_family", self.people_per_family, names.given.len())?;
        at_most("companies_per_family", self.companies_per_family, names.company.len())?;
        at_most("places_per_family", self.places_per_family, names.place.len())?;
        at_most("facts_per_document", self.facts_per_document, catalog.min_facts())?;
        if self.facts_per_document == 0 {
            return refuse("facts_per_document", "at least 1", 0);
        }
        if self.ladder[0] == 0 || self.ladder.windows(2).any(|pair| pair[0] >= pair[1]) {
            return refuse("ladder", "increasing counts from 1 up", format!("{:?}", self.ladder));
        }
        let total: f64 = self.shares.iter().sum();
        if !self.shares.iter().all(|&share| share > 0.0) || (total - 1.0).abs() > 1e-6 {
            return refuse("shares", "positive shares that sum to 1", format!("{:?}", self.shares));
        }
        if !(0.0..=0.5).contains(&self.validation_share) {
            return refuse("validation_share", "0 to 0.5", self.validation_share);
        }
        Ok(())
    }
}

fn at_most(key: &'static str, found: usize, limit: usize) -> Result<()> {
    if found > limit { refuse(key, &format!("at most {limit}"), found) } else { Ok(()) }
}

fn refuse(key: &'static str, expected: &str, found: impl ToString) -> Result<()> {
    Err(Error::Option { key, expected: expected.to_owned(), found: found.to_string() })
}
