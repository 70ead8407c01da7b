//! `working-set`: the pages that a restored VM wanted first, in the order in which it did.
//!
//! It is a hint: a snapshot is complete without it, and its id does not cover it. The header's numbers are the pages of
//! the space and the entries; each entry is a page's number in 4 bytes, little endian, and the body's digest is that of all entries.

use std::fs::File;
use std::path::Path;

use crate::PAGES_MAX;
use crate::digest::Digest;
use crate::error::{FormatError, WriteError};
use crate::file::{NamedFile, within, write_at};
use crate::header::{HEADER_LEN, Header, Kind};

/// Most entries: 64 GiB of pages.
pub const WORKING_SET_MAX: u64 = 1 << 24;
const ENTRY_BYTES: usize = 4;

/// Writes `working_set`, pages of a space of `total_pages`, to the empty file `file`, which `path` names in messages.
pub fn write(
    file: &File,
    path: &Path,
    total_pages: u64,
    working_set: &[u64],
) -> Result<(), WriteError> {
    let count = working_set.len() as u64;
    within(path, "the number of pages", total_pages, PAGES_MAX)?;
    within(
        path,
        "the working set in pages",
        count,
        WORKING_SET_MAX.min(total_pages),
    )?;
    let mut entries = Vec::with_capacity(working_set.len() * ENTRY_BYTES);
    for &page in working_set {
        within(path, "a page of the working set", page, total_pages - 1)?;
        // A space has fewer than 2^32 pages.
        entries.extend(&page.to_le_bytes()[..ENTRY_BYTES]);
    }
    let header = Header {
        kind: Kind::WorkingSet,
        numbers: [total_pages, count, 0, 0, 0, 0],
        body: Digest::of(&entries),
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend(entries);
    write_at(file, path, &bytes, 0)
}

/// Reads a working set of a space of `total_pages`.
pub fn read(file: File, path: &Path, total_pages: u64) -> Result<Vec<u64>, FormatError> {
    let file = NamedFile::new(file, path, Kind::WorkingSet.name())?;
    let header = Header::read(&file, Kind::WorkingSet)?;
    let [of_pages, count, ..] = header.numbers;
    if of_pages != total_pages {
        let what = format!("it is for memory of {of_pages} pages, not {total_pages}");
        return Err(file.corrupt(Header::number_at(0), what));
    }
    let limit = WORKING_SET_MAX.min(total_pages);
    let count = file.within(count, limit, Header::number_at(1), "the number of entries")?;
    let start = HEADER_LEN as u64;
    let len = count * ENTRY_BYTES as u64;
    let entries = file.read_vec(start, len, "the entries")?;
    file.ends_at(start + len)?;
    if Digest::of(&entries) != header.body {
        return Err(file.corrupt(
            start,
            "the entries do not have the digest that the header gives",
        ));
    }
    let entries = entries
        .chunks_exact(ENTRY_BYTES)
        .zip((start..).step_by(ENTRY_BYTES));
    entries
        .map(|(entry, at)| {
            let page = u64::from(u32::from_le_bytes(std::array::from_fn(|byte| entry[byte])));
            if page < total_pages {
                return Ok(page);
            }
            Err(file.corrupt(at, format!("there is no page {page} among {total_pages}")))
        })
        .collect()
}
