//! Operations on chains: a chain's content against another parent, and what differs between two.
//!
//! Pages are compared by their hashes, so what is not copied is not read; what is copied is checked as it is read.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::chain::{Chain, ChainError, Source};
use crate::delta::DeltaWriter;
use crate::digest::PageHash;
use crate::error::{FormatError, WriteError};
use crate::layer::LayerSummary;
use crate::{PAGE_SIZE, ZERO_PAGE};

/// Writes all that `chain` has as one layer without a parent to the empty file `file`, which `path` names in messages.
pub fn flatten(chain: &Chain, file: File, path: &Path) -> Result<(LayerSummary, File), WriteError> {
    let mut layer = DeltaWriter::new(file, path, chain.total_pages(), None)?;
    let mut bytes = [0; PAGE_SIZE];
    for run in chain.data_runs() {
        for page in run.first_page..run.end() {
            chain.read_page(page, &mut bytes)?;
            layer.put(page, &bytes)?;
        }
    }
    layer.finish()
}

/// Writes the layer that makes `parent` into what `chain` has to the empty file `file`, which `path` names in messages.
pub fn rebase(
    chain: &Chain,
    parent: &Chain,
    file: File,
    path: &Path,
) -> Result<(LayerSummary, File), WriteError> {
    let mut layer = DeltaWriter::new(file, path, chain.total_pages(), Some(parent))?;
    let mut bytes = [0; PAGE_SIZE];
    for range in diff(chain, parent)? {
        for page in range {
            chain.read_page(page, &mut bytes)?;
            layer.put(page, &bytes)?;
        }
    }
    layer.finish()
}

/// A comparison cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// A file cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The chains are of different machines.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl From<DiffError> for WriteError {
    fn from(error: DiffError) -> Self {
        match error {
            DiffError::Format(error) => error.into(),
            DiffError::Chain(error) => error.into(),
        }
    }
}

/// The pages that differ, as ascending ranges with others between.
pub fn diff(a: &Chain, b: &Chain) -> Result<Vec<Range<u64>>, DiffError> {
    a.check_space(b)?;
    let zero = PageHash::of(&ZERO_PAGE);
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for run in a.runs(0, a.total_pages()) {
        for part in b.runs(run.first_page, run.end()) {
            if (run.source, part.source) == (Source::Zero, Source::Zero) {
                continue;
            }
            for page in part.first_page..part.end() {
                // A page of zeros may be stored.
                if a.hash_of(page)?.unwrap_or(zero) == b.hash_of(page)?.unwrap_or(zero) {
                    continue;
                }
                match ranges.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => ranges.push(page..page + 1),
                }
            }
        }
    }
    Ok(ranges)
}
