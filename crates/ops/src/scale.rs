//! A tensor times a number.

use candle_core::Result;

use crate::{Tape, Traced};

/// y = factor · x, as when embeddings are scaled.
///
/// # Errors
/// When the product cannot be made.
pub fn scale(tape: &mut Tape, x: &Traced, factor: f64) -> Result<Traced> {
    let y = (x.value() * factor)?;
    if !tape.records(&[x]) {
        return Ok(Traced::constant(y));
    }
    let x = x.place();
    Ok(tape.record(y, move |dy, gradients| gradients.give(&x, (dy * factor)?)))
}
