//! Named points in time of a VM's life, for `--timings`.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

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
        let mut marks = self
            .marks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        marks.sort_by_key(|(_, at)| *at);
        let mut before = Duration::ZERO;
        for (name, at) in marks {
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
