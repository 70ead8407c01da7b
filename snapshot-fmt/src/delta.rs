//! A layer against a parent: of the pages that come, those that are not the parent's already are kept.

use std::fs::File;
use std::path::Path;

use crate::chain::{Chain, Source};
use crate::digest::PageHash;
use crate::error::WriteError;
use crate::layer::{LayerSummary, LayerWriter};
use crate::{ZERO_PAGE, pages};

/// How many pages of zeros are stored to make one run of the two that they are between. To lay a run over memory takes each restore, and each process that goes
/// on from it, about as long as it takes to write so many once.
const JOINED_MAX: u64 = 8;

/// Writes the layer that makes a parent's pages into others.
///
/// Pages that are never put stay the parent's. Pages that equal it are told by their hashes, without reading it.
#[derive(Debug)]
pub struct DeltaWriter<'a> {
    layer: LayerWriter,
    parent: Option<&'a Chain>,
    /// That of a page of zeros.
    zero: PageHash,
    /// Behind the last page that was stored, where runs are joined.
    joint: Option<u64>,
    joins: bool,
    compares: bool,
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
            zero: PageHash::of(&ZERO_PAGE),
            joint: None,
            joins: false,
            compares: true,
        })
    }

    /// The layer is to be mapped: where it has no parent, few pages of zeros between two runs are stored, and make them one.
    pub fn join_runs(&mut self) {
        self.joins = self.parent.is_none();
    }

    /// The layer is wanted soon, and only ever in memory: it has no hashes ([`Layer::open_handed`](crate::layer::Layer::open_handed)), and pages that are put are taken to differ from the parent's.
    /// To be said before anything is put.
    pub fn in_memory(&mut self) {
        self.compares = false;
        self.layer.in_memory();
    }

    /// What the pages from `first_page` are; `bytes` are whole pages. They come behind all that came before.
    pub fn put(&mut self, first_page: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.layer.place_bytes(first_page, bytes)?;
        for (page, bytes) in (first_page..).zip(pages(bytes)) {
            if *bytes == ZERO_PAGE {
                self.zero(page, 1)?;
                continue;
            }
            let hash = self.compares.then(|| PageHash::of(bytes));
            if hash.is_none() || self.of_parent(page)? != hash {
                self.join(page)?;
                self.layer.page(page, bytes, hash)?;
            }
        }
        Ok(())
    }

    /// Stores what is between the last run and `page`, if that is little.
    fn join(&mut self, page: u64) -> Result<(), WriteError> {
        if self.joins {
            let gap = self.joint.map_or(0..0, |end| end..page);
            if gap.end - gap.start <= JOINED_MAX {
                for between in gap {
                    self.layer.page(between, &ZERO_PAGE, Some(self.zero))?;
                }
            }
            self.joint = page.checked_add(1);
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
            if run.source == Source::Zero {
                continue;
            }
            for page in run.first_page..run.end() {
                // The parent may have stored zeros.
                if !self.compares || parent.hash_of(page)? != Some(self.zero) {
                    self.layer.zero(page, 1)?;
                }
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
