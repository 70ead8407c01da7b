//! The content of files: out as it is, in whole or not at all.
//!
//! What is written goes to a file of another name in the same directory, which takes the
//! file's name when the client has sent everything. Being told to end (SIGTERM) comes as
//! something to poll for, so that a file that is given up is removed.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use guest_agent::proto::{ErrorCode, MAX_DATA, ReadFile, WriteFile};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::{failed, parent, path, wrong};
use crate::failure::Failure;
use crate::loan::PIPE_SIZE;
use crate::sys;

/// How many names are tried for the file that is written to.
const ATTEMPTS: u32 = 100;

/// Carries out `ReadFile`.
pub fn read(request: &ReadFile) -> Result<(), Failure> {
    let path = path(&request.path);
    let fail = |error: io::Error| failed(path, &error);
    let mut file = File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.is_dir() {
        return Err(failed(path, &Errno::ISDIR.into()));
    }
    if request.offset > 0 {
        file.seek(SeekFrom::Start(request.offset)).map_err(fail)?;
    }
    let mut left = match request.length {
        0 => u64::MAX,
        length => length,
    };
    let mut stdout = io::stdout().lock();
    while left > 0 {
        let limit = usize::try_from(left).map_or(PIPE_SIZE, |left| left.min(PIPE_SIZE));
        match splice(&file, None, &stdout, None, limit, SpliceFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(count) => left = left.saturating_sub(count as u64),
            Err(Errno::INTR) => {}
            // Not every kind of file can do so.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(fail(errno.into())),
        }
    }
    let mut buffer = vec![0; MAX_DATA];
    while left > 0 {
        let limit = usize::try_from(left).map_or(MAX_DATA, |left| left.min(MAX_DATA));
        let count = match file.read(buffer.get_mut(..limit).unwrap_or_default()) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(fail(error)),
        };
        left = left.saturating_sub(count as u64);
        let bytes = buffer.get(..count).unwrap_or_default();
        // The pipe is written to directly: std's own buffer splits at line ends.
        write_all(&stdout, bytes)?;
    }
    stdout.flush().map_err(fail)
}

fn write_all(out: impl AsFd, mut bytes: &[u8]) -> Result<(), Failure> {
    while !bytes.is_empty() {
        match rustix::io::write(&out, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Failure::internal("write to the client", errno)),
        }
    }
    Ok(())
}

/// Makes SIGTERM something to poll for; everything else is as usual.
///
/// # Errors
/// A failure that names the system call.
pub fn block_termination() -> Result<(), Failure> {
    // SIGTERM is never let through on the way: it stays pending while it is blocked.
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    sys::usual_signals();
    mask.thread_block()
        .map_err(|errno| Failure::internal("sigprocmask", errno))
}

/// The client's bytes, until their end or the word to give up.
struct Input {
    termination: SignalFd,
}

impl Input {
    fn new() -> Result<Self, Failure> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        let termination =
            SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
                .map_err(|errno| Failure::internal("signalfd", errno))?;
        Ok(Self { termination })
    }

    fn check(&self) -> Result<(), Failure> {
        match self.termination.read_signal() {
            Ok(None) => Ok(()),
            _ => Err(Failure::new(
                ErrorCode::Cancelled,
                "the request was cancelled",
            )),
        }
    }

    /// Writes everything to `file`.
    fn pour(&self, file: &mut File, path: &Path) -> Result<(), Failure> {
        let stdin = io::stdin();
        let mut buffer = Vec::new();
        loop {
            let mut fds = [
                PollFd::new(&stdin, PollFlags::IN),
                PollFd::new(&self.termination, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Failure::internal("poll", errno)),
            }
            let [_, termination] = fds.map(|fd| fd.revents());
            if !termination.is_empty() {
                self.check()?;
            }
            if buffer.is_empty() {
                match splice(&stdin, None, &*file, None, PIPE_SIZE, SpliceFlags::NONBLOCK) {
                    Ok(0) => break,
                    Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
                    // Not every kind of file can do so.
                    Err(Errno::INVAL) => buffer = vec![0; MAX_DATA],
                    Err(errno) => return Err(failed(path, &errno.into())),
                }
                continue;
            }
            let count = match rustix::io::read(&stdin, &mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(errno) => return Err(Failure::internal("read from the client", errno)),
            };
            let bytes = buffer.get(..count).unwrap_or_default();
            file.write_all(bytes)
                .map_err(|error| failed(path, &error))?;
        }
        // The end may have come because the client is gone: then the word came first.
        self.check()
    }
}

/// A file that is not finished; removed unless it is kept.
struct Unfinished {
    path: PathBuf,
    kept: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.kept {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Carries out `WriteFile`.
pub fn write(request: &WriteFile) -> Result<(), Failure> {
    let input = Input::new()?;
    let named = path(&request.path);
    let fail = |error: io::Error| failed(named, &error);
    if request.parents {
        let mut builder = std::fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o755).create(parent(named));
        made.map_err(fail)?;
    }
    // Through a symbolic link to what it means, so that the link stays.
    let target = match named.canonicalize() {
        Ok(target) => target,
        Err(error) if error.kind() == ErrorKind::NotFound => named.to_owned(),
        Err(error) => return Err(fail(error)),
    };
    let existing = match target.metadata() {
        Ok(existing) => Some(existing),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(fail(error)),
    };
    if let Some(existing) = &existing {
        if request.create_new {
            return Err(wrong(ErrorCode::Exists, named, "it exists already"));
        }
        if existing.is_dir() {
            return Err(failed(named, &Errno::ISDIR.into()));
        }
        // Whoever may not write to the file may not replace it either, even if the directory lets them.
        let file = OpenOptions::new()
            .append(true)
            .open(&target)
            .map_err(fail)?;
        let kind = existing.file_type();
        let special = kind.is_char_device() || kind.is_block_device() || kind.is_fifo();
        if request.append || special {
            return append(file, &input, request, named);
        }
    } else if request.append {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o644);
        let file = options.open(&target).map_err(fail)?;
        return append(file, &input, request, named);
    }

    let (mut file, mut unfinished) = unfinished(&target).map_err(fail)?;
    input.pour(&mut file, named)?;
    if let Some(existing) = &existing {
        // Root's writing to somebody's file leaves it theirs.
        let _ = std::os::unix::fs::fchown(&file, Some(existing.uid()), Some(existing.gid()));
    }
    let mode = request
        .mode
        .or(existing.map(|existing| existing.mode() & 0o7777))
        .unwrap_or(0o644);
    file.set_permissions(Permissions::from_mode(mode))
        .map_err(fail)?;
    if request.create_new {
        // Unlike a rename, it replaces nothing that has come meanwhile.
        std::fs::hard_link(&unfinished.path, &target).map_err(fail)?;
    } else {
        std::fs::rename(&unfinished.path, &target).map_err(fail)?;
        unfinished.kept = true;
    }
    Ok(())
}

fn append(mut file: File, input: &Input, request: &WriteFile, named: &Path) -> Result<(), Failure> {
    input.pour(&mut file, named)?;
    match request.mode {
        Some(mode) => file
            .set_permissions(Permissions::from_mode(mode))
            .map_err(|error| failed(named, &error)),
        None => Ok(()),
    }
}

/// A new file beside `target`.
fn unfinished(target: &Path) -> io::Result<(File, Unfinished)> {
    let directory = parent(target);
    for number in 0..ATTEMPTS {
        let path = directory.join(format!(".bough-{}-{number}.part", std::process::id()));
        let mut options = OpenOptions::new();
        match options.write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => return Ok((file, Unfinished { path, kept: false })),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}
