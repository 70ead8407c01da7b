//! Memory by mapping: each run of pages is laid over guest memory, privately, straight from its layer's file.

use std::io;
use std::path::Path;

use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::chain::{Chain, Run, Source};
use snapshot_fmt::layer::offset_of_stored;
use vm_memory::VolatileSlice;

use super::PagerError;
use crate::memory::{self, GuestMemory};
use crate::pagemap::Pagemap;
use crate::sys::overlay::{drop_copies as drop_copies_of, lay_over, lay_zeros_over};

/// Lays `chain` over `memory`, over which its first layers lie already, as many as `laid`; where that is none, `memory` is zeros.
pub fn map(chain: &Chain, laid: usize, memory: &GuestMemory) -> Result<(), PagerError> {
    let depth = chain.layers().len();
    if laid > 0 {
        return lay(chain, chain.runs_of(laid..depth), memory);
    }
    // A run amid another makes three of the two: they are fewer calls where the newest layer, of which a child has little, comes upon the others.
    let (mut lower, upper) = (chain.runs_of(0..depth - 1), chain.runs_of(depth - 1..depth));
    lower.retain(|run| run.source != Source::Zero);
    if lower.len() + upper.len() < chain.data_runs().len() {
        lay(chain, lower, memory)?;
        lay(chain, upper, memory)
    } else {
        lay(chain, chain.data_runs().iter().copied(), memory)
    }
}

fn lay(
    chain: &Chain,
    runs: impl IntoIterator<Item = Run>,
    memory: &GuestMemory,
) -> Result<(), PagerError> {
    for run in runs {
        for (page, slice) in memory::pages(memory, run.first_page, run.count) {
            let (laid, path) = match run.source {
                Source::Zero => (lay_zeros_over(&slice), Path::new("zeros")),
                Source::Data {
                    layer,
                    first_stored,
                } => {
                    let layer = &chain.layers()[layer];
                    let offset = offset_of_stored(first_stored + (page - run.first_page));
                    (lay_over(&slice, layer.file(), offset), layer.path())
                }
            };
            laid.map_err(|source| PagerError::Map {
                path: path.to_owned(),
                count: run.count,
                source,
            })?;
        }
    }
    Ok(())
}

/// Has `memory` be zeros, whatever lay over it.
pub fn clear(memory: &GuestMemory) -> io::Result<()> {
    let mut all = memory::pages(memory, 0, u64::MAX);
    all.try_for_each(|(_, slice)| lay_zeros_over(&slice))
}

/// Guest memory that is no other's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnPages {
    /// Pages that a layer has, and that were copied to be written to.
    pub copied: u64,
    /// Pages that were zeros until somebody touched them. Whether they still are is not looked at.
    pub zeros: u64,
}

/// What of `memory`, which began as `chain` has it, or with zeros, has become its own.
pub fn own_pages(memory: &GuestMemory, chain: Option<&Chain>) -> io::Result<OwnPages> {
    let mut own = OwnPages::default();
    for_copies(memory, |first_page, _, count| {
        let end = first_page + count;
        let stored = chain.map_or(0, |chain| {
            let runs = chain.runs(first_page, end);
            let data = runs.filter(|run| run.source != Source::Zero);
            data.map(|run| run.count).sum()
        });
        own.copied += stored;
        own.zeros += count - stored;
        Ok(())
    })?;
    Ok(own)
}

/// Takes back what was written to `memory` since it was mapped. Returns how many pages that were.
pub fn drop_copies(memory: &GuestMemory) -> io::Result<u64> {
    let mut dropped = 0;
    for_copies(memory, |_, slice, count| {
        dropped += count;
        drop_copies_of(slice)
    })?;
    Ok(dropped)
}

/// Does `each` with every run of pages of `memory` that are copies of its own: the first page, the memory, how many.
fn for_copies(
    memory: &GuestMemory,
    mut each: impl FnMut(u64, &VolatileSlice<'_>, u64) -> io::Result<()>,
) -> io::Result<()> {
    let pagemap = Pagemap::open()?;
    for (first_page, slice) in memory::pages(memory, 0, u64::MAX) {
        let address = slice.ptr_guard().as_ptr() as u64;
        for run in pagemap.runs(address, slice.len() / PAGE_SIZE) {
            let (run, copied) = run?;
            if copied {
                let part = slice.subslice(run.start * PAGE_SIZE, run.len() * PAGE_SIZE);
                let part = part.map_err(io::Error::other)?;
                each(first_page + run.start as u64, &part, run.len() as u64)?;
            }
        }
    }
    Ok(())
}
