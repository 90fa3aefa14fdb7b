use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A learning rate over steps: linear warm-up to `peak`, then a cosine down to `floor`.
#[derive(Copy, Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Learning rate at the end of the warm-up.
    pub peak: f64,
    /// Learning rate from `total_steps` on.
    pub floor: f64,
    /// Steps of warm-up; the last of them runs at `peak`.
    pub warmup_steps: u64,
    /// Step at which the cosine reaches `floor`.
    pub total_steps: u64,
}

impl Schedule {
    /// Fails on a rate that is negative or not finite, a floor above the peak, and a warm-up that
    /// is longer than the whole.
    pub fn validate(&self) -> Result<()> {
        if !(self.peak.is_finite() && self.peak >= 0.0) {
            return Err(setting("peak", "a finite rate of at least 0", self.peak));
        }
        if !(0.0..=self.peak).contains(&self.floor) {
            return Err(setting("floor", &format!("0 to peak {}", self.peak), self.floor));
        }
        if self.warmup_steps > self.total_steps {
            let expected = format!("at most total_steps {}", self.total_steps);
            return Err(setting("warmup_steps", &expected, self.warmup_steps));
        }
        Ok(())
    }

    /// The learning rate of a step; the first step is 1.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        if step >= self.total_steps {
            return self.floor;
        }
        let progress = (step - self.warmup_steps) as f64 / (self.total_steps - self.warmup_steps) as f64;
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (PI * progress).cos())
    }
}

pub(crate) fn setting(field: &'static str, expected: &str, found: impl ToString) -> Error {
    Error::Setting { field, expected: expected.to_owned(), found: found.to_string() }
}
