//! What a client's bytes come on: a socket, or the lane.

use std::os::fd::OwnedFd;

use rustix::event::PollFlags;
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::sockopt::socket_error;

use crate::epoll::{Wanted, Watched};
use crate::lane::Lane;

/// A client's stream. It never waits.
pub enum Wire {
    /// A socket.
    Socket(Watched),
    /// The lane, of which there is one.
    Lane(Lane),
}

impl Wire {
    /// One of a socket, which is made non-blocking.
    ///
    /// # Errors
    /// Those of ioctl(2).
    pub fn socket(socket: OwnedFd) -> Result<Self, Errno> {
        ioctl_fionbio(&socket, true)?;
        Ok(Self::Socket(socket.into()))
    }

    /// The lane, if it is that.
    pub fn lane(&self) -> Option<&Lane> {
        match self {
            Self::Socket(_) => None,
            Self::Lane(lane) => Some(lane),
        }
    }

    /// Takes what has come.
    ///
    /// # Errors
    /// Those of read(2), or of [`Lane::read`].
    pub fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Socket(socket) => rustix::io::read(socket, into),
            Self::Lane(lane) => lane.read(into),
        }
    }

    /// Sends what there is room for.
    ///
    /// # Errors
    /// Those of write(2), or of [`Lane::write`].
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Self::Socket(socket) => rustix::io::write(socket, bytes),
            Self::Lane(lane) => lane.write(bytes),
        }
    }

    /// Whether the stream was lost, through no doing of the client's.
    pub fn is_lost(&self) -> bool {
        match self {
            // Of a vsock socket it is the socket's own error: reads and writes just say that there is no connection.
            Self::Socket(socket) => {
                socket_error(socket).is_ok_and(|error| error == Err(Errno::CONNRESET))
            }
            Self::Lane(lane) => lane.is_lost(),
        }
    }

    /// To be waited for until `flags` are there.
    pub fn wanted(&self, flags: PollFlags) -> Wanted<'_> {
        match self {
            Self::Socket(socket) => socket.wanted(flags),
            Self::Lane(lane) => lane.device().wanted(flags),
        }
    }
}
