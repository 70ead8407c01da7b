//! Writing a layer, in one pass: pages as they come, then the index, and the header last.
//!
//! Until the header is there, the file is no layer. The writer takes no lock and starts no thread, and it allocates the
//! index and a small buffer alone, so that a forked child can use it.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::index::EXTENT_BYTES;
use super::{EXTENTS_MAX, Extent, ExtentKind, hashes, offset_of_stored};
use crate::digest::{Digest, PageHash};
use crate::error::WriteError;
use crate::file::{within, write_at};
use crate::header::{Header, Kind};
use crate::{PAGE_SIZE, PAGES_MAX, Page, as_usize, pages};

/// Bytes that are gathered before they are written; what comes in larger pieces is written as it is. Each page of it costs a process that has just been forked a fault.
const BUFFER: usize = 64 << 10;

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSummary {
    /// Length of the file in bytes.
    pub bytes: u64,
    /// The digest of the file.
    pub digest: Digest,
    /// Pages that are stored.
    pub data_pages: u64,
    /// Pages that are zero here, whatever the parent has.
    pub zero_pages: u64,
    /// Runs of either.
    pub extents: u64,
}

/// A layer that is being written.
#[derive(Debug)]
pub struct LayerWriter {
    file: File,
    path: PathBuf,
    total_pages: u64,
    /// The lowest page that may come.
    next: u64,
    extents: Vec<Extent>,
    data_pages: u64,
    /// Those of the stored pages; none of a layer in memory.
    hashes: Option<Vec<PageHash>>,
    zero_pages: u64,
    /// What is to be written at `offset`.
    buffer: Vec<u8>,
    offset: u64,
}

impl LayerWriter {
    /// A layer over `total_pages` pages in the empty file `file`, which `path` names in messages.
    pub fn new(file: File, path: &Path, total_pages: u64) -> Result<Self, WriteError> {
        within(path, "the number of pages", total_pages, PAGES_MAX)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            total_pages,
            next: 0,
            extents: Vec::new(),
            data_pages: 0,
            hashes: Some(Vec::new()),
            zero_pages: 0,
            buffer: Vec::with_capacity(BUFFER),
            offset: offset_of_stored(0),
        })
    }

    /// The layer is one in memory. To be said before anything else.
    pub(crate) fn in_memory(&mut self) {
        self.hashes = None;
    }

    /// Stores pages, from `first_page`; `bytes` are whole pages. They come behind all that came before.
    pub fn data(&mut self, first_page: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.place_bytes(first_page, bytes)?;
        for (page, bytes) in (first_page..).zip(pages(bytes)) {
            self.push_data(page, bytes, None)?;
        }
        self.put(bytes)
    }

    /// Stores a page whose hash may be known.
    pub(crate) fn page(
        &mut self,
        page: u64,
        bytes: &Page,
        hash: Option<PageHash>,
    ) -> Result<(), WriteError> {
        self.place(page, 1)?;
        self.push_data(page, bytes, hash)?;
        self.put(bytes)
    }

    /// Says that `count` pages from `first_page` are zero, though the parent has something there.
    pub fn zero(&mut self, first_page: u64, count: u64) -> Result<(), WriteError> {
        self.place(first_page, count)?;
        if count == 0 {
            return Ok(());
        }
        self.zero_pages += count;
        self.push(Extent {
            first_page,
            count,
            kind: ExtentKind::Zero,
        })
    }

    /// Writes the index and the header. The file comes back for the caller to sync.
    pub fn finish(mut self) -> Result<(LayerSummary, File), WriteError> {
        let extents = std::mem::take(&mut self.extents);
        let kind = match self.hashes {
            Some(_) => Kind::Layer,
            None => Kind::LayerInMemory,
        };
        let (tags, hashes) = hashes::encode(self.hashes.as_deref().unwrap_or_default());
        let mut index = Vec::with_capacity(extents.len() * as_usize(EXTENT_BYTES) + tags.len());
        index.extend(extents.iter().flat_map(Extent::encode));
        index.extend(tags);
        self.put(&index)?;
        self.put(&hashes)?;
        self.flush()?;
        let header = Header {
            kind,
            numbers: [
                self.total_pages,
                self.data_pages,
                self.zero_pages,
                extents.len() as u64,
                0,
                0,
            ],
            body: Digest::of(&index),
        };
        let mut page = [0; PAGE_SIZE];
        let bytes = header.encode();
        page[..bytes.len()].copy_from_slice(&bytes);
        self.write(&page, 0)?;
        let summary = LayerSummary {
            bytes: self.offset,
            digest: header.digest(),
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
            extents: extents.len() as u64,
        };
        Ok((summary, self.file))
    }

    fn push_data(
        &mut self,
        page: u64,
        bytes: &Page,
        hash: Option<PageHash>,
    ) -> Result<(), WriteError> {
        let first_stored = self.data_pages;
        self.data_pages += 1;
        if let Some(hashes) = &mut self.hashes {
            hashes.push(hash.unwrap_or_else(|| PageHash::of(bytes)));
        }
        self.push(Extent {
            first_page: page,
            count: 1,
            kind: ExtentKind::Data { first_stored },
        })
    }

    fn push(&mut self, extent: Extent) -> Result<(), WriteError> {
        self.next = extent.end();
        if let Some(last) = self.extents.last_mut() {
            let alike = matches!(
                (last.kind, extent.kind),
                (ExtentKind::Zero, ExtentKind::Zero)
                    | (ExtentKind::Data { .. }, ExtentKind::Data { .. })
            );
            if alike && last.end() == extent.first_page {
                last.count += extent.count;
                return Ok(());
            }
        }
        self.extents.push(extent);
        within(
            &self.path,
            "the number of extents",
            self.extents.len() as u64,
            EXTENTS_MAX,
        )
    }

    /// Checks that `bytes` are whole pages that may come next.
    pub(crate) fn place_bytes(&self, first_page: u64, bytes: &[u8]) -> Result<(), WriteError> {
        if !bytes.len().is_multiple_of(PAGE_SIZE) {
            return Err(self.misplaced(first_page, first_page));
        }
        self.place(first_page, (bytes.len() / PAGE_SIZE) as u64)
    }

    fn place(&self, first_page: u64, count: u64) -> Result<(), WriteError> {
        match first_page.checked_add(count) {
            Some(end) if first_page >= self.next && end <= self.total_pages => Ok(()),
            end => Err(self.misplaced(first_page, end.unwrap_or(u64::MAX))),
        }
    }

    fn misplaced(&self, first_page: u64, end: u64) -> WriteError {
        WriteError::Pages {
            file: self.path.clone(),
            first_page,
            end,
            next: self.next,
            total_pages: self.total_pages,
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        if bytes.len() < BUFFER {
            self.buffer.extend_from_slice(bytes);
            return Ok(());
        }
        self.write(bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        self.write(&self.buffer, self.offset)?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), WriteError> {
        write_at(&self.file, &self.path, bytes, offset)
    }
}
