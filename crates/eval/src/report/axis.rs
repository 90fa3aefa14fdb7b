//! Where a number lies: scales, ticks, thinning, and labels that keep apart.

/// Largest magnitude that is drawn: differences of larger numbers could overflow.
const LARGEST: f64 = 1e100;

/// Whether `value` can be drawn.
pub(super) fn drawable(value: f64) -> bool {
    value.is_finite() && value.abs() <= LARGEST
}

/// The smallest and largest of the values that can be drawn.
pub(super) fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| drawable(*v)).fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((v.min(low), v.max(high))),
    })
}

/// A linear map from numbers to pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    /// Between ticks.
    step: f64,
}

impl Scale {
    /// Maps `low..high` to `from..to`, with about four ticks; a range of (nearly) no length is widened.
    pub(super) fn new((low, high): (f64, f64), (from, to): (f64, f64)) -> Self {
        let size = low.abs().max(high.abs());
        let (low, high) = match high - low > 1e-9 * size.max(1e-9) {
            true => (low, high),
            false => (low - 0.5 * size.max(1.0), low + 0.5 * size.max(1.0)),
        };
        Self { low, high, from, to, step: nice_step((high - low) / 4.0) }
    }

    /// The pixel of `value`.
    pub(super) fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Round numbers within the scale.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let first = (self.low / self.step - 1e-9).ceil();
        let last = (self.high / self.step + 1e-9).floor();
        (0..=(last - first) as usize).map(|i| (first + i as f64) * self.step).collect()
    }

    /// Decimals that tell the ticks apart, six at most.
    pub(super) fn tick_digits(&self) -> usize {
        let is_whole = |x: f64| (x - x.round()).abs() < 1e-6;
        (0..6).find(|&digits| is_whole(self.step * 10f64.powi(digits))).unwrap_or(6) as usize
    }

    /// The scale stretched to begin and end on a tick.
    pub(super) fn rounded(self) -> Self {
        let (low, high) = ((self.low / self.step).floor(), (self.high / self.step).ceil());
        Self { low: low * self.step, high: high * self.step, ..self }
    }
}

/// 1, 2, 2.5 or 5 times a power of ten, `rough` or a little more.
fn nice_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let times = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|times| times * power >= rough * 0.999);
    times.unwrap_or(10.0) * power
}

/// At most about `n` of `points`: the lowest and highest of each of n/2 equal stretches, and the first and last
/// point. The outline of a noisy curve is kept, and with it its minimum. Points must be in order of x; one that
/// is not drawable is kept as a gap if the stretch holds nothing else.
pub(super) fn thin(points: &[(u64, f64)], n: usize) -> Vec<(u64, f64)> {
    if points.len() <= n {
        return points.to_vec();
    }
    let mut kept = vec![0, points.len() - 1];
    let stretches = (n / 2).max(1);
    for stretch in 0..stretches {
        let range = stretch * points.len() / stretches..(stretch + 1) * points.len() / stretches;
        let by_loss = |&a: &usize, &b: &usize| points[a].1.total_cmp(&points[b].1);
        let drawn = || range.clone().filter(|&i| drawable(points[i].1));
        match (drawn().min_by(by_loss), drawn().max_by(by_loss)) {
            (Some(low), Some(high)) => kept.extend([low, high]),
            _ => kept.push(range.start),
        }
    }
    kept.sort_unstable();
    kept.dedup();
    kept.into_iter().map(|i| points[i]).collect()
}

/// The mean point of each of `n` equal stretches of `points`, of those that are drawable.
pub(super) fn smooth(points: &[(u64, f64)], n: usize) -> Vec<(u64, f64)> {
    let stretch = |i: usize| &points[i * points.len() / n..(i + 1) * points.len() / n];
    let mean = |points: &[(u64, f64)]| {
        let drawn: Vec<&(u64, f64)> = points.iter().filter(|point| drawable(point.1)).collect();
        let middle = drawn.get(drawn.len() / 2)?.0;
        Some((middle, drawn.iter().map(|point| point.1 / drawn.len() as f64).sum()))
    };
    (0..n).filter_map(|i| mean(stretch(i))).collect()
}

