//! The bank as its users see it: sizes, initial weights, the step fence, updates and files.

mod fence;
mod files;
mod sizes;
mod support;
mod updates;
