//! PAGEMAP_SCAN: pages of a process by what they are, without an entry for each (Linux 6.7 and later).
//!
//! Source: Linux, Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/fs.h.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Categories of pages.
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Regions that are found by one call.
const REGIONS_MAX: usize = 256;

/// `struct page_region`: addresses.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Finds in `pagemap`, a process's, the pages from `addresses.start` on that are the process's own: neither absent nor a file's, nor the page of zeros that all
/// share. Returns them as ranges of addresses, ascending, and the address that it has come to: `addresses.end`, or less where there were very many.
pub fn own_pages(pagemap: &File, addresses: Range<u64>) -> io::Result<(Vec<Range<u64>>, u64)> {
    let mut regions = [PageRegion::default(); REGIONS_MAX];
    let others = PAGE_IS_FILE | PAGE_IS_PFNZERO;
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start: addresses.start,
        end: addresses.end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: REGIONS_MAX as u64,
        category_inverted: others,
        category_mask: others,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_FILE,
        ..PmScanArg::default()
    };
    // SAFETY: the kernel writes to `arg`, and to as many regions as it says there are, all of which outlive the call; without flags it changes no page.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
    let found = regions.get(..found).unwrap_or_default();
    let ranges = found.iter().map(|region| region.start..region.end);
    Ok((ranges.collect(), arg.walk_end))
}
