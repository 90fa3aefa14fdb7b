use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The mean.
    pub mean: f64,
    /// 2.5th percentile of the bootstrap.
    pub low: f64,
    /// 97.5th percentile of the bootstrap.
    pub high: f64,
    /// Values averaged.
    pub n: usize,
}

/// Mean of `values` with a percentile bootstrap interval (Efron 1979): 2,000 resamples, 2.5th to 97.5th
/// percentile; the same for the same values. None of no values.
pub fn bootstrap_mean(values: &[f64]) -> Option<Rate> {
    let n = values.len();
    if n == 0 {
        return None;
    }
    let mut random = ChaCha8Rng::seed_from_u64(n as u64);
    let mean = |sum: f64| sum / n as f64;
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| mean((0..n).map(|_| values[(random.next_u64() % n as u64) as usize]).sum()))
        .collect();
    means.sort_by(f64::total_cmp);
    let percentile = |p: f64| means[(p * (RESAMPLES - 1) as f64).round() as usize];
    Some(Rate { mean: mean(values.iter().sum()), low: percentile(0.025), high: percentile(0.975), n })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_proportion_is_the_binomial_one() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 4 == 0)).collect();
        let rate = bootstrap_mean(&values).unwrap();
        // 0.25 ± 1.96·√(0.25·0.75/400) = 0.25 ± 0.0424
        assert_eq!(rate.mean, 0.25);
        assert!((rate.low - 0.2076).abs() < 0.006 && (rate.high - 0.2924).abs() < 0.006, "{rate:?}");
        assert_eq!(bootstrap_mean(&values), Some(rate));
        assert_eq!(bootstrap_mean(&[]), None);
    }
}
