//! Which tiers a fetch asks, and in which order, decided by what earlier ones took: a value without
//! a clock.

use std::time::Duration;

/// Requests that a tier is judged by: averages forget what is older, and with fewer nothing changes.
pub(crate) const WINDOW: u64 = 8;
/// By how much a tier must be slower than the next to be bypassed: less may be chance.
const MARGIN: f64 = 1.2;
/// One in so many fetches asks a tier that would not be asked, to learn how fast it is.
pub(crate) const PROBE_EVERY: u64 = 64;
/// A tier that answered nothing for so long is measured anew.
pub(crate) const STALE: Duration = Duration::from_secs(60);

/// How fast a tier has been, averaged with exponentially falling weights.
#[derive(Copy, Clone, Default, Debug)]
pub(crate) struct Pace {
    /// Of a request.
    pub(crate) seconds: f64,
    /// Of a request's blocks as f32, whatever they are held as.
    pub(crate) bytes: f64,
    n_requests: u64,
    last: Duration,
    pub(crate) bypassed: bool,
    dropped: bool,
}

impl Pace {
    /// Counts one request: when it ended, how long it took and the bytes it gave.
    pub(crate) fn observe(&mut self, now: Duration, took: Duration, bytes: u64) {
        self.n_requests += 1;
        // The plain mean at first, so that the first request weighs no more than the others.
        let weight = (2.0 / (WINDOW + 1) as f64).max(1.0 / self.n_requests as f64);
        self.seconds += weight * (took.as_secs_f64() - self.seconds);
        self.bytes += weight * (bytes as f64 - self.bytes);
        self.last = now;
    }

    pub(crate) fn seconds_per_byte(&self) -> f64 {
        if self.bytes > 0.0 { self.seconds / self.bytes } else { 0.0 }
    }

    fn is_known(&self) -> bool {
        self.n_requests >= WINDOW
    }
}

/// The order in which to ask tiers until one has the blocks.
#[derive(PartialEq, Debug)]
pub(crate) struct Route {
    pub(crate) order: Vec<usize>,
    /// How many of them, from the first, are not bypassed; those that are come last, when all else
    /// has failed.
    pub(crate) n_used: usize,
}

impl Route {
    pub(crate) fn uses(&self, tier: usize) -> bool {
        self.order[..self.n_used].contains(&tier)
    }
}

/// The tiers below RAM, fastest first as the caller believes.
#[derive(Clone, Debug)]
pub(crate) struct Routing {
    paces: Vec<Pace>,
    n_routed: u64,
}

impl Routing {
    pub(crate) fn new(n_tiers: usize) -> Self {
        Self { paces: vec![Pace::default(); n_tiers], n_routed: 0 }
    }

    pub(crate) fn pace(&self, tier: usize) -> &Pace {
        &self.paces[tier]
    }

    /// Counts one request of a tier, and judges all of them.
    pub(crate) fn observe(&mut self, tier: usize, now: Duration, took: Duration, bytes: u64) {
        self.paces[tier].observe(now, took, bytes);
        self.judge();
    }

    /// Never asks a tier again.
    pub(crate) fn drop_tier(&mut self, tier: usize) {
        self.paces[tier].dropped = true;
        self.judge();
    }

    /// Bypasses each tier that is slower than the next one that is not bypassed. The last one has no
    /// next one; and where too little is known, all stays as it is.
    fn judge(&mut self) {
        let mut next: Option<Pace> = None;
        for pace in self.paces.iter_mut().rev().filter(|pace| !pace.dropped) {
            match next {
                None => pace.bypassed = false,
                Some(next) if pace.is_known() && next.is_known() => {
                    pace.bypassed = pace.seconds_per_byte() > MARGIN * next.seconds_per_byte();
                }
                Some(_) => {}
            }
            if !pace.bypassed {
                next = Some(*pace);
            }
        }
    }

