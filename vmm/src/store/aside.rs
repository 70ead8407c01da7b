//! Snapshots that are there for one process alone, which removes them when it is done with them; where it was killed before, the next who looks after the store does.
//!
//! Beside such a snapshot lies a symbolic link that leads nowhere and names the process: by its id, which another may get later, and by when it began.
//! So who looks for them reads the directory, and not all snapshots.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use snapshot_fmt::digest::Digest;

use super::error::io_error;
use super::remove::{Removed, Tree};
use super::{Draft, Store, StoreError};
use crate::proc_stat::ProcStat;

/// What the link's name starts with; the snapshot's id follows.
const OWNED: &str = ".owner-";

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
        let stat = ProcStat::read(pid)?;
        let is_dead = matches!(stat.field(3)?, "Z" | "X");
        let began = stat.field(22)?.parse().ok()?;
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
    pub fn belong_to(&mut self, owner: Owner) {
        self.owner = Some(owner);
    }
}

impl Store {
    fn mark(&self, id: &Digest) -> PathBuf {
        self.dir().join(format!("{OWNED}{id}"))
    }

    /// Writes down whom the snapshot `id` is there for, before it is there. The store is locked.
    pub(super) fn mark_owner(&self, id: &Digest, owner: Owner) -> Result<(), StoreError> {
        let path = self.mark(id);
        // One may be left of a snapshot that had this id and has gone.
        let _ = fs::remove_file(&path);
        symlink(owner.to_string(), &path).map_err(io_error("make", &path))
    }

    /// Forgets whom the snapshot `id` was there for, which goes; mostly nobody. What stays is the next collector's.
    pub(super) fn unmark_owner(&self, id: &Digest) {
        let _ = fs::remove_file(self.mark(id));
    }

    /// Of the names in the directory, removes snapshots that were there for processes that have ended, unless they are in use or others rest on them. The
    /// store is locked.
    pub(super) fn clear_orphans(
        &self,
        names: &[String],
        dry_run: bool,
    ) -> Result<Vec<Removed>, StoreError> {
        let ids = names
            .iter()
            .filter_map(|name| name.strip_prefix(OWNED)?.parse::<Digest>().ok());
        let mut orphans = Vec::new();
        for id in ids {
            if !self.path(&id).exists() {
                if !dry_run {
                    self.unmark_owner(&id);
                }
                continue;
            }
            let owner = fs::read_link(self.mark(&id)).ok();
            if owner.is_some_and(|owner| Owner::living(&owner.to_string_lossy()).is_none()) {
                orphans.push(id);
            }
        }
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
