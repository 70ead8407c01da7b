//! This thread's stack, of which a sandbox that waits for work is to hold no more than it needs.

use std::fs;

use rustix::mm::{Advice, madvise};

/// Bytes below the caller's frame that are left alone: what this function and those that it calls are in.
const OWN: usize = PAGE;
const PAGE: usize = 4096;

/// Gives pages back that deeper calls have used and that nothing is on any more. For the thread that the process has begun with, whose stack is as the kernel says.
// Inlined, its own variable could lie above others of its caller's frame.
#[inline(never)]
pub fn trim() {
    let here = 0_u8;
    let address = (&raw const here).addr();
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let number = |text: &str| usize::from_str_radix(text, 16).ok();
    let stack = maps.lines().find_map(|line| {
        let (start, rest) = line.split_once('-')?;
        let (end, _) = rest.split_once(' ')?;
        let (start, end) = (number(start)?, number(end)?);
        (start..end).contains(&address).then_some(start)
    });
    let Some(start) = stack else { return };
    let end = address.saturating_sub(OWN) / PAGE * PAGE;
    let Some(len) = end.checked_sub(start) else {
        return;
    };
    // SAFETY: the pages lie below the frames of all functions that run on this stack, this one's, which is small and never inlined, among them, in the same mapping: what was there is what functions have left that have returned.
    // A signal handler that comes in between uses them like a new call, and has returned before this thread goes on.
    let _ = unsafe {
        madvise(
            std::ptr::with_exposed_provenance_mut(start),
            len,
            Advice::LinuxDontNeed,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uses `pages` of the stack, and then itself again.
    #[inline(never)]
    fn deep(pages: usize) -> usize {
        let page = std::hint::black_box([1_u8; PAGE]);
        match pages {
            0 => usize::from(page[0]),
            _ => deep(pages - 1) + usize::from(page[1]),
        }
    }

    #[test]
    fn what_is_in_use_stays() {
        let kept = std::hint::black_box([7_u8; 2 * PAGE]);
        for _ in 0..3 {
            assert_eq!(deep(50), 51);
            trim();
            assert!(kept.iter().all(|byte| *byte == 7));
        }
    }
}
