use std::sync::Arc;

use memory_bank::Step;
use serde::Serialize;

use super::{Bank, BankSource, Error, Result};

/// The banks that are loaded, by name.
pub struct Banks {
    _private: (),
}

/// What a loaded bank is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BankInfo {
    /// Its name.
    pub name: String,
    /// How often a bank was loaded before it: different for all that were ever loaded.
    pub load: u64,
    /// Where it is.
    pub source: String,
    /// The last step applied.
    pub step: Step,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Hashes of what it belongs to, and of its spec.
    pub hashes: std::collections::BTreeMap<String, String>,
    /// `f32`, `bf16` or `int8`: how its blocks are held.
    pub dtype: String,
    /// Parameters, the generic blocks not counted.
    pub n_parameters: u64,
}

impl Banks {
    /// The name of the bank of requests that name none.
    pub const DEFAULT: &'static str = "default";

    /// What is loaded, by name.
    pub fn list(&self) -> Vec<BankInfo> {
        vec![]
    }

    /// The bank of a name, to be held by a request until it ends.
    ///
    /// # Errors
    /// [`Error::UnknownBank`].
    pub fn get(&self, name: &str) -> Result<Arc<Bank>> {
        Err(Error::UnknownBank { name: name.to_owned(), loaded: vec![] })
    }

    /// Opens a bank and gives it a name; one that has it already is replaced once the new one is whole, and ends
    /// with the last request that holds it.
    ///
    /// # Errors
    /// On a bank that does not belong to what is served, naming both, and when it cannot be opened: then what was
    /// loaded stays.
    pub async fn load(&self, name: &str, source: BankSource) -> Result<BankInfo> {
        Err(Error::Task(format!("{name} {source:?}")))
    }

    /// Takes a name away; the bank ends with the last request that holds it.
    ///
    /// # Errors
    /// [`Error::UnknownBank`].
    pub fn unload(&self, name: &str) -> Result<()> {
        self.get(name).map(drop)
    }
}
