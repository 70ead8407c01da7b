//! Memory by mapping: each run of pages is laid over guest memory, privately, straight from its layer's file.

use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::layer::offset_of_stored;

use super::PagerError;
use crate::memory::{self, GuestMemory};
use crate::sys::overlay::lay_over;

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
