//! A layer against a parent: of the pages that come, those that are not the parent's already are kept.

use std::fs::File;
use std::path::Path;

use crate::chain::{Chain, Source};
use crate::digest::PageHash;
use crate::error::WriteError;
use crate::layer::{LayerSummary, LayerWriter};
use crate::{ZERO_PAGE, pages};

/// Writes the layer that makes a parent's pages into others.
///
/// Pages that are never put stay the parent's. Pages that equal it are told by their hashes, without reading it.
#[derive(Debug)]
pub struct DeltaWriter<'a> {
    layer: LayerWriter,
    parent: Option<&'a Chain>,
}

impl<'a> DeltaWriter<'a> {
    /// A layer in the empty file `file`, which `path` names in messages. Without a parent all pages are zero at first.
    pub fn new(
        file: File,
        path: &Path,
        total_pages: u64,
        parent: Option<&'a Chain>,
    ) -> Result<Self, WriteError> {
        Ok(Self {
            layer: LayerWriter::new(file, path, total_pages)?,
            parent,
        })
    }

    /// What the pages from `first_page` are; `bytes` are whole pages. They come behind all that came before.
    pub fn put(&mut self, first_page: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.layer.place_bytes(first_page, bytes)?;
        for (page, bytes) in (first_page..).zip(pages(bytes)) {
            if *bytes == ZERO_PAGE {
                self.zero(page, 1)?;
                continue;
            }
            let hash = PageHash::of(bytes);
            if self.of_parent(page)? != Some(hash) {
                self.layer.hashed_page(page, bytes, hash)?;
            }
        }
        Ok(())
    }

    /// `count` pages from `first_page` are zero.
    pub fn zero(&mut self, first_page: u64, count: u64) -> Result<(), WriteError> {
        let Some(parent) = self.parent else {
            return Ok(());
        };
        let end = first_page.saturating_add(count);
        for run in parent.runs(first_page, end) {
            if run.source != Source::Zero {
                self.layer.zero(run.first_page, run.count)?;
            }
        }
        Ok(())
    }

    /// Writes the index and the header. The file comes back for the caller to sync.
    pub fn finish(self) -> Result<(LayerSummary, File), WriteError> {
        self.layer.finish()
    }

    fn of_parent(&self, page: u64) -> Result<Option<PageHash>, WriteError> {
        match self.parent {
            None => Ok(None),
            Some(parent) => Ok(parent.hash_of(page)?),
        }
    }
}
