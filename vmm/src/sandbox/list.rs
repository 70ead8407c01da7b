//! The sandboxes of this user: found by name or id, alive or dead.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

use super::record::{self, EXIT_RECORD, ExitRecord, RECORD, Record};
use super::{SandboxPaths, index, is_name, runtime_dir};

/// A sandbox as others see it.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// What it is.
    pub record: Record,
    /// Its process is alive.
    pub alive: bool,
    /// How it ended; absent while it lives, and where its process was killed.
    pub exit: Option<ExitRecord>,
    /// Its files.
    pub paths: SandboxPaths,
}

/// No sandbox can be found.
#[derive(Debug, Error)]
pub enum FindError {
    /// There is none of that name.
    #[error("no sandbox is called {name:?}{}; `vmm ls` lists them", nearest(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// A name that is much like it.
        known: Option<String>,
    },
    /// Several ids start so.
    #[error("{name:?} is the beginning of several ids; give more of it, or a name")]
    Ambiguous {
        /// What was asked for.
        name: String,
    },
    /// The directory cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The directory of all sandboxes.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn nearest(known: &Option<String>) -> String {
    known
        .as_ref()
        .map_or(String::new(), |name| format!(" (did you mean {name:?}?)"))
}

/// All sandboxes, the oldest first.
pub fn all() -> Result<Vec<Sandbox>, FindError> {
    all_in(&runtime_dir())
}

pub(super) fn all_in(parent: &Path) -> Result<Vec<Sandbox>, FindError> {
    let entries = match fs::read_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|source| FindError::Io {
            path: parent.to_owned(),
            source,
        })?,
    };
    let mut found: Vec<Sandbox> = entries
        .flatten()
        .filter(|entry| !index::is_hidden(&entry.file_name()))
        .filter_map(|entry| look_at(&entry.path()))
        .collect();
    // Several can be made in a second; their locks are made once.
    found.sort_by_cached_key(|sandbox| {
        let lock = fs::metadata(sandbox.paths.lock());
        let made = lock.and_then(|lock| lock.modified()).ok();
        (sandbox.record.created, made, sandbox.record.id.clone())
    });
    Ok(found)
}

/// The sandbox of this name, or else the one whose id starts so.
pub fn find(name: &str) -> Result<Sandbox, FindError> {
    if let Some(found) = find_entered(&runtime_dir(), name) {
        return Ok(found);
    }
    let mut all = all()?;
    if let Some(index) = all.iter().position(|sandbox| sandbox.record.name == name) {
        return Ok(all.swap_remove(index));
    }
    let starts = |sandbox: &Sandbox| !name.is_empty() && sandbox.record.id.starts_with(name);
    let mut by_id = all.iter().filter(|sandbox| starts(sandbox));
    match (by_id.next(), by_id.next()) {
        (Some(sandbox), None) => Ok(sandbox.clone()),
        (Some(_), Some(_)) => Err(FindError::Ambiguous {
            name: name.to_owned(),
        }),
        _ => Err(FindError::Unknown {
            name: name.to_owned(),
            known: all
                .iter()
                .map(|sandbox| &sandbox.record.name)
                .find(|known| alike(known, name))
                .cloned(),
        }),
    }
}

/// The sandbox that has entered itself under `name`, or else the one whose whole id it is, without a look at others.
fn find_entered(parent: &Path, name: &str) -> Option<Sandbox> {
    let is_whole = |found: &Sandbox| found.record.id == name;
    let by_name = find_named(parent, name);
    // An id is never a name that leads elsewhere.
    by_name.or_else(|| {
        let found = is_name(name).then(|| look_at(&parent.join(name)));
        found.flatten().filter(is_whole)
    })
}

/// The sandbox that has entered itself under `name`.
pub(super) fn find_named(parent: &Path, name: &str) -> Option<Sandbox> {
    let found = look_at(&parent.join(index::holder(parent, name)?))?;
    (found.record.name == name).then_some(found)
}

/// The living sandboxes of the tree of `root`, if that has a budget.
pub(super) fn living_of_tree(root: &str) -> Result<Vec<Sandbox>, FindError> {
    let parent = runtime_dir();
    let ids = index::members(&parent, root).map_err(|source| FindError::Io {
        path: parent.clone(),
        source,
    })?;
    let found = ids.iter().filter_map(|id| look_at(&parent.join(id)));
    Ok(found.filter(|sandbox| sandbox.alive).collect())
}

/// One is the other but for its case or one character.
pub(crate) fn alike(known: &str, name: &str) -> bool {
    strsim::damerau_levenshtein(&known.to_lowercase(), &name.to_lowercase()) <= 1
}

/// A sandbox's directory as it is now; `None` where it is not one, or no more.
fn look_at(path: &Path) -> Option<Sandbox> {
    let paths = SandboxPaths::new(path.to_owned());
    let lock = File::open(paths.lock()).ok()?;
    let alive = flock(&lock, FlockOperation::NonBlockingLockShared).is_err();
    // After the lock: what a process wrote before its end is there once it is dead.
    let record: Record = record::read(path, RECORD).ok()??;
    let exit = record::read(path, EXIT_RECORD).ok()?;
    (alive || record.kept).then_some(Sandbox {
        record,
        alive,
        exit: exit.filter(|_| !alive),
        paths,
    })
}
