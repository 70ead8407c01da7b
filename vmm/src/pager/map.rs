//! Memory by mapping: each run of pages is laid over guest memory, privately, straight from its layer's file.

use std::io;

use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::layer::offset_of_stored;

use super::PagerError;
use crate::memory::{self, GuestMemory};
use crate::pagemap::Pagemap;
use crate::sys::overlay::{drop_copies as drop_copies_of, lay_over};

/// Lays the runs of `chain` over `memory`.
pub fn map(chain: &Chain, memory: &GuestMemory) -> Result<(), PagerError> {
    for run in chain.data_runs() {
        let Source::Data {
            layer,
            first_stored,
        } = run.source
        else {
            continue;
        };
        let layer = &chain.layers()[layer];
        for (page, slice) in memory::pages(memory, run.first_page, run.count) {
            let offset = offset_of_stored(first_stored + (page - run.first_page));
            lay_over(&slice, layer.file(), offset).map_err(|source| PagerError::Map {
                path: layer.path().to_owned(),
                count: run.count,
                source,
            })?;
        }
    }
    Ok(())
}

/// Takes back what was written to `memory` since it was mapped. Returns how many pages that were.
pub fn drop_copies(memory: &GuestMemory) -> io::Result<u64> {
    let pagemap = Pagemap::open()?;
    let mut dropped = 0;
    for (_, slice) in memory::pages(memory, 0, u64::MAX) {
        let address = slice.ptr_guard().as_ptr() as u64;
        for run in pagemap.runs(address, slice.len() / PAGE_SIZE) {
            let (run, copied) = run?;
            if copied {
                let bytes = run.len() * PAGE_SIZE;
                let part = slice.subslice(run.start * PAGE_SIZE, bytes);
                drop_copies_of(&part.map_err(io::Error::other)?)?;
                dropped += run.len() as u64;
            }
        }
    }
    Ok(dropped)
}
