//! How much of what was written to a stream socket its peer has not read: ioctl(2) with SIOCOUTQ.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// Memory in bytes that holds what the peer has not read, the kernel's own part included: 0 exactly where the peer has
/// read everything.
pub fn unread_by_peer(stream: &UnixStream) -> io::Result<u32> {
    let mut count: libc::c_int = 0;
    // SAFETY: the request (SIOCOUTQ has the number of TIOCOUTQ) writes one `int` to where the pointer says, a local that
    // outlives the call. A descriptor of the wrong kind is refused with ENOTTY.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(count).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Whether both ends of a non-blocking stream are open and have read all there was.
pub fn is_silent(stream: &UnixStream) -> bool {
    let nothing_comes = recv(stream, &mut [0; 1][..], RecvFlags::PEEK) == Err(Errno::WOULDBLOCK);
    nothing_comes && unread_by_peer(stream).is_ok_and(|count| count == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn it_is_nothing_when_all_was_read() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        assert_eq!(unread_by_peer(&near).unwrap(), 0);
        near.write_all(b"ab").unwrap();
        for _ in 0..2 {
            assert!(unread_by_peer(&near).unwrap() > 0);
            far.read_exact(&mut [0]).unwrap();
        }
        assert_eq!(unread_by_peer(&near).unwrap(), 0);
    }
}
