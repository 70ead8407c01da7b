//! Gives a restored guest its memory: the pages of a chain of layers.
//!
//! By mapping: each run of pages is laid over guest memory, privately, straight from its layer's file. The host's kernel brings a page in when
//! it is touched, all restores of a snapshot share the page cache, and a page that is written becomes the guest's own. What
//! no layer has is anonymous memory, which is zero already. A chain of any depth comes down to the same merged runs.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::layer::offset_of_stored;
use thiserror::Error;

use crate::memory::{self, GuestMemory};
use crate::sys::overlay::lay_over;

/// Why a guest cannot have its pages.
#[derive(Debug, Error)]
pub enum PagerError {
    /// The layers are of another machine.
    #[error(
        "the snapshot has {saved} pages of memory, the machine {machine}: the snapshot is damaged"
    )]
    Size {
        /// Pages of the chain.
        saved: u64,
        /// Pages of guest memory.
        machine: u64,
    },
    /// A run of pages cannot be mapped.
    #[error(
        "cannot map {count} pages of {path}: {source}; the host's limit is vm.max_map_count, and vmm snap flatten makes fewer runs"
    )]
    Map {
        /// The layer.
        path: PathBuf,
        /// How many pages.
        count: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Where memory comes from.
pub struct Pages {
    /// The layers.
    pub chain: Arc<Chain>,
}

/// What serves a guest's memory for as long as the guest lives.
pub struct Pager {
    _chain: Arc<Chain>,
}

impl Pager {
    /// Makes `memory`, which nobody has touched, that of the snapshot.
    pub fn start(pages: Pages, memory: &GuestMemory) -> Result<Self, PagerError> {
        let Pages { chain } = pages;
        let machine = memory::total_pages(memory);
        if chain.total_pages() != machine {
            let saved = chain.total_pages();
            return Err(PagerError::Size { saved, machine });
        }
        map(&chain, memory)?;
        Ok(Self { _chain: chain })
    }
}

fn map(chain: &Chain, memory: &GuestMemory) -> Result<(), PagerError> {
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
