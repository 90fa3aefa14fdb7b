#![allow(missing_docs, unused)]
use crate::*;
use cluster_tree::ClusterId;
use std::collections::BTreeMap;
#[derive(Clone)]
pub struct Identity {
    pub spec: BlockSpec,
    pub seed: u64,
    pub hashes: BTreeMap<String, String>,
}
pub enum Access {
    Read,
    Write,
}
pub struct StoreOptions {
    pub access: Access,
}
impl Default for StoreOptions {
    fn default() -> Self {
        Self { access: Access::Write }
    }
}
#[derive(Clone)]
pub struct BankStore;
#[derive(Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ShardRecord {
    pub step: Step,
}
pub struct Checkpoint;
pub struct MappedBank;
pub struct Pruned;
impl BankStore {
    pub async fn open_url(
        url: &str,
        settings: &[(String, String)],
        bank: &str,
        options: StoreOptions,
    ) -> Result<Self> {
        panic!()
    }
    pub async fn checkpoint(&self, step: Step) -> Result<Checkpoint> {
        panic!()
    }
    pub async fn latest(&self) -> Result<Option<Checkpoint>> {
        panic!()
    }
    pub async fn write(
        &self,
        identity: &Identity,
        snapshot: Snapshot,
        base: Option<&ShardRecord>,
    ) -> Result<ShardRecord> {
        panic!()
    }
    pub async fn commit(&self, step: Step, records: &[ShardRecord]) -> Result<Checkpoint> {
        panic!()
    }
    pub async fn discard_after(&self, step: Step) -> Result<Vec<Step>> {
        panic!()
    }
    pub async fn keep(&self, n: usize) -> Result<Pruned> {
        panic!()
    }
}
impl Checkpoint {
    pub fn manifest(&self) -> &Manifest {
        panic!()
    }
    pub async fn load(&self, identity: &Identity, options: ShardOptions) -> Result<Shard> {
        panic!()
    }
    pub fn record(&self, placement: Placement) -> Option<ShardRecord> {
        panic!()
    }
}
impl MappedBank {
    pub fn open_step(bank_folder: &std::path::Path, step: Step) -> Result<Self> {
        panic!()
    }
    pub fn block_bytes(&self, id: ClusterId) -> Result<bytes::Bytes> {
        panic!()
    }
    pub fn manifest(&self) -> &Manifest {
        panic!()
    }
    pub fn spec(&self) -> &BlockSpec {
        panic!()
    }
    pub fn applied(&self) -> Step {
        panic!()
    }
}
