//! Bough's snapshots on disk: what the files look like, how they are written, read and checked.
//!
//! A snapshot is a directory with a readable manifest, a state file, and layers of pages that stack on its
//! parent's; `docs/snapshot-format.md` describes every byte. Nothing here knows KVM, nothing here takes a lock that a
//! forked child could wait for, and nothing that is read is trusted: every length is checked against the file and a
//! limit before it is used, and every byte against a digest before it is given out.
#![forbid(unsafe_code)]

pub mod bytes;
pub mod chain;
pub mod delta;
pub mod digest;
pub mod error;
mod file;
pub mod header;
mod json;
pub mod layer;
pub mod manifest;
pub mod ops;
pub mod pack;
pub mod snapshot;
pub mod state;
pub mod state_file;
pub mod working_set;

/// Bytes of a page, the unit of layers.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] as offsets in files are counted.
pub const PAGE_BYTES: u64 = 4096;
/// Most pages that a layer may span: just under 16 TiB.
pub const PAGES_MAX: u64 = u32::MAX as u64;

const _: () = assert!(usize::BITS == 64, "files are larger than 32 bits can count");

/// A length or an index that a file gives, on a 64-bit machine.
#[expect(clippy::cast_possible_truncation, reason = "checked above")]
pub(crate) const fn as_usize(value: u64) -> usize {
    value as usize
}

/// A page.
pub type Page = [u8; PAGE_SIZE];
/// The page that is not stored.
pub(crate) static ZERO_PAGE: Page = [0; PAGE_SIZE];

/// The pages of `bytes`; an incomplete one at the end is left out.
pub fn pages(bytes: &[u8]) -> impl Iterator<Item = &Page> {
    let pages = bytes.chunks_exact(PAGE_SIZE);
    pages.filter_map(<[u8]>::first_chunk)
}
