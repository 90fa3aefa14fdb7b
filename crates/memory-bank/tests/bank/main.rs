//! The bank as its users see it: sizes, initial weights, the step fence, updates, files, and the saves
//! of many shards in an object store that may break at any moment.

mod crash;
mod faulty;
mod fence;
mod files;
mod hostile;
mod kinds;
mod offload;
mod probe;
mod saves;
mod shards;
mod sizes;
mod support;
mod tools;
mod updates;
