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
//! A directory whose lock nobody holds is a dead sandbox's. Whoever starts next removes it, unless it was
//! started detached: then it stays, to be looked at, until `vmm rm` or a new sandbox of that name.

pub mod budget;
pub mod list;
pub mod record;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

use list::Sandbox;
use record::{EXIT_RECORD, ExitRecord, RECORD, Record};

/// Longest path that a Unix socket can be bound to, in bytes (`sun_path`, its NUL excluded).
const SOCKET_PATH_MAX: usize = 107;
/// Room for `/vsock.sock_` and a port of ten digits.
const SOCKET_NAME_ROOM: usize = 22;
/// Characters of an id.
const ID_LEN: usize = 8;
/// What the name of a directory that is being removed starts with.
const REMOVED: &str = ".removed-";
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
    /// Makes a directory with a new id, and clears away what killed sandboxes have left. The name is the id where none
    /// is given. What a dead sandbox of that name has left goes as well.
    pub fn create(name: Option<&str>) -> Result<Self, SandboxError> {
        let parent = runtime_dir();
        if parent.as_os_str().len() + ID_LEN + 1 + SOCKET_NAME_ROOM > SOCKET_PATH_MAX {
            return Err(SandboxError::PathTooLong { path: parent });
        }
        name.map_or(Ok(()), check_name)?;
        make_runtime_dir()?;
        remove_dead(&parent);
        let mut tries = 0;
        loop {
            tries += 1;
            match Self::create_in(&parent, &new_id()?) {
                // The id is taken, or another starter took the new directory for a dead one.
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

    /// Writes down what this sandbox is; from then on it is listed. Its name must not be a living one's.
    pub fn publish(&mut self, record: &Record) -> Result<(), SandboxError> {
        let parent = runtime_dir();
        let io = |action: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| SandboxError::Io {
                action,
                path,
                source,
            }
        };
        // Held while names are looked at and taken.
        let names = File::open(&parent).map_err(io("open", &parent))?;
        flock(&names, FlockOperation::LockExclusive)
            .map_err(|errno| io("lock", &parent)(errno.into()))?;
        let others = list::all_in(&parent).unwrap_or_default();
        for other in others.iter().filter(|other| other.record.name == self.name) {
            if other.alive {
                return Err(SandboxError::NameInUse {
                    name: self.name.clone(),
                    id: other.record.id.clone(),
                });
            }
            remove(other)?;
        }
        self.rewrite(record)
    }

    /// Writes it down again, under the same name.
    pub fn rewrite(&self, record: &Record) -> Result<(), SandboxError> {
        record::write(self.path(), RECORD, record).map_err(|source| SandboxError::Io {
            action: "write",
            path: self.path().to_owned(),
            source,
        })
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

    fn create_in(parent: &Path, id: &str) -> Result<Self, SandboxError> {
        let path = parent.join(id);
        let io = |action| {
            let path = path.clone();
            move |source| SandboxError::Io {
                action,
                path,
                source,
            }
        };
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(io("make"))?;
        let lock = File::create(path.join("lock")).map_err(io("make a lock in"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| io("lock")(errno.into()))?;
        // It may have been removed between its making and its locking.
        fs::metadata(path.join("lock")).map_err(io("keep"))?;
        Ok(Self {
            paths: SandboxPaths::new(path),
            id: id.to_owned(),
            name: id.to_owned(),
            kept: false,
            _lock: lock,
        })
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
    let path = sandbox.paths.dir();
    let io = |source| SandboxError::Io {
        action: "remove",
        path: path.to_owned(),
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
    // At once out of everybody's sight: a removal that is cut short leaves nothing that looks like a sandbox.
    let aside = path.with_file_name(format!("{REMOVED}{}", sandbox.record.id));
    match fs::rename(path, &aside).and_then(|()| fs::remove_dir_all(&aside)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io(error)),
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
        if let Err(error) = fs::remove_dir_all(self.path()) {
            log::warn!("cannot remove {}: {error}", self.path().display());
        }
    }
}

fn is_race(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, NotFound, WouldBlock};
    matches!(error.kind(), AlreadyExists | NotFound | WouldBlock)
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

/// Removes the directories of sandboxes that have died. Failures are left to the next starter.
fn remove_dead(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(REMOVED.as_bytes()) {
            let _ = fs::remove_dir_all(entry.path());
            continue;
        }
        let Ok(lock) = File::open(entry.path().join("lock")) else {
            // Killed before it had a lock. A starter who is only that far finds its directory gone, and tries again.
            let _ = fs::remove_dir(entry.path());
            continue;
        };
        let record = record::read::<Record>(&entry.path(), RECORD);
        let kept = record.is_ok_and(|record| record.is_some_and(|record| record.kept));
        if !kept && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_sandbox_is_cleared_away_and_a_live_one_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let live = SandboxDir::create_in(parent.path(), "live").unwrap();
        let dead = SandboxDir::create_in(parent.path(), "dead").unwrap();
        let dead_path = dead.path().to_owned();
        // As after kill -9: the lock is gone, the directory is not.
        fs::remove_file(dead.paths().lock()).unwrap();
        File::create(dead.paths().lock()).unwrap();
        std::mem::forget(dead);
        remove_dead(parent.path());
        assert!(!dead_path.exists());
        assert!(live.path().exists());
    }

    #[test]
    fn a_dropped_sandbox_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let sandbox = SandboxDir::create_in(parent.path(), "one").unwrap();
        fs::write(sandbox.paths().vsock_socket(), "").unwrap();
        drop(sandbox);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
