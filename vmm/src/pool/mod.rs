//! Shells that stand ready: processes whose machines are made but for their state and memory, so that what the host is slow at
//! is done before anybody asks. Whoever needs children or restores a snapshot asks the user's pool, if there is one, and starts a process itself for what that
//! does not have. A shell serves one sandbox, once.
//!
//! The pool listens on `pool.sock` in the directory of the sandboxes. A client sends a [`Wanted`], with the layers that memory will begin with ([`crate::message`]); the
//! pool answers with a byte and a connected socket for each shell that it gives, and a byte more. On that socket the shell is handed what it is to be ([`crate::handover`]).
//! The shells that are made next have those layers laid over their memory already. None is made before the client closes, for a while: it is at work with those that it got.

pub mod demand;
pub mod server;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg,
    socket_with,
};
use serde::{Deserialize, Serialize};
use snapshot_fmt::layer::Layer;
use snapshot_fmt::manifest::{KernelFile, Machine};

use crate::confinement::is_confined;
use crate::message;
use crate::reaper::Reaper;

/// How long a pool may take for each step of an answer. One that is slower is worse than none.
const PATIENCE: Duration = Duration::from_millis(200);

/// Where the GNU C library is told how to work.
const TUNABLES: &str = "GLIBC_TUNABLES";
/// No thread keeps a cache of freed memory.
const NO_CACHE: &str = "glibc.malloc.tcache_count=0";

/// What a client asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The machine that the shells are to be made for: a [`kind`].
    pub machine: Machine,
    /// How many; the pool gives as many as it has.
    pub count: u32,
    /// The client's program: device and inode of its file. Shells of another could not read what they are handed.
    pub program: (u64, u64),
}

/// This process's program, as [`Wanted::program`] has it.
fn program() -> io::Result<(u64, u64)> {
    let file = std::fs::metadata("/proc/self/exe")?;
    Ok((file.dev(), file.ino()))
}

/// What a shell is made of: memory, processors and disks, whatever ran on them.
pub fn kind(machine: &Machine) -> Machine {
    Machine {
        kernel: KernelFile {
            path: String::new(),
            digest: None,
        },
        cmdline: String::new(),
        ..machine.clone()
    }
}

/// Where the pool of the sandboxes in `dir` listens.
pub fn socket_in(dir: &Path) -> PathBuf {
    dir.join("pool.sock")
}

/// Shells that a pool has given. It makes no others as long as this is kept, within bounds: they would take the processors from these.
#[derive(Default)]
pub struct Taken {
    /// They, ready. There may be fewer than were wanted, or none, for whatever reason.
    pub shells: Vec<UnixStream>,
    _pool: Option<UnixStream>,
}

/// Takes shells for `machine`, whose memory will begin with `layers`, from the pool in `dir`, `count` at most.
pub fn take(dir: &Path, machine: &Machine, layers: &[Layer], count: u32) -> Taken {
    let mut shells = Vec::new();
    let pool = take_into(&mut shells, dir, machine, layers, count);
    if let Err(error) = &pool
        && !matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    {
        log::warn!("the pool of shells does not answer: {error}");
    }
    Taken {
        shells,
        _pool: pool.ok(),
    }
}

fn take_into(
    shells: &mut Vec<UnixStream>,
    dir: &Path,
    machine: &Machine,
    layers: &[Layer],
    count: u32,
) -> io::Result<UnixStream> {
    let pool = connect(&socket_in(dir))?;
    pool.set_read_timeout(Some(PATIENCE))?;
    pool.set_write_timeout(Some(PATIENCE))?;
    let wanted = Wanted {
        machine: kind(machine),
        count,
        program: program()?,
    };
    let files: Vec<_> = layers.iter().map(Layer::file).collect();
    message::send(&pool, &wanted, &files)?;
    while let Some(shell) = receive(&pool)? {
        shells.push(UnixStream::from(shell));
    }
    Ok(pool)
}

/// Connects without waiting: a pool that does not accept is none.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The next shell; `None` at the end.
fn receive(pool: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        pool,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fd.filter(|_| received.bytes > 0))
}

/// Starts a shell.
pub fn new_shell(reaper: &Reaper) -> io::Result<UnixStream> {
    start_shell(&[], reaper)
}

/// Starts a shell that makes a machine of this kind ahead, with `layers` over its memory.
fn new_shell_for(machine: &Machine, layers: &[File], reaper: &Reaper) -> io::Result<UnixStream> {
    let socket = start_shell(&["--ahead"], reaper)?;
    message::send(&socket, machine, &layers.iter().collect::<Vec<_>>())?;
    Ok(socket)
}

/// What shells are to have in [`TUNABLES`], with what there is already: the C library is not to keep what is freed for whoever allocates next, on pages that a
/// child never uses again.
fn tunables(own: Option<OsString>) -> OsString {
    let mut all = own.unwrap_or_default();
    if !all.as_bytes().ends_with(NO_CACHE.as_bytes()) {
        if !all.is_empty() {
            all.push(":");
        }
        all.push(NO_CACHE);
    }
    all
}

fn start_shell(args: &[&str], reaper: &Reaper) -> io::Result<UnixStream> {
    let (socket, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("shell").args(args);
    if is_confined() {
        command.arg("--confined");
    }
    let process = command
        .env(TUNABLES, tunables(std::env::var_os(TUNABLES)))
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Who interrupts a pool means the pool.
        .process_group(0)
        .spawn()?;
    reaper.adopt(&process)?;
    Ok(socket)
}

/// Gives a shell to a client, or says that there are no more.
fn give(client: &UnixStream, shell: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds = shell.as_slice();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        rights.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(client, &[IoSlice::new(b"s")], &mut rights, flags)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_tells_the_c_library_stays() {
        let once = tunables(None);
        assert_eq!(once, NO_CACHE);
        assert_eq!(tunables(Some(once.clone())), once);
        let more = tunables(Some("glibc.pthread.rseq=0".into()));
        assert_eq!(more, format!("glibc.pthread.rseq=0:{NO_CACHE}").as_str());
        assert_eq!(tunables(Some(more.clone())), more);
    }
}
