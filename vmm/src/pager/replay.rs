//! The working set of an earlier run, brought before it is asked for.
//!
//! A thread of its own goes through it in its order, in windows whose pages are sorted, so that neighbours are read, checked and put as one.
//! It races with the faults: whoever is first puts a page, see `Server::place`. The working set is a hint: what is
//! wrong with a page of it is left for the fault to say, if ever there is one.

use std::ops::Range;
use std::time::Instant;

use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::chain::{Run, Source};

use super::server::{PageError, Server};

/// Pages that are brought at once.
const WINDOW: usize = 64;

/// The thread's work: brings the pages of `working_set`, unless the server stops.
pub fn replay(server: &Server, working_set: &[u64]) {
    server.set_replaying(true);
    bring_all(server, working_set);
    server.set_replaying(false);
}

fn bring_all(server: &Server, working_set: &[u64]) {
    let mut bytes = vec![0; WINDOW * PAGE_SIZE];
    for window in working_set.chunks(WINDOW) {
        if server.is_stopping() {
            return;
        }
        let start = Instant::now();
        match bring(server, window, &mut bytes) {
            Ok(placed) => server.count_ahead(placed, start.elapsed()),
            Err(error) => {
                log::warn!("the working set is not brought ahead any further: {error}");
                return;
            }
        }
    }
}

fn bring(server: &Server, window: &[u64], bytes: &mut [u8]) -> Result<u64, PageError> {
    let mut placed = 0;
    for pages in contiguous(window) {
        for run in server.chain().runs(pages.start, pages.end) {
            placed += bring_run(server, run, bytes)?;
        }
    }
    Ok(placed)
}

fn bring_run(server: &Server, run: Run, bytes: &mut [u8]) -> Result<u64, PageError> {
    let page = run.first_page;
    let Source::Data {
        layer,
        first_stored,
    } = run.source
    else {
        return server.zero_around(page);
    };
    let len = usize::try_from(run.count).map_or(bytes.len(), |count| count * PAGE_SIZE);
    let bytes = &mut bytes[..len];
    server.chain().layers()[layer]
        .read_stored_run(first_stored, page, bytes)
        .map_err(|source| PageError::Layer { page, source })?;
    server.place_bytes(page, bytes)
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
