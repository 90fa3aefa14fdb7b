//! The anchor with memory: equalities to the bit, gradients against finite differences, errors and files.

mod decoder;
mod equality;
mod errors;
mod file;
mod fixtures;
mod forms;
mod gradients;
mod kinds;