/// Moves `places` apart to at least `gap`, in their order, none below `end` unless there is no room.
pub(super) fn spread(places: &mut [f64], gap: f64, end: f64) {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by(|&a, &b| places[a].total_cmp(&places[b]));
    let mut floor = f64::NEG_INFINITY;
    for &i in &order {
        places[i] = places[i].max(floor);
        floor = places[i] + gap;
    }
    let mut ceiling = end;
    for &i in order.iter().rev() {
        places[i] = places[i].min(ceiling);
        ceiling = places[i] - gap;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        let scale = Scale::new((0.0, 0.83), (100.0, 0.0)).rounded();
        let ticks: Vec<String> = scale.ticks().iter().map(|t| format!("{t:.2}")).collect();
        assert_eq!(ticks, ["0.00", "0.25", "0.50", "0.75", "1.00"]);
        assert_eq!((scale.at(0.0), scale.at(1.0)), (100.0, 0.0));
        assert_eq!(scale.tick_digits(), 2);
        assert_eq!(Scale::new((2.1, 2.9), (0.0, 1.0)).tick_digits(), 1);
        assert_eq!(Scale::new((0.0, 40.0), (0.0, 1.0)).tick_digits(), 0);
    }

    #[test]
    fn a_scale_of_one_value_or_of_the_largest_puts_it_in_the_picture() {
        for value in [0.0, 3.0, -1e100, 1e100] {
            let scale = Scale::new((value, value), (0.0, 10.0));
            assert!((scale.at(value) - 5.0).abs() < 1e-9, "{value}");
            assert!(!scale.ticks().is_empty());
        }
        let scale = Scale::new((-1e100, 1e100), (0.0, 10.0)).rounded();
        assert!(scale.at(5e99) > 5.0 && scale.at(5e99) < 10.0);
    }

    #[test]
    fn thinning_keeps_the_ends_the_minimum_and_the_order() {
        let mut points: Vec<(u64, f64)> = (0..50_000).map(|i| (i, 5.0 + (i as f64 * 0.7).sin())).collect();
        points[31_337].1 = 0.25;
        points[40_000].1 = f64::NAN;
        let thinned = thin(&points, 400);
        assert!(thinned.len() <= 402, "{}", thinned.len());
        assert_eq!((thinned.first(), thinned.last()), (points.first(), points.last()));
        assert!(thinned.contains(&(31_337, 0.25)));
        assert!(thinned.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(thin(&points[..300], 400).len(), 300);
    }

    #[test]
    fn a_stretch_of_nothing_drawable_stays_a_gap() {
        let points: Vec<(u64, f64)> =
            (0..1000).map(|i| (i, if (400..600).contains(&i) { f64::NAN } else { 1.0 })).collect();
        let thinned = thin(&points, 100);
        assert!(thinned.iter().any(|(x, y)| (400..600).contains(x) && y.is_nan()));
    }

    #[test]
    fn smoothing_takes_the_mean_of_what_there_is() {
        let mut points: Vec<(u64, f64)> = (0..100).map(|i| (i, i as f64)).collect();
        points[10].1 = f64::NAN;
        points[50..75].iter_mut().for_each(|point| point.1 = f64::NAN);
        let smoothed = smooth(&points, 4);
        assert_eq!(smoothed.iter().map(|point| point.0).collect::<Vec<_>>(), [13, 37, 87]);
        assert!((smoothed[0].1 - (300.0 - 10.0) / 24.0).abs() < 1e-12, "{smoothed:?}");
    }

    #[test]
    fn labels_keep_apart_and_in_order() {
        let mut places = [10.0, 100.0, 99.0, 98.0];
        spread(&mut places, 14.0, 104.0);
        assert_eq!(places, [10.0, 104.0, 90.0, 76.0]);
    }
}
