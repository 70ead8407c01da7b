//! What sandboxes are found by without reading the records of all: links in the directory of all sandboxes, each to a sandbox's own.
//!
//! ```text
//! .name-<NAME>       who is called so
//! .unkept-<id>       who is to be removed once its process is gone
//! .tree-<ROOT>-<id>  a sandbox of a tree that has a budget
//! .removed-<id>/     a directory that is being removed
//! ```
//!
//! They are made and removed under a lock on that directory, which dies with its process. Those of a sandbox follow from its record, which is
//! written aside before the first of them is made: so whoever removes a sandbox finds all of them, wherever its process was killed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::record::{RECORD, Record, aside, read};
use super::{SandboxError, is_name};

const NAME: &str = ".name-";
const UNKEPT: &str = ".unkept-";
const TREE: &str = ".tree-";
const REMOVED: &str = ".removed-";

/// What hidden entries of the directory of all sandboxes are for.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// The sandbox of this id goes with its process.
    Unkept(String),
    /// It is being removed.
    Removed,
}

/// The directory of all sandboxes, locked: nobody else makes or removes links.
pub struct Index {
    dir: PathBuf,
    _lock: File,
}

impl Index {
    /// Waits for the lock.
    pub fn lock(dir: &Path) -> Result<Self, SandboxError> {
        Self::lock_by(dir, FlockOperation::LockExclusive)
    }

    /// `None` where somebody else has it.
    pub fn try_lock(dir: &Path) -> Option<Self> {
        Self::lock_by(dir, FlockOperation::NonBlockingLockExclusive).ok()
    }

    fn lock_by(dir: &Path, operation: FlockOperation) -> Result<Self, SandboxError> {
        let lock = File::open(dir).map_err(failed("open", dir))?;
        flock(&lock, operation).map_err(|errno| failed("lock", dir)(errno.into()))?;
        Ok(Self {
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    /// The directory of all sandboxes.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Has the sandbox `id` removed once its process is gone.
    pub fn mark_unkept(&self, id: &str) -> Result<(), SandboxError> {
        self.link(&format!("{UNKEPT}{id}"), id)
    }

    /// Enters a sandbox under its name, which nobody else may have, and into its tree.
    pub fn enter(&self, record: &Record) -> Result<(), SandboxError> {
        self.link(&name_link(&record.name), &record.id)?;
        match tree_link(record) {
            Some(link) => self.link(&link, &record.id),
            None => Ok(()),
        }
    }

    /// Removes the sandbox `id`: its links, and its directory out of everybody's sight. What is returned is where the directory is now, if there was one: removing that needs no lock.
    pub fn remove(&self, id: &str) -> io::Result<Option<PathBuf>> {
        let dir = self.dir.join(id);
        let records = [RECORD.to_owned(), aside(RECORD)];
        let record = records
            .iter()
            .find_map(|name| read::<Record>(&dir, name).ok().flatten());
        if let Some(record) = record {
            if holder(&self.dir, &record.name).as_deref() == Some(id) {
                unlink(&self.dir, &name_link(&record.name))?;
            }
            tree_link(&record).map_or(Ok(()), |link| unlink(&self.dir, &link))?;
        }
        let gone = self.dir.join(format!("{REMOVED}{id}"));
        let moved = match fs::rename(&dir, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            moved => moved.map(|()| Some(gone))?,
        };
        keep(&self.dir, id)?;
        Ok(moved)
    }

    /// Whoever had the name is gone: a link that is in the way is nobody's.
    fn link(&self, name: &str, id: &str) -> Result<(), SandboxError> {
        let path = self.dir.join(name);
        let io = |error| failed("make", &path)(error);
        match symlink(id, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path).map_err(io)?;
                symlink(id, &path).map_err(io)
            }
            made => made.map_err(io),
        }
    }
}

/// A sandbox that is not to be removed with its process any more.
pub fn keep(dir: &Path, id: &str) -> io::Result<()> {
    unlink(dir, &format!("{UNKEPT}{id}"))
}

/// The id of the sandbox that has entered itself under `name`. It may be dead.
pub fn holder(dir: &Path, name: &str) -> Option<String> {
    if !is_name(name) {
        return None;
    }
    let id = fs::read_link(dir.join(name_link(name))).ok()?;
    id.to_str().map(str::to_owned)
}

/// The ids of those that have entered themselves into the tree of `root`. They may be dead.
pub fn members(dir: &Path, root: &str) -> io::Result<Vec<String>> {
    let start = format!("{TREE}{root}-");
    let names = hidden(dir)?;
    let ids = names.iter().filter_map(|name| name.strip_prefix(&start));
    Ok(ids.map(str::to_owned).collect())
}

/// What may be left to remove.
pub fn leftovers(dir: &Path) -> io::Result<Vec<(PathBuf, Entry)>> {
    let entry = |name: &String| match name.strip_prefix(UNKEPT) {
        Some(id) => Some(Entry::Unkept(id.to_owned())),
        None => name.starts_with(REMOVED).then_some(Entry::Removed),
    };
    let names = hidden(dir)?;
    let found = names
        .iter()
        .filter_map(|name| Some((dir.join(name), entry(name)?)));
    Ok(found.collect())
}

/// Whether an entry of the directory of all sandboxes is none of a sandbox.
pub fn is_hidden(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

fn hidden(dir: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(dir)?.flatten().map(|entry| entry.file_name());
    let names = names.filter(|name| is_hidden(name));
    Ok(names.filter_map(|name| name.into_string().ok()).collect())
}

fn name_link(name: &str) -> String {
    format!("{NAME}{name}")
}

/// Only trees with a budget are looked for.
fn tree_link(record: &Record) -> Option<String> {
    let bounded = !record.budget.is_unbounded();
    bounded.then(|| format!("{TREE}{}-{}", record.root(), record.id))
}

fn unlink(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SandboxError + use<> {
    let path = path.to_owned();
    move |source| SandboxError::Io {
        action,
        path,
        source,
    }
}
