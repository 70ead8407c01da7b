//! What a sandbox may keep of its drives for those that branch off it: bytes, of all its drives and moments together.
//!
//! Only content counts: a block of zeros, and the marks of those that are saved, take next to nothing.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bound, and how much of it is taken.
#[derive(Debug, Default)]
pub struct Allowance {
    /// In bytes; `None` where only the file system bounds it.
    limit: Option<u64>,
    taken: AtomicU64,
}

impl Allowance {
    /// Of `limit` bytes.
    pub fn new(limit: Option<u64>) -> Self {
        Self {
            limit,
            taken: AtomicU64::new(0),
        }
    }

    /// What one backup takes of it, which is nothing yet.
    pub(super) fn share(self: &Arc<Self>) -> Share {
        Share {
            of: Arc::clone(self),
            taken: AtomicU64::new(0),
        }
    }
}

/// What one backup has taken. It is given back with it.
#[derive(Debug, Default)]
pub(super) struct Share {
    of: Arc<Allowance>,
    taken: AtomicU64,
}

impl Share {
    /// Takes `bytes` more, or nothing where that is too much.
    pub(super) fn take(&self, bytes: u64) -> io::Result<()> {
        let Some(limit) = self.of.limit else {
            return Ok(());
        };
        let more = |taken: u64| taken.checked_add(bytes).filter(|&taken| taken <= limit);
        let taken = &self.of.taken;
        match taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => {
                self.taken.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            Err(_) => Err(io::Error::new(
                ErrorKind::QuotaExceeded,
                format!(
                    "more than {} MiB would be kept (--drive-backup)",
                    limit >> 20
                ),
            )),
        }
    }

    /// Gives all of it back.
    pub(super) fn give_back(&self) {
        let taken = self.taken.swap(0, Ordering::Relaxed);
        self.of.taken.fetch_sub(taken, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back();
    }
}