    /// The tiers that the next fetch asks.
    pub(crate) fn route(&mut self, now: Duration) -> Route {
        self.n_routed += 1;
        for pace in &mut self.paces {
            if now.saturating_sub(pace.last) > STALE {
                pace.n_requests = 0;
            }
        }
        let paces = &self.paces;
        let tiers = (0..paces.len()).filter(|&tier| !paces[tier].dropped);
        let (mut order, bypassed): (Vec<usize>, Vec<usize>) = tiers.partition(|&tier| !paces[tier].bypassed);
        let mut n_used = order.len();
        order.extend(bypassed);
        if self.n_routed.is_multiple_of(PROBE_EVERY) {
            let unknown = (1..order.len()).filter(|&place| !paces[order[place]].is_known());
            if let Some(place) = unknown.min_by_key(|&place| paces[order[place]].n_requests) {
                n_used += usize::from(place >= n_used);
                order[..=place].rotate_right(1);
            }
        }
        Route { order, n_used }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn observe(routing: &mut Routing, tier: usize, n: u64, millis: u64) {
        (0..n).for_each(|_| routing.observe(tier, at(1), Duration::from_millis(millis), MB));
    }

    /// The order of a fetch that probes nothing.
    fn order(routing: &Routing) -> Vec<usize> {
        Routing { n_routed: 0, ..routing.clone() }.route(at(1)).order
    }

    #[test]
    fn a_tier_slower_than_the_next_is_bypassed_once_both_are_known() {
        let mut routing = Routing::new(3);
        assert_eq!(routing.route(at(0)), Route { order: vec![0, 1, 2], n_used: 3 });
        observe(&mut routing, 0, WINDOW, 50);
        observe(&mut routing, 1, WINDOW - 1, 10);
        assert_eq!(order(&routing), [0, 1, 2]);
        observe(&mut routing, 1, 1, 10);
        let route = routing.route(at(1));
        assert_eq!(route, Route { order: vec![1, 2, 0], n_used: 2 });
        assert!(route.uses(1) && !route.uses(0));
    }

    #[test]
    fn what_counts_is_time_per_byte() {
        let mut routing = Routing::new(2);
        for _ in 0..WINDOW {
            routing.observe(0, at(1), Duration::from_millis(50), 100 * MB);
            routing.observe(1, at(1), Duration::from_millis(10), MB);
        }
        assert_eq!(order(&routing), [0, 1]);
    }

    #[test]
    fn the_next_tier_is_the_next_one_used() {
        let mut routing = Routing::new(3);
        observe(&mut routing, 1, WINDOW, 20);
        observe(&mut routing, 2, WINDOW, 10);
        // Faster than the tier below it, which is bypassed, and slower than the one below that.
        observe(&mut routing, 0, WINDOW, 15);
        assert_eq!(routing.route(at(1)), Route { order: vec![2, 0, 1], n_used: 1 });
    }

    #[test]
    fn a_little_slower_is_not_slower() {
        let mut routing = Routing::new(2);
        observe(&mut routing, 0, WINDOW, 11);
        observe(&mut routing, 1, WINDOW, 10);
        assert_eq!(order(&routing), [0, 1]);
    }

    #[test]
    fn one_slow_request_among_fast_ones_changes_nothing_and_many_do() {
        let mut routing = Routing::new(2);
        observe(&mut routing, 0, 100, 1);
        observe(&mut routing, 1, WINDOW, 10);
        observe(&mut routing, 0, 1, 20);
        assert_eq!(order(&routing), [0, 1]);
        observe(&mut routing, 0, WINDOW, 20);
        assert_eq!(order(&routing), [1, 0]);
    }

    #[test]
    fn a_tier_comes_back_when_the_next_one_grows_slower() {
        let mut routing = Routing::new(2);
        observe(&mut routing, 0, WINDOW, 50);
        observe(&mut routing, 1, WINDOW, 10);
        assert_eq!(order(&routing), [1, 0]);
        observe(&mut routing, 1, 5 * WINDOW, 60);
        assert_eq!(order(&routing), [0, 1]);
    }

    #[test]
    fn a_bypassed_tier_is_tried_again_after_some_time_by_few_fetches() {
        let mut routing = Routing::new(2);
        observe(&mut routing, 0, WINDOW, 50);
        observe(&mut routing, 1, WINDOW, 10);
        let now = at(2) + STALE;
        let probed = |routing: &mut Routing, now: Duration| {
            let mut probes = 0;
            for _ in 0..PROBE_EVERY * 2 * WINDOW {
                let route = routing.route(now);
                let (tier, millis) = (route.order[0], [5, 10][route.order[0]]);
                if routing.paces[0].bypassed && tier == 0 {
                    assert_eq!(route, Route { order: vec![0, 1], n_used: 2 });
                    probes += 1;
                }
                routing.observe(tier, now, Duration::from_millis(millis), MB);
            }
            probes
        };
        assert_eq!(probed(&mut routing, at(2)), 0, "too early");
        // It was slow for a while only: as many probes as it takes to know, and it is used again.
        assert_eq!(probed(&mut routing, now), WINDOW);
        assert_eq!(order(&routing), [0, 1]);
    }

    #[test]
    fn a_tier_that_nothing_reaches_is_measured_too() {
        let mut routing = Routing::new(2);
        let firsts: Vec<usize> = (0..2 * PROBE_EVERY).map(|_| routing.route(at(1)).order[0]).collect();
        let probes: Vec<usize> = (0..firsts.len()).filter(|&i| firsts[i] == 1).collect();
        assert_eq!(probes, [63, 127]);
    }

    #[test]
    fn a_dropped_tier_is_never_asked() {
        let mut routing = Routing::new(2);
        routing.drop_tier(0);
        for _ in 0..2 * PROBE_EVERY {
            assert_eq!(routing.route(at(1)), Route { order: vec![1], n_used: 1 });
        }
    }
}
