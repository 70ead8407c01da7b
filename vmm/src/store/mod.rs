//! The snapshots of this user: a directory each, in `$XDG_DATA_HOME/bough/snapshots`.
//!
//! ```text
//! snapshots/
//!   lock              held (flock) by who publishes or removes, for a moment
//!   <id>/             a snapshot
//!     lock            held shared by who uses it, alone by who removes it
//!     manifest.json, state.bin, memory.layer, ...
//!   tmp-<pid>-<r>/    a draft; its lock is held by who writes it
//!   .owner-<id>       the process that a snapshot is there for, where it is for one alone: a link that leads nowhere
//!   .removed-<name>   one that is being removed
//! ```
//!
//! A directory under its id is complete and on the disk: it got that name last. Locks die with their processes, so what a
//! killed one leaves is told by a lock that nobody holds. A snapshot that is in use keeps those that it rests on: they have a child.

mod aside;
pub mod derive;
mod draft;
mod error;
pub mod remove;

#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use snapshot_fmt::chain::{Chain, ChainError, DEPTH_MAX};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::error::FormatError;
use snapshot_fmt::manifest::{MANIFEST, WORKING_SET};
use snapshot_fmt::snapshot::Snapshot;
use snapshot_fmt::working_set;

use crate::sandbox::list::alike;
use crate::user_dirs::data_dir;
pub use aside::Owner;
pub use draft::Draft;
pub use error::StoreError;
use error::io_error;

/// File name of a lock.
const LOCK: &str = "lock";
/// What the name of a draft starts with.
const DRAFT: &str = "tmp-";
/// What the name of a directory that is being removed starts with.
const REMOVED: &str = ".removed-";
/// Digits of an id that people are shown.
const SHORT: usize = 12;
/// Fewest digits that stand for an id.
const PREFIX_MIN: usize = 4;

/// The beginning of an id, for messages and lists.
pub fn short(id: &Digest) -> String {
    id.to_string()[..SHORT].to_owned()
}

/// Where snapshots are.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// A snapshot that nobody can remove for as long as this lives.
#[derive(Debug)]
pub struct Held {
    snapshot: Snapshot,
    _lock: File,
}

impl Held {
    /// The snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Writes down which pages of memory were wanted first, for the next restores: whole or not at all. It is a hint and costs no sync; a file that a
    /// crash has damaged is told by its digest.
    pub fn write_working_set(&self, pages: &[u64]) -> Result<(), StoreError> {
        let total_pages = self.snapshot.manifest().machine.total_pages().unwrap_or(0);
        let path = self.snapshot.path(WORKING_SET);
        let aside = self
            .snapshot
            .path(&format!(".{WORKING_SET}-{}", std::process::id()));
        let file = File::create(&aside).map_err(io_error("make", &aside))?;
        let written =
            working_set::write(&file, &aside, total_pages, pages).map_err(StoreError::from);
        let renamed =
            written.and_then(|()| fs::rename(&aside, &path).map_err(io_error("rename", &aside)));
        if renamed.is_err() {
            // The first failure is the one to tell.
            let _ = fs::remove_file(&aside);
        }
        renamed
    }
}

/// Makes `dir`, and what is missing above it, and has each name on the disk: what is published there later is found after a crash.
fn make_dir(dir: &Path) -> Result<(), StoreError> {
    if dir.is_dir() {
        return Ok(());
    }
    let above = dir.parent().filter(|above| !above.as_os_str().is_empty());
    let above = above.unwrap_or(Path::new("."));
    make_dir(above)?;
    match DirBuilder::new().mode(0o700).create(dir) {
        // Somebody else was quicker, and perhaps has not synced it yet.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.map_err(io_error("make", dir))?,
    }
    sync(above).map(drop)
}

/// Waits until a file or directory is on the disk. Returns its length in bytes.
fn sync(path: &Path) -> Result<u64, StoreError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    file.sync_all().map_err(io_error("sync", path))?;
    Ok(file.metadata().map_err(io_error("look at", path))?.len())
}

/// A directory that should be a snapshot.
#[derive(Debug)]
pub struct Entry {
    /// The id that its name gives.
    pub id: Digest,
    /// The snapshot, or what is wrong with its manifest.
    pub snapshot: Result<Snapshot, StoreError>,
}

impl Store {
    /// This user's.
    pub fn of_user() -> Result<Self, StoreError> {
        let dir = data_dir().ok_or(StoreError::NoPlace)?.join("snapshots");
        Ok(Self { dir })
    }

    /// The one in `dir`, which need not be there yet.
    pub fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All there is, the oldest first; what cannot be read comes first of all.
    pub fn all(&self) -> Result<Vec<Entry>, StoreError> {
        let mut found = Vec::new();
        for name in self.names()? {
            let Ok(id) = name.parse() else {
                continue;
            };
            match self.open(&id) {
                Err(StoreError::Gone { .. }) => {}
                snapshot => found.push(Entry { id, snapshot }),
            }
        }
        // Several can be taken in a second; their manifests are written once.
        found.sort_by_cached_key(|entry| {
            let snapshot = entry.snapshot.as_ref().ok();
            let manifest = fs::metadata(self.path(&entry.id).join(MANIFEST));
            let written = manifest.and_then(|manifest| manifest.modified()).ok();
            let created = snapshot.map(|snapshot| snapshot.manifest().created);
            (created, written, entry.id)
        });
        Ok(found)
    }

