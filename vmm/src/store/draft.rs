//! A snapshot that is being written: aside, under a name that is no snapshot's, until all of it is on the disk.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::rand::{GetRandomFlags, getrandom};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::manifest::{MANIFEST, Manifest, WORKING_SET, is_name};
use snapshot_fmt::snapshot::Snapshot;

use super::error::io_error;
use super::{DRAFT, Held, LOCK, Owner, Store, StoreError, sync};

/// A directory for the files of a snapshot. Dropped, it is removed with all that is in it; left by a process that was killed, it is
/// removed by whoever begins the next.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    path: PathBuf,
    /// Absent once the draft has become a snapshot.
    lock: Option<File>,
    /// The process that the snapshot will be there for, if it is for one alone.
    pub(super) owner: Option<Owner>,
}

impl Store {
    /// A place for a new snapshot.
    pub fn begin(&self) -> Result<Draft, StoreError> {
        let all = self.lock_all()?;
        self.clear(&all, false)?;
        let mut random = [0; 4];
        getrandom(&mut random[..], GetRandomFlags::empty())
            .map_err(|errno| io_error("read", Path::new("/dev/urandom"))(errno.into()))?;
        let name = format!(
            "{DRAFT}{}-{:08x}",
            std::process::id(),
            u32::from_ne_bytes(random)
        );
        let path = self.dir().join(name);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(io_error("make", &path))?;
        match lock_draft(&path) {
            Ok(lock) => Ok(Draft {
                store: self.clone(),
                path,
                lock: Some(lock),
                owner: None,
            }),
            Err(error) => {
                // The first failure is the one to tell.
                let _ = fs::remove_dir_all(&path);
                Err(error)
            }
        }
    }
}

fn lock_draft(draft: &Path) -> Result<File, StoreError> {
    let path = draft.join(LOCK);
    let lock = File::create_new(&path).map_err(io_error("make", &path))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|errno| io_error("lock", &path)(errno.into()))?;
    Ok(lock)
}

impl Draft {
    /// The directory, where the files that the manifest will list are written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the draft the snapshot that `manifest` describes: its id is set, everything is synced, then it gets its name. A working set
    /// that lies there goes with it. Returns it as one in use; where it is in the store already, the one that is there.
    pub fn publish(mut self, mut manifest: Manifest) -> Result<Held, StoreError> {
        if let Some(name) = manifest.name.as_ref().filter(|name| !is_name(name)) {
            return Err(StoreError::BadName { name: name.clone() });
        }
        let path = self.path.join(MANIFEST);
        let json = manifest.seal(&path)?;
        fs::write(&path, json).map_err(io_error("write", &path))?;
        for entry in &manifest.files {
            let path = self.path.join(&entry.name);
            let found = sync(&path)?;
            if found != entry.bytes {
                return Err(StoreError::Changed {
                    path,
                    found,
                    listed: entry.bytes,
                });
            }
        }
        let working_set = self.path.join(WORKING_SET);
        if working_set.exists() {
            sync(&working_set)?;
        }
        sync(&path)?;
        sync(&self.path)?;
        // What was written can be read: the same check as any reader's, before anybody relies on it.
        Snapshot::open(&self.path)?;
        let place = self.store.path(&manifest.id);
        let _all = self.store.lock_all()?;
        if place.exists() {
            return self.store.hold(&manifest.id.to_string());
        }
        if let Some(parent) = manifest
            .parent
            .filter(|parent| !self.store.path(parent).exists())
        {
            return Err(StoreError::NoParent {
                child: manifest.id,
                parent,
            });
        }
        if let Some(owner) = self.owner {
            self.store.mark_owner(&manifest.id, owner)?;
        }
        let Some(lock) = self.lock.take() else {
            unreachable!("a draft has its lock until it is published");
        };
        // No collector looks between: the store is locked.
        match self.rename(&lock, &place, &manifest.id) {
            Ok(snapshot) => Ok(Held {
                snapshot,
                _lock: lock,
            }),
            Err(error) => {
                // What has failed must not be there. Where it cannot be taken back, it is whole all the same.
                if !place.exists() || fs::rename(&place, &self.path).is_ok() {
                    self.lock = Some(lock);
                }
                Err(error)
            }
        }
    }

    fn rename(&self, lock: &File, place: &Path, id: &Digest) -> Result<Snapshot, StoreError> {
        flock(lock, FlockOperation::NonBlockingLockShared)
            .map_err(|errno| io_error("lock", &self.path)(errno.into()))?;
        fs::rename(&self.path, place).map_err(io_error("rename", &self.path))?;
        sync(self.store.dir())?;
        self.store.open(id)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.lock.is_none() {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}
