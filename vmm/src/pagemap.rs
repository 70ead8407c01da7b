//! Which pages of memory that was mapped privately are copies of its own: those that somebody has written to (`/proc/self/pagemap`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use snapshot_fmt::PAGE_BYTES;
use zerocopy::IntoBytes;

/// Bits of an entry (Linux, Documentation/admin-guide/mm/pagemap.rst): present, swapped out, of a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
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

    /// The `pages` pages from `address` on, in runs of such as are copies and of others, ascending, each with its place among them and whether it is of copies. One of zeros
    /// counts as a copy.
    pub fn runs(
        &self,
        address: u64,
        pages: usize,
    ) -> impl Iterator<Item = io::Result<(Range<usize>, bool)>> {
        (0..pages).step_by(PAGES_PER_READ).flat_map(move |from| {
            let to = pages.min(from + PAGES_PER_READ);
            match self.entries(address, from, to) {
                Err(error) => vec![Err(unreadable(error))],
                Ok(entries) => {
                    let mut page = from;
                    let runs = entries.chunk_by(|a, b| is_copy(*a) == is_copy(*b));
                    let run = |run: &[u64]| {
                        let start = page;
                        page += run.len();
                        Ok((start..page, is_copy(run[0])))
                    };
                    runs.map(run).collect()
                }
            }
        })
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
