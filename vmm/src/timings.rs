//! Named points in time of a VM's life, for `--timings`.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Whole microseconds, as the API tells them.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Whole milliseconds, as the API tells and takes them.
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The host's monotonic clock in nanoseconds, which all its processes have in common.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000) + nanos.unwrap_or(0)
}

/// The points that were passed, in order.
pub struct Timings {
    start: Instant,
    marks: Mutex<Vec<(&'static str, Duration)>>,
}

impl Timings {
    /// Starts at `start`, usually the first instruction of `main`.
    pub fn since(start: Instant) -> Self {
        Self {
            start,
            marks: Mutex::default(),
        }
    }

    /// Notes that `name` is done.
    pub fn mark(&self, name: &'static str) {
        let at = self.start.elapsed();
        self.marks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((name, at));
    }

    /// When `name` was done, in microseconds from a moment of [`monotonic_ns`].
    pub fn since_us(&self, name: &str, moment: u64) -> Option<u64> {
        let ago = self.start.elapsed().saturating_sub(self.get(name)?);
        let then = monotonic_ns().saturating_sub(u64::try_from(ago.as_nanos()).ok()?);
        Some(then.saturating_sub(moment) / 1000)
    }

    /// All that was done, and when, counted from the start.
    pub fn all(&self) -> Vec<(&'static str, Duration)> {
        let marks = self.marks.lock();
        let mut marks = marks.unwrap_or_else(PoisonError::into_inner).clone();
        marks.sort_by_key(|(_, at)| *at);
        marks
    }

    /// How long ago the start was.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// When `name` was done, counted from the start.
    pub fn get(&self, name: &str) -> Option<Duration> {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks
            .iter()
            .find(|(mark, _)| *mark == name)
            .map(|(_, at)| *at)
    }
}

/// A line per point: its time from the start, and from the point before it, in milliseconds.
impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = Duration::ZERO;
        for (name, at) in self.all() {
            let (total, step) = (at.as_secs_f64() * 1e3, (at - before).as_secs_f64() * 1e3);
            writeln!(f, "{total:10.2} ms  +{step:.2}  {name}")?;
            before = at;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_in_order() {
        let timings = Timings::since(Instant::now());
        timings.mark("a");
        timings.mark("b");
        assert!(timings.get("a").unwrap() <= timings.get("b").unwrap());
        let text = timings.to_string();
        assert!(
            text.find("  a").unwrap() < text.find("  b").unwrap(),
            "{text}"
        );
    }
}
