//! How many shells of a kind to keep: as many as were wanted within a second lately, between two bounds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is wanted together.
const BURST: Duration = Duration::from_secs(1);
/// How long a burst is remembered.
const MEMORY: Duration = Duration::from_secs(60);
/// How long a kind that nobody asks for is kept at all.
const IDLE: Duration = Duration::from_secs(600);

/// The bounds that the user gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Least shells of a kind that is in use.
    pub floor: usize,
    /// Most.
    pub ceiling: usize,
}

/// What was asked for lately.
#[derive(Debug)]
pub struct Demand {
    /// Requests: when, and for how many.
    requests: VecDeque<(Instant, usize)>,
    last: Instant,
}

impl Demand {
    /// Nothing, yet.
    pub fn new(now: Instant) -> Self {
        Self {
            requests: VecDeque::new(),
            last: now,
        }
    }

    /// `count` were asked for.
    pub fn note(&mut self, now: Instant, count: usize) {
        self.last = now;
        self.requests.push_back((now, count));
        self.forget(now);
    }

    fn forget(&mut self, now: Instant) {
        let old = |(at, _): &(Instant, usize)| now.duration_since(*at) > MEMORY;
        while self.requests.front().is_some_and(old) {
            self.requests.pop_front();
        }
    }

    /// When it was last asked for.
    pub fn last(&self) -> Instant {
        self.last
    }

    /// Whether nobody has asked for so long that nothing is to be kept.
    pub fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.last) > IDLE
    }

    /// How many to keep.
    pub fn target(&mut self, now: Instant, bounds: Bounds) -> usize {
        self.forget(now);
        let burst = |index: usize| {
            let start = self.requests.get(index).map(|(at, _)| *at);
            let within = |(at, _): &&(Instant, usize)| {
                start.is_some_and(|start| at.duration_since(start) <= BURST)
            };
            let burst = self.requests.iter().skip(index).take_while(within);
            burst.map(|(_, count)| count).sum::<usize>()
        };
        let most = (0..self.requests.len()).map(burst).max().unwrap_or(0);
        most.clamp(bounds.floor, bounds.ceiling.max(bounds.floor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        floor: 2,
        ceiling: 10,
    };

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn it_follows_the_greatest_burst() {
        let start = Instant::now();
        let mut demand = Demand::new(start);
        assert_eq!(demand.target(start, BOUNDS), 2);
        for (millis, count) in [(0, 1), (500, 3), (2000, 2), (2900, 2), (2999, 1)] {
            demand.note(after(start, millis), count);
        }
        assert_eq!(demand.target(after(start, 3000), BOUNDS), 5);
        demand.note(after(start, 5000), 100);
        assert_eq!(demand.target(after(start, 5000), BOUNDS), 10);
        assert_eq!(demand.target(after(start, 64_000), BOUNDS), 10);
        assert_eq!(demand.target(after(start, 66_000), BOUNDS), 2);
    }

    #[test]
    fn what_nobody_wants_is_given_up() {
        let start = Instant::now();
        let mut demand = Demand::new(start);
        demand.note(after(start, 1000), 1);
        assert!(!demand.is_over(after(start, 601_000)));
        assert!(demand.is_over(after(start, 601_001)));
    }

    #[test]
    fn a_floor_above_the_ceiling_counts() {
        let now = Instant::now();
        let bounds = Bounds {
            floor: 5,
            ceiling: 1,
        };
        assert_eq!(Demand::new(now).target(now, bounds), 5);
    }
}
