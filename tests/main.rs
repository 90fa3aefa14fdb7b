//! Tests of the whole system: the program `anchorage` in temporary folders, and the sources themselves.

mod bad_input;
mod comparison;
mod kill;
mod pipeline;
mod support;
mod tidy;
