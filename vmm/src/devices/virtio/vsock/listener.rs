//! The Unix sockets themselves: the sandbox's own, and those that the guest connects to.
//!
//! Nothing here blocks. The sandbox's socket is removed when its listener goes; one that a killed
//! process left behind is taken over.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// The sandbox's socket.
pub(super) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    pub fn bind(path: PathBuf) -> io::Result<Self> {
        let listener = match UnixListener::bind(&path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && is_stale(&path) => {
                std::fs::remove_file(&path)?;
                UnixListener::bind(&path)?
            }
            result => result?,
        };
        let this = Self { listener, path };
        this.listener.set_nonblocking(true)?;
        Ok(this)
    }

    /// The next client that waits, non-blocking, if there is one.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Connects to whoever listens for connections to `port` of the host.
    pub fn connect_to(&self, port: u32) -> io::Result<UnixStream> {
        connect_to_host(&self.path, port)
    }
}

/// A non-blocking stream to whoever listens for connections to `port` of the host from the guest whose socket is at `path`.
pub fn connect_to_host(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut path = OsString::from(path);
    path.push(format!("_{port}"));
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(&*path)?)?;
    Ok(socket.into())
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may be gone already, with its directory.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether `path` is a socket on which nobody listens.
fn is_stale(path: &Path) -> bool {
    // A file of another kind refuses connections too, and is not ours to remove.
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    is_socket
        && UnixStream::connect(path)
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}
