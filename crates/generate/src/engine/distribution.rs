use std::cmp::Ordering;

use super::TokenScore;
use crate::Result;
use crate::choose::likeliest;

/// The model's distribution of a next token: softmax of its scores, in f64, before penalties and temperature.
pub(super) struct Distribution<'a> {
    logits: &'a [f32],
    largest: f64,
    /// ln Σ exp(x − largest)
    log_sum: f64,
}

impl<'a> Distribution<'a> {
    /// Of `logits` [V].
    ///
    /// # Errors
    /// When they are not finite.
    pub(super) fn new(logits: &'a [f32]) -> Result<Self> {
        let largest = f64::from(likeliest(logits)?.1);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
        Ok(Self { logits, largest, log_sum: sum.ln() })
    }

    /// The score of a token, with the `n_top` likeliest beside it.
    pub(super) fn score(&self, token: u32, n_top: usize) -> TokenScore {
        TokenScore { token, logprob: Some(self.logprob(token)), top: self.top(n_top) }
    }

    fn logprob(&self, token: u32) -> f32 {
        (f64::from(self.logits[token as usize]) - self.largest - self.log_sum) as f32
    }

    /// The `n` likeliest tokens, the lower of equals first.
    fn top(&self, n: usize) -> Vec<(u32, f32)> {
        let mut top: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
        for (token, &x) in (0u32..).zip(self.logits).filter(|_| n > 0) {
            if top.len() == n && x.total_cmp(&top[n - 1].1) != Ordering::Greater {
                continue;
            }
            let place = top.partition_point(|(_, other)| other.total_cmp(&x) != Ordering::Less);
            top.insert(place, (token, x));
            top.truncate(n);
        }
        top.into_iter().map(|(token, _)| (token, self.logprob(token))).collect()
    }

    /// −Σ p ln p, in nats.
    pub(super) fn entropy(&self) -> f64 {
        let mut sum = 0.0;
        for &x in self.logits {
            let below = f64::from(x) - self.largest;
            let weight = below.exp();
            if weight > 0.0 {
                sum += weight * below;
            }
        }
        self.log_sum - sum / self.log_sum.exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_the_softmax() {
        let logits = [1.0f32, 3.0, 2.0, 3.0, f32::NEG_INFINITY];
        let distribution = Distribution::new(&logits).unwrap();
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let p = logits.map(|x| f64::from(x).exp() / sum);
        let score = distribution.score(2, 3);
        assert!((f64::from(score.logprob.unwrap()) - p[2].ln()).abs() < 1e-6);
        assert_eq!(score.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(distribution.score(0, 9).top.len(), 5);
        assert_eq!(distribution.score(0, 0).top, []);
        let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
        assert!((distribution.entropy() - entropy).abs() < 1e-12);
        assert!((Distribution::new(&[0.0; 256]).unwrap().entropy() - 256f64.ln()).abs() < 1e-12);
        assert!(Distribution::new(&[0.0, f32::NAN]).is_err() && Distribution::new(&[f32::INFINITY]).is_err());
    }
}
