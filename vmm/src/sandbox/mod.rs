//! A sandbox's place in the file system: a directory with its sockets, and a lock that dies with its process.
//!
//! ```text
//! $XDG_RUNTIME_DIR/bough/<id>/   (or /run/bough/<id>/ for root without one)
//!   lock          held (flock) for as long as the sandbox lives
//!   sandbox.json  what it is
//!   exit.json     how it ended, once it has
//!   api.sock      HTTP, where it was started detached
//!   console.log   what the guest prints, and console.log.1, what it printed before
//!   vsock.sock    hosts connect here and say CONNECT <port>
//!   vsock.sock_P  the guest's connections to host port P arrive here
//! ```
//!
//! A directory whose lock nobody holds is a dead sandbox's. Whoever starts or branches next removes it, unless it was
//! started detached: then it stays, to be looked at, until `vmm rm` or a new sandbox of that name. Links beside the directories
//! ([`index`]) lead to those, so that a sandbox comes and goes without a look at the others.

pub mod budget;
mod index;
pub mod list;
pub mod record;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

use index::{Entry, Index};
use list::{Sandbox, find_named};
use record::{EXIT_RECORD, ExitRecord, RECORD, Record};

/// Longest path that a Unix socket can be bound to, in bytes (`sun_path`, its NUL excluded).
const SOCKET_PATH_MAX: usize = 107;
/// Room for `/vsock.sock_` and a port of ten digits.
const SOCKET_NAME_ROOM: usize = 22;
/// Characters of an id.
const ID_LEN: usize = 8;
/// How long to wait between two tries for a lock.
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(10);
/// How often a new id is tried before the last error is believed.
const TRIES: u32 = 100;

/// Longest name, in bytes.
const NAME_MAX: usize = 63;

/// Why a sandbox has no place.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// Something in the file system refused.
    #[error("cannot {action} {path}: {source}; XDG_RUNTIME_DIR can name another place")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another sandbox has the name.
    #[error(
        "a sandbox called {name:?} is running (id {id}): choose another --name, or `vmm stop {name}` first"
    )]
    NameInUse {
        /// The name.
        name: String,
        /// Whose it is.
        id: String,
    },
    /// It cannot be a name.
    #[error(
        "{name:?} cannot be a sandbox's name: give up to 63 letters, digits, '.', '_' and '-', the first a letter or digit"
    )]
    BadName {
        /// What was given.
        name: String,
    },
    /// The path is too long for a Unix socket in it.
    #[error(
        "{path} is too long a path for a Unix socket in it: set XDG_RUNTIME_DIR to a shorter one"
    )]
    PathTooLong {
        /// The sandbox's directory.
        path: PathBuf,
    },
}

/// Where a sandbox has its files.
#[derive(Debug, Clone)]
pub struct SandboxPaths(PathBuf);

impl SandboxPaths {
    /// Those of the sandbox in this directory.
    pub fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// Locked by the sandbox's process.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Where the API is served.
    pub fn api_socket(&self) -> PathBuf {
        self.0.join("api.sock")
    }

