//! Hints to the host's kernel about guest memory: madvise(2). None of them changes what memory holds.

use rustix::mm::{Advice, madvise};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Size in bytes of the huge pages of x86-64 that a transparent one is.
const HUGE_PAGE: usize = 2 << 20;

/// Asks for huge pages behind `slice`, as far as it covers whole ones: one page fault instead of 512 to fill it.
/// A host that gives none gives small pages.
pub fn prefer_huge_pages<B: BitmapSlice>(slice: &VolatileSlice<B>) {
    let guard = slice.ptr_guard_mut();
    let address = guard.as_ptr() as usize;
    let start = address.next_multiple_of(HUGE_PAGE);
    let end = (address + guard.len()) & !(HUGE_PAGE - 1);
    if start < end {
        // SAFETY: whole pages of a mapping that lives as long as `slice`; the advice changes no content.
        let _ = unsafe { madvise(start as *mut _, end - start, Advice::LinuxHugepage) };
    }
}
