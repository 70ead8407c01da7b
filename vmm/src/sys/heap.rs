//! The C library's heap, of which a sandbox that waits for work is to hold no more than it needs.

/// From this length on an allocation is a mapping of its own: its pages cost nothing until they are touched, and are given back with it.
pub const MAPPED: usize = 128 << 10;

/// Has the threads share one heap: few of them, which allocate little. A heap of its own costs each thread that allocates its first pages. To be called before there are threads that do.
pub fn share_among_threads() {
    #[cfg(target_env = "gnu")]
    let mapped = libc::c_int::try_from(MAPPED).unwrap_or(libc::c_int::MAX);
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets numbers of the allocator, under the allocator's lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // Otherwise it grows with what is freed.
        libc::mallopt(libc::M_MMAP_THRESHOLD, mapped);
    }
}

/// Gives pages back that hold nothing any more.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's lock and gives back pages that no allocation is on.
    unsafe {
        libc::malloc_trim(0);
    }
}
