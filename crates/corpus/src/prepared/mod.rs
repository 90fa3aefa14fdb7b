//! The prepared folder, `prepared/<name>/`, which four stages fill.
//!
//! ```text
//! tokenise  tokens.bin documents.bin windows.bin labels.json, then tokens.json
//! embed     embeddings.bin (the caller embeds)
//! cluster   tree.safetensors (the caller clusters)
//! pack      train.pack validation.pack, then fingerprint.json
//! stages.json   the stages that are finished, and a hash of what each was made from
//! ```
//!
//! The file named last is removed before a stage replaces its files and written after them, so a
//! folder that a killed stage left is never taken as whole. All numbers are little-endian.

pub mod corpus;
pub mod embeddings;
pub(crate) mod files;
pub mod fingerprint;
mod journal;
pub mod pack;
mod packed_set;
mod shuffle;
pub mod stages;
#[cfg(test)]
mod tests;
pub mod tokenise;
pub mod tokens;

#[cfg(target_endian = "big")]
compile_error!("the files of a prepared folder are mapped as little-endian numbers");
