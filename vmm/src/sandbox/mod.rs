//! A sandbox's place in the file system: a directory with its sockets, and a lock that dies with its process.
//!
//! ```text
//! $XDG_RUNTIME_DIR/bough/<id>/   (or /run/bough/<id>/ for root without one)
//!   lock          held (flock) for as long as the sandbox lives
//!   vsock.sock    hosts connect here and say CONNECT <port>
//!   vsock.sock_P  the guest's connections to host port P arrive here
//! ```
//!
//! A directory whose lock nobody holds is a killed sandbox's: whoever starts next removes it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

/// Longest path that a Unix socket can be bound to, in bytes (`sun_path`, its NUL excluded).
const SOCKET_PATH_MAX: usize = 107;
/// Room for `/vsock.sock_` and a port of ten digits.
const SOCKET_NAME_ROOM: usize = 22;
/// Characters of an id.
const ID_LEN: usize = 8;
/// How often a new id is tried before the last error is believed.
const TRIES: u32 = 100;

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
    /// The path is too long for a Unix socket in it.
    #[error(
        "{path} is too long a path for a Unix socket in it: set XDG_RUNTIME_DIR to a shorter one"
    )]
    PathTooLong {
        /// The sandbox's directory.
        path: PathBuf,
    },
}

/// A sandbox's directory. It is removed when this is dropped.
pub struct SandboxDir {
    path: PathBuf,
    _lock: File,
}

impl SandboxDir {
    /// Makes a directory with a new id, and clears away what killed sandboxes have left.
    pub fn create() -> Result<Self, SandboxError> {
        let parent = runtime_dir();
        if parent.as_os_str().len() + ID_LEN + 1 + SOCKET_NAME_ROOM > SOCKET_PATH_MAX {
            return Err(SandboxError::PathTooLong { path: parent });
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&parent)
            .map_err(|source| SandboxError::Io {
                action: "make",
                path: parent.clone(),
                source,
            })?;
        remove_dead(&parent);
        let mut tries = 0;
        loop {
            tries += 1;
            match Self::create_in(&parent, &new_id()?) {
                // The id is taken, or another starter took the new directory for a dead one.
                Err(SandboxError::Io { source, .. }) if tries < TRIES && is_race(&source) => {}
                other => return other,
            }
        }
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
        Ok(Self { path, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where hosts reach the guest's vsock.
    pub fn vsock_socket(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// Where the guest's connections to `port` of the host arrive.
    pub fn vsock_listener(&self, port: u32) -> PathBuf {
        self.path.join(format!("vsock.sock_{port}"))
    }
}

impl Drop for SandboxDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
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
        let Ok(lock) = File::open(entry.path().join("lock")) else {
            // Killed before it had a lock. A starter who is only that far finds its directory gone, and tries again.
            let _ = fs::remove_dir(entry.path());
            continue;
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
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
        let SandboxDir { path, .. } = &dead;
        fs::remove_file(path.join("lock")).unwrap();
        File::create(path.join("lock")).unwrap();
        std::mem::forget(dead);
        remove_dead(parent.path());
        assert!(!dead_path.exists());
        assert!(live.path().exists());
    }

    #[test]
    fn a_dropped_sandbox_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let sandbox = SandboxDir::create_in(parent.path(), "one").unwrap();
        fs::write(sandbox.vsock_socket(), "").unwrap();
        drop(sandbox);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