    /// The snapshot of this id, or the newest of this name, or the one whose id starts so.
    pub fn find(&self, reference: &str) -> Result<Snapshot, StoreError> {
        self.open(&self.resolve(reference)?)
    }

    /// The id of the snapshot that `reference` means, which may be one that cannot be read.
    pub fn resolve(&self, reference: &str) -> Result<Digest, StoreError> {
        if let Ok(id) = reference.parse()
            && self.path(&id).exists()
        {
            return Ok(id);
        }
        let all = self.all()?;
        let name_of = |entry: &Entry| entry.snapshot.as_ref().ok()?.manifest().name.clone();
        if let Some(newest) = all
            .iter()
            .rev()
            .find(|entry| name_of(entry).as_deref() == Some(reference))
        {
            return Ok(newest.id);
        }
        let starts = |entry: &&Entry| {
            reference.len() >= PREFIX_MIN && entry.id.to_string().starts_with(reference)
        };
        let by_id: Vec<&Entry> = all.iter().filter(starts).collect();
        match by_id[..] {
            [one] => Ok(one.id),
            [] => Err(StoreError::Unknown {
                reference: reference.to_owned(),
                known: all
                    .iter()
                    .filter_map(name_of)
                    .find(|known| alike(known, reference)),
            }),
            _ => Err(StoreError::Ambiguous {
                reference: reference.to_owned(),
                candidates: by_id.iter().map(|entry| short(&entry.id)).collect(),
            }),
        }
    }

    /// Keeps the snapshot that `reference` means from being removed. Waits for somebody who is removing it.
    pub fn hold(&self, reference: &str) -> Result<Held, StoreError> {
        let id = self.resolve(reference)?;
        let lock = self.lock(&id, FlockOperation::LockShared)?;
        Ok(Held {
            snapshot: self.open(&id)?,
            _lock: lock,
        })
    }

    /// The snapshot and those that it rests on, the root first.
    pub fn lineage(&self, snapshot: &Snapshot) -> Result<Vec<Snapshot>, StoreError> {
        let mut lineage = vec![snapshot.clone()];
        let mut child = snapshot.manifest();
        let mut next;
        while let Some(id) = child.parent {
            if lineage.len() == DEPTH_MAX {
                return Err(ChainError::TooDeep {
                    depth: DEPTH_MAX + 1,
                }
                .into());
            }
            next = self.open(&id).map_err(|error| match error {
                StoreError::Gone { id } => StoreError::NoParent {
                    child: child.id,
                    parent: id,
                },
                error => error,
            })?;
            lineage.push(next.clone());
            child = next.manifest();
        }
        lineage.reverse();
        Ok(lineage)
    }

    /// The layers called `layer` of the snapshot and those that it rests on. Where an ancestor has none, the one above it is the root.
    pub fn chain(&self, snapshot: &Snapshot, layer: &str) -> Result<Chain, StoreError> {
        let lineage = self.lineage(snapshot)?;
        let with_it = lineage
            .iter()
            .rev()
            .take_while(|snapshot| snapshot.manifest().file(layer).is_some());
        let mut layers = with_it
            .map(|snapshot| snapshot.layer(layer))
            .collect::<Result<Vec<_>, FormatError>>()?;
        layers.reverse();
        Ok(Chain::new(layers)?)
    }

    /// Where the snapshot `id` is, or would be.
    pub fn path(&self, id: &Digest) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// Reads the manifest of `id`.
    fn open(&self, id: &Digest) -> Result<Snapshot, StoreError> {
        let path = self.path(id);
        let snapshot = match Snapshot::open(&path) {
            // Not there, or removed between.
            Err(_) if !path.exists() => return Err(StoreError::Gone { id: *id }),
            snapshot => snapshot?,
        };
        if snapshot.id() == *id {
            return Ok(snapshot);
        }
        Err(StoreError::WrongDirectory {
            path,
            id: snapshot.id(),
        })
    }

    /// The names in the directory; none where it is not there.
    fn names(&self) -> Result<Vec<String>, StoreError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("read", &self.dir))?,
        };
        let names = entries
            .flatten()
            .map(|entry| entry.file_name().into_string());
        Ok(names.flatten().collect())
    }

    /// Makes the directory, and keeps others from publishing and removing for as long as the file lives.
    fn lock_all(&self) -> Result<File, StoreError> {
        make_dir(&self.dir)?;
        let path = self.dir.join(LOCK);
        let lock = File::create(&path).map_err(io_error("make", &path))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|errno| io_error("lock", &path)(errno.into()))?;
        Ok(lock)
    }

    /// Locks the snapshot `id`.
    fn lock(&self, id: &Digest, operation: FlockOperation) -> Result<File, StoreError> {
        let path = self.path(id).join(LOCK);
        let gone = || StoreError::Gone { id: *id };
        let lock = match File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(gone()),
            lock => lock.map_err(io_error("open", &path))?,
        };
        flock(&lock, operation).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => StoreError::InUse { id: *id },
            errno => io_error("lock", &path)(errno.into()),
        })?;
        // It may have been removed, and even made again, while this waited.
        let inode = |metadata: io::Result<fs::Metadata>| metadata.map(|metadata| metadata.ino());
        match (inode(fs::metadata(&path)), inode(lock.metadata())) {
            (Ok(there), Ok(held)) if there == held => Ok(lock),
            _ => Err(gone()),
        }
    }
}
