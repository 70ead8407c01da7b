//! The working set of an earlier run, brought before it is asked for.
//!
//! A thread of its own goes through it in its order, in windows whose pages are sorted, so that neighbours are brought as one. First the host is
//! told of all that will be read, so that a disk works on many pages at once. Where memory is mapped that is all there is to do: what is in the host's
//! page cache is mapped by a few faults. The working set is a hint: what is wrong with a page of it is left for
//! whoever wants that page, if ever anybody does.

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::layer::offset_of_stored;
use snapshot_fmt::{PAGE_BYTES, PAGE_SIZE};

use super::server::{PageError, Server};

/// Pages that are brought at once.
const WINDOW: usize = 64;

/// How far a replay is, and whether it shall end.
#[derive(Debug, Default)]
pub struct Progress {
    stop: AtomicBool,
    running: AtomicBool,
    pages: AtomicU64,
    ns: AtomicU64,
}

impl Progress {
    /// Has the replay end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it is at work.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// Pages that it has brought before anybody else did.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// How long it has worked.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.ns.load(Ordering::Relaxed))
    }

    /// Has `work` done on each run of neighbours, until it says that it cannot go on.
    fn in_windows(&self, working_set: &[u64], mut work: impl FnMut(Range<u64>) -> bool) {
        for window in working_set.chunks(WINDOW) {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let start = Instant::now();
            let done = contiguous(window).into_iter().all(&mut work);
            let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.ns.fetch_add(ns, Ordering::Relaxed);
            if !done {
                return;
            }
        }
    }
}

/// Brings the pages of `working_set` to where `server` serves them. It races with the faults: whoever is first puts a page.
pub fn by_server(server: &Server, working_set: &[u64]) {
    let progress = server.replay();
    progress.running.store(true, Ordering::Relaxed);
    into_cache(progress, server.chain(), working_set);
    let mut bytes = vec![0; WINDOW * PAGE_SIZE];
    progress.in_windows(working_set, |run| match bring(server, run, &mut bytes) {
        Ok(placed) => {
            progress.pages.fetch_add(placed, Ordering::Relaxed);
            true
        }
        Err(error) => {
            log::warn!("the working set is not brought ahead any further: {error}");
            false
        }
    });
    progress.running.store(false, Ordering::Relaxed);
}

/// Has the host read the pages of `working_set`, as far as it has not.
pub fn into_cache(progress: &Progress, chain: &Chain, working_set: &[u64]) {
    progress.in_windows(working_set, |run| {
        read_ahead(chain, run);
        true
    });
}

fn bring(server: &Server, pages: Range<u64>, bytes: &mut [u8]) -> Result<u64, PageError> {
    let mut placed = 0;
    for run in server.chain().runs(pages.start, pages.end) {
        let page = run.first_page;
        let Source::Data {
            layer,
            first_stored,
        } = run.source
        else {
            placed += server.zero_around(page)?;
            continue;
        };
        let len = usize::try_from(run.count).map_or(bytes.len(), |count| count * PAGE_SIZE);
        let bytes = &mut bytes[..len];
        server.chain().layers()[layer]
            .read_stored_run(first_stored, page, bytes)
            .map_err(|source| PageError::Layer { page, source })?;
        placed += server.place_bytes(page, bytes)?;
    }
    Ok(placed)
}

/// Tells the host that `pages` will be read, without waiting for it.
fn read_ahead(chain: &Chain, pages: Range<u64>) {
    for run in chain.runs(pages.start, pages.end) {
        if let Source::Data {
            layer,
            first_stored,
        } = run.source
        {
            let (file, len) = (chain.layers()[layer].file(), run.count * PAGE_BYTES);
            // A hint, on which nothing depends.
            let _ = fadvise(
                file,
                offset_of_stored(first_stored),
                NonZeroU64::new(len),
                Advice::WillNeed,
            );
        }
    }
}

/// The runs of pages that `window` has, ascending.
fn contiguous(window: &[u64]) -> Vec<Range<u64>> {
    let mut pages = window.to_vec();
    pages.sort_unstable();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if page < last.end => {}
            Some(last) if page == last.end => last.end += 1,
            _ => runs.push(page..page.saturating_add(1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_brought_together() {
        assert_eq!(contiguous(&[7, 2, 3, 9, 2, 8]), [2..4, 7..10]);
        assert_eq!(contiguous(&[]), []);
    }
}
