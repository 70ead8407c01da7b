//! Snapshots that are there for one process alone, which removes them when it is done with them; where it was killed before, the next who looks after the store does.
//!
//! Such a snapshot has a file that names the process: by its id, which another may get later, and by when it began.

use std::fmt;
use std::fs;
use std::path::Path;

use rustix::fs::FlockOperation;
use snapshot_fmt::digest::Digest;

use super::error::io_error;
use super::remove::{Removed, Tree};
use super::{Draft, Store, StoreError};

/// The file's name.
const OWNER: &str = "owner";

/// A process of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pid: u32,
    /// In the kernel's ticks since the host's boot (proc(5), `stat`, field 22).
    began: u64,
}

impl Owner {
    /// The process `pid`, if it lives.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // A name may have anything in it, parentheses too.
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let is_dead = matches!(fields.first(), Some(&("Z" | "X")));
        let began = fields.get(19)?.parse().ok()?;
        (!is_dead).then_some(Self { pid, began })
    }

    /// Reads what was written of one, which lives if this gives it.
    fn living(text: &str) -> Option<Self> {
        let (pid, began) = text.trim_end().split_once(' ')?;
        let this = Self {
            pid: pid.parse().ok()?,
            began: began.parse().ok()?,
        };
        Self::of(this.pid).filter(|there| *there == this)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.began)
    }
}

impl Draft {
    /// Has the snapshot that this becomes be there for `owner` alone.
    pub fn belong_to(&self, owner: Owner) -> Result<(), StoreError> {
        let path = self.path().join(OWNER);
        fs::write(&path, format!("{owner}\n")).map_err(io_error("write", &path))
    }
}

/// Whether the snapshot in `dir` was there for a process that has ended.
fn is_orphan(dir: &Path) -> bool {
    fs::read_to_string(dir.join(OWNER)).is_ok_and(|owner| Owner::living(&owner).is_none())
}

impl Store {
    /// Removes snapshots that were there for processes that have ended, unless they are in use or others rest on them. The store is locked.
    pub(super) fn clear_orphans(&self, dry_run: bool) -> Result<Vec<Removed>, StoreError> {
        let names = self.names()?.into_iter();
        let ids = names.filter_map(|name| name.parse::<Digest>().ok());
        let orphans: Vec<_> = ids.filter(|id| is_orphan(&self.path(id))).collect();
        if orphans.is_empty() {
            return Ok(Vec::new());
        }
        let tree = Tree::new(self)?;
        let mut removed = Vec::new();
        for id in orphans {
            let lock = self.lock(&id, FlockOperation::NonBlockingLockExclusive);
            let (Ok(_lock), true) = (lock, tree.children(&id).is_empty()) else {
                continue;
            };
            if !dry_run {
                super::remove::delete(&[self.put_aside(&id)?])?;
            }
            removed.push(tree.removed(&id));
        }
        Ok(removed)
    }
}
