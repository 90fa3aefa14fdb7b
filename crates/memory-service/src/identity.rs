use std::collections::{BTreeMap, BTreeSet};

use memory_bank::{BlockSpec, Placement};

use crate::proto;

/// What a bank is: a request that takes a shard for one of another bank is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The bank's name.
    pub bank: String,
    /// [`BlockSpec::hash`] of the bank.
    pub spec: String,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
}

impl Identity {
    /// Of a bank of these blocks.
    pub fn new(bank: &str, spec: &BlockSpec, hashes: BTreeMap<String, String>) -> Self {
        Self { bank: bank.to_owned(), spec: spec.hash(), hashes }
    }

    /// As a request to one of its shards carries it, in whatever life the shard is.
    pub(crate) fn message(&self, placement: Placement) -> proto::BankIdentity {
        proto::BankIdentity {
            bank: self.bank.clone(),
            spec: self.spec.clone(),
            hashes: self.hashes.clone().into_iter().collect(),
            shard: placement.shard as u32,
            n_shards: placement.n_shards as u32,
            life: 0,
            attempt: 0,
        }
    }

    /// What differs between this bank's shard and what the other side takes it for: a line that names
    /// both values, `None` when nothing does.
    pub(crate) fn difference(&self, placement: Placement, other: &proto::BankIdentity) -> Option<String> {
        let ours = self.message(placement);
        let differs = |what: &str, ours: &dyn ToString, other: &dyn ToString| {
            let (ours, other) = (ours.to_string(), other.to_string());
            (ours != other).then(|| format!("{what} is {ours} here and {other} in the request"))
        };
        let keys: BTreeSet<&String> = self.hashes.keys().chain(other.hashes.keys()).collect();
        let hash =
            |hashes: &BTreeMap<String, String>, key| hashes.get(key).cloned().unwrap_or("missing".into());
        let theirs: BTreeMap<String, String> = other.hashes.clone().into_iter().collect();
        let hashes = keys.into_iter().find_map(|key| {
            differs(&format!("hash of {key}"), &hash(&self.hashes, key), &hash(&theirs, key))
        });
        differs("bank", &ours.bank, &other.bank)
            .or_else(|| differs("number of shards", &ours.n_shards, &other.n_shards))
            .or_else(|| differs("shard", &ours.shard, &other.shard))
            .or_else(|| differs("hash of the bank's spec", &ours.spec, &other.spec))
            .or(hashes)
    }
}
