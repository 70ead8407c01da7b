//! The sockets on which clients come: vsock in a guest, Unix sockets for tests.
//!
//! Every socket that leaves this module is close-on-exec; a connection's is made
//! non-blocking by who takes it.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use guest_agent::proto::AGENT_PORT;
use nix::libc::{VMADDR_CID_ANY, VMADDR_CID_HOST};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
};
use std::os::fd::AsRawFd;

use crate::failure::Failure;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 64;

fn vsock_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(
        AddressFamily::Vsock,
        SockType::Stream,
        flags | SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// Listens on the agent's vsock port.
///
/// # Errors
/// A failure that names the system call.
pub fn vsock() -> Result<OwnedFd, Failure> {
    let open = || {
        let listener = vsock_socket(SockFlag::SOCK_NONBLOCK)?;
        bind(
            listener.as_raw_fd(),
            &VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT),
        )?;
        listen(&listener, Backlog::new(BACKLOG)?)?;
        Ok(listener)
    };
    open().map_err(|errno: nix::Error| Failure::internal("listen on vsock", errno))
}

/// Dials the agent's port on the host, which is how the host learns that the guest is ready.
///
/// # Errors
/// The error of `socket` or `connect`; `ECONNRESET` if nobody listens there.
pub fn dial_host() -> nix::Result<OwnedFd> {
    let stream = vsock_socket(SockFlag::empty())?;
    connect(
        stream.as_raw_fd(),
        &VsockAddr::new(VMADDR_CID_HOST, AGENT_PORT),
    )?;
    Ok(stream)
}

/// Listens on a Unix socket, which must not exist yet.
///
/// # Errors
/// The error of `bind`.
pub fn unix(path: &Path) -> std::io::Result<OwnedFd> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener.into())
}

/// Connects to a Unix socket.
///
/// # Errors
/// The error of `connect`.
pub fn dial_unix(path: &Path) -> std::io::Result<OwnedFd> {
    Ok(UnixStream::connect(path)?.into())
}