    /// What the guest prints.
    pub fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// Where hosts reach the guest's vsock.
    pub fn vsock_socket(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// Where the guest's connections to `port` of the host arrive.
    pub fn vsock_listener(&self, port: u32) -> PathBuf {
        self.0.join(format!("vsock.sock_{port}"))
    }
}

/// A sandbox's directory, locked. It is removed when this is dropped, unless it is kept.
pub struct SandboxDir {
    paths: SandboxPaths,
    id: String,
    name: String,
    kept: bool,
    _lock: File,
}

impl SandboxDir {
    /// Makes a directory with a new id. The name is the id where none is given.
    pub fn create(name: Option<&str>) -> Result<Self, SandboxError> {
        let parent = runtime_dir();
        if parent.as_os_str().len() + ID_LEN + 1 + SOCKET_NAME_ROOM > SOCKET_PATH_MAX {
            return Err(SandboxError::PathTooLong { path: parent });
        }
        name.map_or(Ok(()), check_name)?;
        make_runtime_dir()?;
        let index = Index::lock(&parent)?;
        let mut tries = 0;
        loop {
            tries += 1;
            match Self::create_in(&index, &new_id()?) {
                // The id is taken, or who lists sandboxes was quicker to lock it.
                Err(SandboxError::Io { source, .. }) if tries < TRIES && is_race(&source) => {}
                Ok(mut sandbox) => {
                    if let Some(name) = name {
                        sandbox.name = name.to_owned();
                    }
                    return Ok(sandbox);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes down what this sandbox is; from then on it is listed. Its name must not be a living one's. What a dead one of
    /// that name has left goes.
    pub fn publish(&mut self, record: &Record) -> Result<(), SandboxError> {
        let index = Index::lock(&runtime_dir())?;
        if let Some(other) = find_named(index.dir(), &self.name) {
            if other.alive {
                return Err(SandboxError::NameInUse {
                    name: self.name.clone(),
                    id: other.record.id,
                });
            }
            remove_from(&index, &other)?;
        }
        let write = |source| self.cannot_write(source);
        record::write_aside(self.path(), RECORD, record).map_err(write)?;
        index.enter(record)?;
        record::put_in_place(self.path(), RECORD).map_err(write)?;
        self.mark(record)
    }

    /// Writes it down again, under the same name.
    pub fn rewrite(&self, record: &Record) -> Result<(), SandboxError> {
        record::write(self.path(), RECORD, record).map_err(|source| self.cannot_write(source))?;
        self.mark(record)
    }

    /// One whose record says that it is kept does not go with its process.
    fn mark(&self, record: &Record) -> Result<(), SandboxError> {
        let parent = self.path().parent().filter(|_| record.kept);
        let kept = parent.map_or(Ok(()), |parent| index::keep(parent, &self.id));
        kept.map_err(|source| self.cannot_write(source))
    }

    fn cannot_write(&self, source: io::Error) -> SandboxError {
        SandboxError::Io {
            action: "write",
            path: self.path().to_owned(),
            source,
        }
    }

    /// Eight hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the user calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its files.
    pub fn paths(&self) -> &SandboxPaths {
        &self.paths
    }

    /// Writes down how the sandbox ended. From now on the directory is kept.
    pub fn end(&mut self, exit: &ExitRecord) -> io::Result<()> {
        self.kept = true;
        record::write(self.path(), EXIT_RECORD, exit)
    }

    /// Takes the sockets away, which nobody serves any more.
    pub fn remove_sockets(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.path())?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn create_in(index: &Index, id: &str) -> Result<Self, SandboxError> {
        let path = index.dir().join(id);
        let io = |action| {
            let path = path.clone();
            move |source| SandboxError::Io {
                action,
                path,
                source,
            }
        };
        if path.exists() {
            return Err(io("make")(io::ErrorKind::AlreadyExists.into()));
        }
        // Before there is anything to remove.
        index.mark_unkept(id)?;
        let lock = Self::make(&path, io).inspect_err(|_| {
            // What stays is a dead sandbox's.
            let _ = index.remove(id).map(remove_tree);
        })?;
        Ok(Self {
            paths: SandboxPaths::new(path),
            id: id.to_owned(),
            name: id.to_owned(),
            kept: false,
            _lock: lock,
        })
    }

    fn make<F: FnOnce(io::Error) -> SandboxError>(
        path: &Path,
        io: impl Fn(&'static str) -> F,
    ) -> Result<File, SandboxError> {
        DirBuilder::new()
            .mode(0o700)
            .create(path)
            .map_err(io("make"))?;
        let lock = File::create(path.join("lock")).map_err(io("make a lock in"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| io("lock")(errno.into()))?;
        Ok(lock)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.paths.dir()
    }
}

/// The directory of all sandboxes, made if it is not there.
pub fn make_runtime_dir() -> Result<PathBuf, SandboxError> {
    let path = runtime_dir();
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
    match made {
        Ok(()) => Ok(path),
        Err(source) => Err(SandboxError::Io {
            action: "make",
            path,
            source,
        }),
    }
}

/// Removes what a dead sandbox has left. One that lives is refused by its lock.
pub fn remove(sandbox: &Sandbox) -> Result<(), SandboxError> {
    remove_from(&Index::lock(&runtime_dir())?, sandbox)
}

fn remove_from(index: &Index, sandbox: &Sandbox) -> Result<(), SandboxError> {
    let io = |source| SandboxError::Io {
        action: "remove",
        path: sandbox.paths.dir().to_owned(),
        source,
    };
    if let Ok(lock) = File::open(sandbox.paths.lock()) {
        // Who lists sandboxes holds a lock for a moment.
        let mut tries = 0;
        while let Err(errno) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            tries += 1;
            if tries == TRIES {
                return Err(io(errno.into()));
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
    let removed = index.remove(&sandbox.record.id);
    removed.and_then(remove_tree).map_err(io)
}

/// Removes the directory `path` of this process's own sandbox. Where others hold the lock on all for long, it is left for whoever starts next.
pub fn discard(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(id)) = (path.parent(), path.file_name().and_then(|id| id.to_str()))
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    for _ in 0..TRIES {
        if let Some(index) = Index::try_lock(parent) {
            let removed = index.remove(id)?;
            drop(index);
            return remove_tree(removed);
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Err(io::ErrorKind::WouldBlock.into())
}

fn remove_tree(path: Option<PathBuf>) -> io::Result<()> {
    match path.map_or(Ok(()), fs::remove_dir_all) {
        // Whoever starts removes what it finds half removed.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Refuses what cannot be a name.
pub fn check_name(name: &str) -> Result<(), SandboxError> {
    if is_name(name) {
        return Ok(());
    }
    Err(SandboxError::BadName {
        name: name.to_owned(),
    })
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(allowed)
}

impl Drop for SandboxDir {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = discard(self.path()) {
            log::warn!("cannot remove {}: {error}", self.path().display());
        }
    }
}

fn is_race(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, WouldBlock};
    matches!(error.kind(), AlreadyExists | WouldBlock)
}

/// `$XDG_RUNTIME_DIR/bough`, or `/run/bough` where that is not set.
pub fn runtime_dir() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| PathBuf::from("/run"), PathBuf::from)
        .join("bough")
}

/// Eight random hexadecimal digits.
fn new_id() -> Result<String, SandboxError> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty()).map_err(
        |errno| SandboxError::Io {
            action: "read",
            path: "/dev/urandom".into(),
            source: errno.into(),
        },
    )?;
    Ok(format!("{:08x}", u32::from_ne_bytes(bytes)))
}

/// Removes what sandboxes have left that went without being kept. Failures are left to the next.
pub fn remove_dead() {
    let parent = runtime_dir();
    if let Ok(index) = Index::lock(&parent) {
        remove_dead_in(index);
    }
}

fn remove_dead_in(index: Index) {
    let left = index::leftovers(index.dir()).unwrap_or_default();
    let mut trees = Vec::new();
    for (path, entry) in left {
        match entry {
            Entry::Removed => trees.push(path),
            Entry::Unkept(id) => trees.extend(remove_unkept(&index, &id)),
        }
    }
    // Nobody waits for this.
    drop(index);
    for path in trees {
        let _ = fs::remove_dir_all(path);
    }
}

/// Takes the sandbox `id` out of sight if its process is gone.
fn remove_unkept(index: &Index, id: &str) -> Option<PathBuf> {
    let dir = index.dir().join(id);
    let lock = File::open(dir.join("lock"));
    if let Ok(lock) = &lock
        && flock(lock, FlockOperation::NonBlockingLockExclusive).is_err()
    {
        return None;
    }
    // Killed after it was written down that it is to be kept, and before the mark was gone.
    let record = record::read::<Record>(&dir, RECORD).ok().flatten();
    if record.is_some_and(|record| record.kept) {
        let _ = index::keep(index.dir(), id);
        return None;
    }
    index.remove(id).ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(parent: &Path) -> Index {
        Index::lock(parent).unwrap()
    }

    fn entries(parent: &Path) -> Vec<String> {
        let names = fs::read_dir(parent).unwrap().flatten();
        let names = names.map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    /// As after kill -9: the lock is gone, the directory is not.
    fn kill(sandbox: SandboxDir) {
        fs::remove_file(sandbox.paths().lock()).unwrap();
        File::create(sandbox.paths().lock()).unwrap();
        std::mem::forget(sandbox);
    }

    fn record(id: &str, kept: bool) -> Record {
        let budget = r#"{"sandboxes": 4}"#;
        let text = format!(
            r#"{{"id": "{id}", "name": "called", "pid": 1, "created": 0, "kept": {kept}, "cpus": 1, "memory_mib": 1,
                "kernel": "", "image": "", "budget": {budget}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_dead_sandbox_is_cleared_away_and_a_live_one_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let live = SandboxDir::create_in(&index(parent.path()), "live").unwrap();
        kill(SandboxDir::create_in(&index(parent.path()), "dead").unwrap());
        remove_dead_in(index(parent.path()));
        assert_eq!(entries(parent.path()), [".unkept-live", "live"]);
        drop(live);
    }

    #[test]
    fn a_dropped_sandbox_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let sandbox = SandboxDir::create_in(&index(parent.path()), "one").unwrap();
        fs::write(sandbox.paths().vsock_socket(), "").unwrap();
        drop(sandbox);
        assert!(entries(parent.path()).is_empty());
    }

    #[test]
    fn wherever_it_is_killed_nothing_is_left() {
        let parent = tempfile::tempdir().unwrap();
        type Step = dyn Fn(&Index, &SandboxDir);
        let step: [&Step; 4] = [
            &|_, one| record::write_aside(one.path(), RECORD, &record("one", false)).unwrap(),
            &|index, _| index.enter(&record("one", false)).unwrap(),
            &|_, one| record::put_in_place(one.path(), RECORD).unwrap(),
            // Cut short in its removal.
            &|index, _| drop(index.remove("one").unwrap()),
        ];
        for steps in 0..=step.len() {
            let index = index(parent.path());
            let one = SandboxDir::create_in(&index, "one").unwrap();
            step.iter().take(steps).for_each(|step| step(&index, &one));
            if steps < step.len() {
                kill(one);
            } else {
                std::mem::forget(one);
            }
            remove_dead_in(index);
            assert!(entries(parent.path()).is_empty(), "after {steps} steps");
        }
    }

    #[test]
    fn one_that_is_kept_stays_and_its_name_leads_to_it() {
        let parent = tempfile::tempdir().unwrap();
        let one = SandboxDir::create_in(&index(parent.path()), "one").unwrap();
        record::write(one.path(), RECORD, &record("one", true)).unwrap();
        index(parent.path()).enter(&record("one", true)).unwrap();
        kill(one);
        remove_dead_in(index(parent.path()));
        let left = [".name-called", ".tree-one-one", "one"];
        assert_eq!(entries(parent.path()), left);
        let found = find_named(parent.path(), "called").unwrap();
        assert!(!found.alive);
        assert_eq!(index::members(parent.path(), "one").unwrap(), ["one"]);
        // A link that leads nowhere is nobody's.
        fs::remove_dir_all(found.paths.dir()).unwrap();
        assert!(find_named(parent.path(), "called").is_none());
        index(parent.path()).enter(&record("two", true)).unwrap();
        assert_eq!(index::holder(parent.path(), "called").unwrap(), "two");
        assert_eq!(index::holder(parent.path(), "../one"), None);
    }
}
