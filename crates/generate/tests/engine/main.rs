//! The engine against the anchor, against `generate`, and against itself alone.

mod answers;
mod bounds;
mod failures;
mod fixture;
mod reroutes;
