//! The hashes of a layer's stored pages, in blocks that are read when a page of theirs is.
//!
//! A gibibyte of pages has four mebibytes of hashes. A restored VM needs few of them at first, and may have many
//! siblings: so each block of 256 is checked by itself, by a tag that the header's digest covers.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::as_usize;
use crate::digest::{PAGE_HASH_LEN, PageHash};
use crate::error::FormatError;
use crate::file::NamedFile;

/// Hashes to a block: a page of them.
const PER_BLOCK: u64 = 256;
const HASH_BYTES: u64 = PAGE_HASH_LEN as u64;

/// Bytes of the hashes of so many pages.
pub(super) fn hashes_len(data_pages: u64) -> u64 {
    data_pages * HASH_BYTES
}

/// Bytes of the tags of so many pages.
pub(super) fn tags_len(data_pages: u64) -> u64 {
    data_pages.div_ceil(PER_BLOCK) * HASH_BYTES
}

/// The hashes and their tags, as a layer ends.
pub(super) fn encode(hashes: &[PageHash]) -> (Vec<u8>, Vec<u8>) {
    let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
    let tags = bytes
        .chunks(as_usize(PER_BLOCK) * PAGE_HASH_LEN)
        .flat_map(|block| PageHash::of_bytes(block).0)
        .collect();
    (tags, bytes)
}

/// The table of a layer.
#[derive(Debug)]
pub(super) struct Hashes {
    tags: Vec<PageHash>,
    data_pages: u64,
    at: u64,
    /// Blocks that have been read and checked. It is never waited for: where it is in use, or was when this process was
    /// forked, a block is read again.
    blocks: Mutex<BTreeMap<u64, Box<[PageHash]>>>,
}

impl Hashes {
    /// The table of `data_pages` hashes at `at` in the file, with its tags.
    pub(super) fn new(tags: &[u8], data_pages: u64, at: u64) -> Self {
        Self {
            tags: split(tags),
            data_pages,
            at,
            blocks: Mutex::default(),
        }
    }

    /// The hash of the stored page `index`, checked.
    ///
    /// # Panics
    ///
    /// If there is no such page: indexes come from extents, which were checked.
    pub(super) fn get(&self, file: &NamedFile, index: u64) -> Result<PageHash, FormatError> {
        assert!(index < self.data_pages, "no stored page {index}");
        let (block, within) = (index / PER_BLOCK, as_usize(index % PER_BLOCK));
        let Ok(mut blocks) = self.blocks.try_lock() else {
            return Ok(self.read(file, block)?[within]);
        };
        if let Some(hashes) = blocks.get(&block) {
            return Ok(hashes[within]);
        }
        let hashes = self.read(file, block)?;
        let hash = hashes[within];
        blocks.insert(block, hashes);
        Ok(hash)
    }

    fn read(&self, file: &NamedFile, block: u64) -> Result<Box<[PageHash]>, FormatError> {
        let first = block * PER_BLOCK;
        let offset = self.at + hashes_len(first);
        let len = hashes_len(PER_BLOCK.min(self.data_pages - first));
        let bytes = file.read_vec(offset, len, "a block of hashes")?;
        if PageHash::of_bytes(&bytes) != self.tags[as_usize(block)] {
            return Err(file.corrupt(
                offset,
                "the hashes of pages do not have the hash that the index gives",
            ));
        }
        Ok(split(&bytes).into())
    }
}

fn split(bytes: &[u8]) -> Vec<PageHash> {
    let hashes = bytes.chunks_exact(PAGE_HASH_LEN);
    hashes
        .filter_map(|hash| hash.first_chunk().copied().map(PageHash))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_table_that_another_uses_is_read_all_the_same() {
        let own: Vec<_> = (0..300_u64)
            .map(|n| PageHash::of_bytes(&n.to_le_bytes()))
            .collect();
        let (tags, bytes) = encode(&own);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hashes");
        std::fs::write(&path, bytes).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let file = NamedFile::new(file, Path::new("hashes"), "hashes").unwrap();
        let hashes = Hashes::new(&tags, 300, 0);
        let get = |index| hashes.get(&file, index).unwrap();
        assert_eq!((get(0), get(299)), (own[0], own[299]));
        let kept = hashes.blocks.lock().unwrap();
        assert_eq!(kept.len(), 2);
        // As in a process that was forked while another thread was here.
        assert_eq!((get(255), get(256)), (own[255], own[256]));
    }
}
