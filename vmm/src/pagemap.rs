//! Which pages of memory that was mapped privately are copies of its own: those that somebody has written to (`/proc/self/pagemap`).

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use snapshot_fmt::PAGE_BYTES;
use zerocopy::IntoBytes;

use crate::sys::page_scan::own_pages;

/// Bits of an entry (Linux, Documentation/admin-guide/mm/pagemap.rst): present, swapped out, of a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// What a kernel says that does not look for pages itself (ENOTTY).
const NO_SCAN: i32 = 25;
/// Pages whose entries are read at once: 64 KiB of entries, 32 MiB of memory.
const PAGES_PER_READ: usize = 8192;

/// This process's pages.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Those of the process that asks, which in a forked child is that child.
    pub fn open() -> io::Result<Self> {
        let open = File::open("/proc/self/pagemap");
        open.map(Self).map_err(unreadable)
    }

    /// The `pages` pages from `address` on, in runs of such as are copies and of others, ascending, each with its place among them and whether it is of copies. A page of
    /// zeros that was only read is none, where the kernel can tell.
    pub fn runs(
        &self,
        address: u64,
        pages: usize,
    ) -> impl Iterator<Item = io::Result<(Range<usize>, bool)>> {
        let mut copies = VecDeque::new();
        let (mut next, mut known) = (0, 0);
        std::iter::from_fn(move || {
            while copies.is_empty() && known < pages {
                match self.copies(address, known..pages) {
                    Ok((found, to)) => {
                        copies.extend(found);
                        known = to;
                    }
                    Err(error) => {
                        (next, known) = (pages, pages);
                        return Some(Err(unreadable(error)));
                    }
                }
            }
            let until = copies
                .front()
                .map_or(known, |copy: &Range<usize>| copy.start);
            let (run, copied) = match copies.front() {
                Some(copy) if until == next => (copy.clone(), true),
                _ => (next..until, false),
            };
            if copied {
                copies.pop_front();
            }
            next = run.end;
            (!run.is_empty()).then_some(Ok((run, copied)))
        })
    }

    /// Copies among the `pages`, of which the first is counted from the one at `address`; and to where they are known, which is further on than the first.
    fn copies(&self, address: u64, pages: Range<usize>) -> io::Result<(Vec<Range<usize>>, usize)> {
        let at = |page: usize| address + page as u64 * PAGE_BYTES;
        match own_pages(&self.0, at(pages.start)..at(pages.end)) {
            Ok((found, to)) => {
                // What lies before `at(pages.end)` fits.
                let page = |at: u64| usize::try_from((at - address) / PAGE_BYTES).unwrap_or(0);
                let found = found.iter().map(|run| page(run.start)..page(run.end));
                Ok((found.collect(), page(to)))
            }
            Err(error) if error.raw_os_error() == Some(NO_SCAN) => self.read_copies(address, pages),
            Err(error) => Err(error),
        }
    }

    /// As [`Self::copies`], by their entries.
    fn read_copies(
        &self,
        address: u64,
        pages: Range<usize>,
    ) -> io::Result<(Vec<Range<usize>>, usize)> {
        let to = pages.end.min(pages.start + PAGES_PER_READ);
        let entries = self.entries(address, pages.start, to)?;
        let mut page = pages.start;
        let runs = entries.chunk_by(|a, b| is_copy(*a) == is_copy(*b));
        let runs = runs.filter_map(|run| {
            page += run.len();
            is_copy(run[0]).then_some(page - run.len()..page)
        });
        Ok((runs.collect(), to))
    }

    /// The entries of the pages `from` to before `to`, counted from the one at `address`.
    fn entries(&self, address: u64, from: usize, to: usize) -> io::Result<Vec<u64>> {
        let mut entries = vec![0u64; to - from];
        let first = address / PAGE_BYTES + from as u64;
        self.0
            .read_exact_at(entries.as_mut_bytes(), first * size_of::<u64>() as u64)?;
        Ok(entries)
    }
}

fn unreadable(error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot read /proc/self/pagemap: {error}"),
    )
}

/// Whether an entry is that of a page of our own: neither absent nor a file's.
fn is_copy(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, VolatileSlice};

    use super::*;
    use crate::memory;
    use crate::sys::overlay::lay_over;

    const PAGE: usize = 4096;

    fn is_copied(slice: &VolatileSlice<'_>) -> Vec<bool> {
        let runs = Pagemap::open().unwrap();
        let address = slice.ptr_guard().as_ptr() as u64;
        let mut copied = Vec::new();
        for run in runs.runs(address, slice.len() / PAGE) {
            let (run, is_copied) = run.unwrap();
            assert_eq!(run.start, copied.len());
            copied.resize(run.end, is_copied);
        }
        copied
    }

    #[test]
    fn pages_that_were_written_to_are_copies() {
        // More runs than are found by one call, and more entries than are read at once.
        let pages = 2 * PAGES_PER_READ;
        let memory = memory::create(&[(0, pages as u64 * PAGE_BYTES)]).unwrap();
        let (_, slice) = memory::pages(&memory, 0, u64::MAX).next().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 100 * PAGE]).unwrap();
        lay_over(&slice.subslice(50 * PAGE, 100 * PAGE).unwrap(), &file, 0).unwrap();
        let is_written = |page| page % 3 == 0 && !(2000..8000).contains(&page) || page == pages - 1;
        for page in 0..pages {
            if is_written(page) {
                slice.write_obj(1_u8, page * PAGE).unwrap();
            } else if (100..200).contains(&page) {
                let _: u8 = slice.read_obj(page * PAGE).unwrap();
            }
        }
        let expected: Vec<_> = (0..pages).map(is_written).collect();
        assert!(is_copied(&slice) == expected);

        // As an older kernel tells it, where zeros that were read count as well.
        let pagemap = Pagemap::open().unwrap();
        let address = slice.ptr_guard().as_ptr() as u64;
        let (read, to) = pagemap.read_copies(address, 100..200).unwrap();
        let expected = (100..200).filter(|page| is_written(*page) || *page >= 150);
        assert!(read.into_iter().flatten().eq(expected));
        assert_eq!(to, 200);
        let (_, to) = pagemap.read_copies(address, 1..pages).unwrap();
        assert_eq!(to, 1 + PAGES_PER_READ);
    }
}
