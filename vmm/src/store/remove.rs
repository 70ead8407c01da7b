//! Removing snapshots, and what dead processes have left.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::manifest::Manifest;

use super::error::io_error;
use super::{DRAFT, LOCK, REMOVED, Store, StoreError};

/// What is collected besides the remains of dead processes. Without limits that is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcLimits {
    /// Snapshots that were taken before this time, in seconds since 1970.
    pub before: Option<u64>,
    /// The oldest, until the rest has at most so many bytes.
    pub bytes: Option<u64>,
}

/// What was removed, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// A snapshot.
    Snapshot(Box<Manifest>),
    /// A snapshot that could not be read.
    Broken(Digest),
    /// What a dead process left: a draft, or a part of a snapshot that was being removed.
    Remains(PathBuf),
}

/// Bytes of a snapshot's files.
pub fn size_of(manifest: &Manifest) -> u64 {
    let sizes = manifest.files.iter().map(|file| file.bytes);
    sizes.fold(0, u64::saturating_add)
}

impl Store {
    /// Removes the snapshot `id`, and with `recursive` what rests on it. What is in use is refused, and then nothing is removed.
    pub fn remove(&self, id: &Digest, recursive: bool) -> Result<Vec<Removed>, StoreError> {
        let all = self.lock_all()?;
        let tree = Tree::new(self)?;
        let children = tree.children(id);
        if !recursive && !children.is_empty() {
            return Err(StoreError::HasChildren { id: *id, children });
        }
        let mut doomed = vec![*id];
        let mut looked_at = 0;
        while let Some(id) = doomed.get(looked_at) {
            // Damaged manifests could name each other: each is taken once.
            let children = tree.children(id);
            let new = children.into_iter().filter(|child| !doomed.contains(child));
            let new: Vec<_> = new.collect();
            doomed.extend(new);
            looked_at += 1;
        }
        let locks = doomed
            .iter()
            .map(|id| self.lock(id, FlockOperation::NonBlockingLockExclusive));
        let locks = locks.collect::<Result<Vec<_>, _>>()?;
        // Children first: cut short, it leaves no child without its parent.
        let mut aside = Vec::new();
        let mut removed = Vec::new();
        for id in doomed.iter().rev() {
            aside.push(self.put_aside(id)?);
            removed.push(tree.removed(id));
        }
        drop((all, locks));
        delete(&aside)?;
        Ok(removed)
    }

    /// Removes what dead processes have left, and leaves of the tree that `limits` do not allow, the oldest first, as long as
    /// nobody uses them. With `dry_run` nothing is removed.
    pub fn collect(&self, limits: &GcLimits, dry_run: bool) -> Result<Vec<Removed>, StoreError> {
        let all = self.lock_all()?;
        let mut removed = self.clear(&all, dry_run)?;
        let mut tree = Tree::new(self)?;
        let mut kept = HashSet::new();
        let mut aside = Vec::new();
        while let Some(id) = tree.oldest_leaf(limits, &kept) {
            let lock = match self.lock(&id, FlockOperation::NonBlockingLockExclusive) {
                Err(StoreError::InUse { .. }) => {
                    kept.insert(id);
                    continue;
                }
                lock => lock?,
            };
            removed.push(tree.removed(&id));
            tree.snapshots.remove(&id);
            if !dry_run {
                aside.push(self.put_aside(&id)?);
            }
            drop(lock);
        }
        drop(all);
        delete(&aside)?;
        Ok(removed)
    }

    /// Removes what dead processes have left. `_all` keeps those that are about to lock a draft away.
    pub(super) fn clear(&self, _all: &File, dry_run: bool) -> Result<Vec<Removed>, StoreError> {
        let mut removed = Vec::new();
        let names = self.names()?;
        for name in &names {
            let path = self.dir().join(name);
            if !(name.starts_with(REMOVED) || name.starts_with(DRAFT) && is_abandoned(&path)) {
                continue;
            }
            // Where it fails, whoever put it aside may be deleting it just now; else it is the next one's.
            if dry_run || delete(std::slice::from_ref(&path)).is_ok() {
                removed.push(Removed::Remains(path));
            }
        }
        removed.extend(self.clear_orphans(&names, dry_run)?);
        Ok(removed)
    }

    /// Takes a snapshot out of everybody's sight: a removal that is cut short leaves no half of it.
    pub(super) fn put_aside(&self, id: &Digest) -> Result<PathBuf, StoreError> {
        let aside = self.dir().join(format!("{REMOVED}{id}"));
        fs::rename(self.path(id), &aside).map_err(io_error("rename", &self.path(id)))?;
        self.unmark_owner(id);
        Ok(aside)
    }
}

fn is_abandoned(draft: &Path) -> bool {
    match File::open(draft.join(LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        // Killed before it had a lock: a living one has it before the store is unlocked.
        Err(_) => true,
    }
}

pub(super) fn delete(paths: &[PathBuf]) -> Result<(), StoreError> {
    for path in paths {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Who rests on whom.
pub(super) struct Tree {
    /// Absent where a manifest cannot be read.
    snapshots: HashMap<Digest, Option<Manifest>>,
}

impl Tree {
    pub(super) fn new(store: &Store) -> Result<Self, StoreError> {
        let all = store.all()?.into_iter();
        let manifest = |entry: super::Entry| entry.snapshot.ok().map(|s| s.manifest().clone());
        Ok(Self {
            snapshots: all.map(|entry| (entry.id, manifest(entry))).collect(),
        })
    }

    fn manifests(&self) -> impl Iterator<Item = &Manifest> {
        self.snapshots.values().flatten()
    }

    /// In the order of their ids.
    pub(super) fn children(&self, id: &Digest) -> Vec<Digest> {
        let children = self
            .manifests()
            .filter(|manifest| manifest.parent == Some(*id));
        let mut children: Vec<_> = children.map(|manifest| manifest.id).collect();
        children.sort_unstable();
        children
    }

    /// The oldest snapshot that nothing rests on and that `limits` do not allow.
    fn oldest_leaf(&self, limits: &GcLimits, kept: &HashSet<Digest>) -> Option<Digest> {
        let parents: HashSet<_> = self
            .manifests()
            .filter_map(|manifest| manifest.parent)
            .collect();
        let sizes = self.manifests().map(size_of);
        let too_large = limits
            .bytes
            .is_some_and(|bytes| sizes.fold(0, u64::saturating_add) > bytes);
        let leaves = self
            .manifests()
            .filter(|manifest| !parents.contains(&manifest.id) && !kept.contains(&manifest.id));
        let too_old = |manifest: &&Manifest| {
            limits
                .before
                .is_some_and(|before| manifest.created < before)
        };
        let oldest = leaves.filter(|manifest| too_large || too_old(manifest));
        let oldest = oldest.min_by_key(|manifest| (manifest.created, manifest.id))?;
        Some(oldest.id)
    }

    pub(super) fn removed(&self, id: &Digest) -> Removed {
        match self.snapshots.get(id) {
            Some(Some(manifest)) => Removed::Snapshot(Box::new(manifest.clone())),
            _ => Removed::Broken(*id),
        }
    }
}
