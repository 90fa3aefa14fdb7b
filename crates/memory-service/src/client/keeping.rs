//! Blocks that are read again before they change: kept, and asked for by version.

use std::sync::{Arc, MutexGuard, PoisonError};

use cluster_tree::ClusterId;
use memory_bank::{Block, Kept, Result, Step};

use super::RemoteBank;
use super::shard::Version;

/// A block that is kept, as its shard had it.
#[derive(Clone)]
pub(super) struct Held {
    version: Version,
    values: Arc<Vec<f32>>,
}

impl RemoteBank {
    /// As [`RemoteBank::fetch`]: what is kept from reads before is fetched only where it has changed.
    pub(super) async fn read_kept(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        let held: Vec<Option<Held>> = {
            let mut kept = self.kept();
            ids.iter().map(|&id| kept.get(after, id).cloned()).collect()
        };
        let versions: Vec<Version> = held
            .iter()
            .map(|held| held.as_ref().map_or_else(Version::default, |held| held.version))
            .collect();
        let mut blocks: Vec<Block> = ids.iter().map(|&id| Block { id, values: Vec::new() }).collect();
        let told = self.fetch_changed(after, (&mut blocks, &versions)).await?;
        let mut kept = self.kept();
        for ((block, held), version) in blocks.iter_mut().zip(held).zip(told) {
            match held {
                Some(held) if version.is_known() && held.version == version => {
                    block.values.copy_from_slice(&held.values);
                }
                _ if version.is_known() => {
                    let n_bytes = size_of_val(&block.values[..]) as u64;
                    kept.put(block.id, n_bytes, Held { version, values: Arc::new(block.values.clone()) });
                }
                _ => {}
            }
        }
        Ok(blocks)
    }

    fn kept(&self) -> MutexGuard<'_, Kept<Held>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
