//! Tests of the whole system: the program `anchorage` in temporary folders, and the sources themselves.

mod bad_input;
mod comparison;
mod faults;
#[path = "fixtures/files.rs"]
mod fixtures;
mod jobs;
mod kill;
mod kinds;
mod kubernetes;
mod pipeline;
mod posthoc;
mod route_study;
mod s3;
mod same_tree;
mod serving;
mod shards;
mod submit;
mod subtrees;
mod support;
mod tidy;
mod tree;
