//! Work on files: each request is done by a copy of the agent that runs as the request's user.
//!
//! So the kernel decides what the request may do, a slow disk or a reader that waits holds
//! nobody else up, and the copy's pipes carry the content with the same credit as a program's.
//! A copy that fails says why as an `Error` on its standard error.

mod content;
mod directory;
mod tree;
mod upper;
mod watch;

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use guest_agent::frame;
use guest_agent::proto::{
    Error, ErrorCode, List, MakeDirectory, ReadFile, ReadTree, Remove, Rename, Stat, Watch,
    WriteFile, WriteTree,
};
use prost::Message;
use rustix::io::Errno;

use crate::failure::{Failure, plain};
use crate::identity::Identity;
use crate::spawn::{Spawned, helper_pipes};
use crate::sys;

pub use upper::Layers;

/// A request about files.
pub enum Task {
    /// The content of a file.
    Read(ReadFile),
    /// A file to write.
    Write(WriteFile),
    /// What is in a directory.
    List(List),
    /// What is known of a file.
    Stat(Stat),
    /// A file to remove.
    Remove(Remove),
    /// A directory to make.
    MakeDirectory(MakeDirectory),
    /// A file to move.
    Rename(Rename),
    /// Changes to tell.
    Watch(Watch),
    /// A tree to pack.
    ReadTree(ReadTree),
    /// A tree to unpack.
    WriteTree(WriteTree),
    /// What was written to the root to tell.
    ListUpper(Rc<Layers>),
}

impl Task {
    /// Who does it.
    pub fn user(&self) -> &str {
        match self {
            Self::Read(it) => &it.user,
            Self::Write(it) => &it.user,
            Self::List(it) => &it.user,
            Self::Stat(it) => &it.user,
            Self::Remove(it) => &it.user,
            Self::MakeDirectory(it) => &it.user,
            Self::Rename(it) => &it.user,
            Self::Watch(it) => &it.user,
            Self::ReadTree(it) => &it.user,
            Self::WriteTree(it) => &it.user,
            Self::ListUpper(_) => "root",
        }
    }

    fn reads_input(&self) -> bool {
        matches!(self, Self::Write(_) | Self::WriteTree(_))
    }

    fn check(&self) -> Result<(), Failure> {
        let (path, other, mode) = match self {
            Self::Read(it) => (&it.path, None, None),
            Self::Write(it) => (&it.path, None, it.mode),
            Self::List(it) => (&it.path, None, None),
            Self::Stat(it) => (&it.path, None, None),
            Self::Remove(it) => (&it.path, None, None),
            Self::MakeDirectory(it) => (&it.path, None, it.mode),
            Self::Rename(it) => (&it.from, Some(&it.to), None),
            Self::Watch(it) => (&it.path, None, None),
            Self::ReadTree(it) => (&it.path, None, None),
            Self::WriteTree(it) => (&it.path, None, None),
            Self::ListUpper(_) => return Ok(()),
        };
        let invalid = |message| Err(Failure::new(ErrorCode::InvalidArgument, message));
        for path in [Some(path), other].into_iter().flatten() {
            if path.is_empty() || path.contains(&0) {
                return invalid("a path is empty or holds a NUL byte");
            }
        }
        if mode.is_some_and(|mode| mode > 0o7777) {
            return invalid("mode is more than 07777");
        }
        if let Self::Write(it) = self
            && it.append
            && it.create_new
        {
            return invalid("append and create_new exclude each other");
        }
        Ok(())
    }

    fn perform(&self) -> Result<(), Failure> {
        match self {
            Self::Read(it) => content::read(it),
            Self::Write(it) => content::write(it),
            Self::List(it) => directory::list(it),
            Self::Stat(it) => directory::stat(it),
            Self::Remove(it) => directory::remove(it),
            Self::MakeDirectory(it) => directory::make(it),
            Self::Rename(it) => directory::rename(it),
            Self::Watch(it) => watch::watch(it),
            Self::ReadTree(it) => tree::read(it),
            Self::WriteTree(it) => tree::write(it),
            Self::ListUpper(layers) => upper::list(layers),
        }
    }
}

/// Starts the copy of the agent that does the task.
///
/// # Errors
/// A path or mode cannot be, or there can be no more processes.
pub fn start(task: &Task, identity: Option<&Identity>) -> Result<Spawned, Failure> {
    task.check()?;
    let (become_standard, mut spawned) = helper_pipes(task.reads_input())?;
    let child = || {
        let result = become_standard()
            .map_err(|errno| Failure::internal("dup2", errno))
            .and_then(|()| {
                match task {
                    Task::ListUpper(layers) => {
                        sys::close_others(&[layers.upper.as_fd(), layers.image.as_fd()]);
                    }
                    _ => sys::close_others(&[]),
                }
                if matches!(task, Task::Write(_)) {
                    content::block_termination()?;
                } else {
                    sys::usual_signals();
                }
                assume(identity)
            })
            .and_then(|()| task.perform());
        match result {
            Ok(()) => 0,
            Err(failure) => {
                let report = Error::from(failure).encode_to_vec();
                // Nobody is left to tell if this fails.
                let _ = io::stderr().write_all(&report);
                1
            }
        }
    };
    spawned.pid = sys::fork(None, child).map_err(|errno| match errno {
        Errno::AGAIN => Failure::new(ErrorCode::TooMany, format!("fork: {errno}")),
        errno => Failure::internal("fork", errno),
    })?;
    Ok(spawned)
}

fn assume(identity: Option<&Identity>) -> Result<(), Failure> {
    let Some(identity) = identity else {
        return Ok(());
    };
    identity
        .assume(&identity.group_ids())
        .map_err(|errno| Failure::internal("change user", errno))?;
    let home = std::env::set_current_dir(&identity.home);
    home.or_else(|_| std::env::set_current_dir("/"))
        .map_err(|error| failed(&identity.home, &error))
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A failure of a system call on a file.
fn failed(path: &Path, error: &io::Error) -> Failure {
    let code = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => ErrorCode::NotFound,
        Some(Errno::ACCESS | Errno::PERM) => ErrorCode::PermissionDenied,
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => ErrorCode::NoSpace,
        Some(Errno::EXIST) => ErrorCode::Exists,
        Some(Errno::NOTDIR) => ErrorCode::NotADirectory,
        Some(Errno::ISDIR) => ErrorCode::IsADirectory,
        Some(Errno::NOTEMPTY) => ErrorCode::NotEmpty,
        Some(Errno::NAMETOOLONG | Errno::LOOP) => ErrorCode::InvalidArgument,
        _ => ErrorCode::Io,
    };
    Failure::new(code, format!("{}: {}", path.display(), plain(error)))
}

/// Something that is not so, in words.
fn wrong(code: ErrorCode, path: &Path, what: &str) -> Failure {
    Failure::new(code, format!("{}: {what}", path.display()))
}

/// Messages on the way to the client, as frames on standard output.
#[derive(Default)]
struct Records {
    buffer: Vec<u8>,
}

impl Records {
    fn push<M: Message>(&mut self, message: &M) -> Result<(), Failure> {
        frame::encode(message, &mut self.buffer)
            .map_err(|error| Failure::internal("a record", error))?;
        if self.buffer.len() >= 32 * 1024 {
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(&self.buffer)
            .and_then(|()| stdout.flush())
            .map_err(|error| Failure::internal("write to the client", error))?;
        self.buffer.clear();
        Ok(())
    }
}

/// The directory that holds a path.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
