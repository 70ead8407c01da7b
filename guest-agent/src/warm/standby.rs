//! A copy of an interpreter that waits for a program, and the way of a program into it.
//!
//! The copy has its process, its streams and mostly its control group before anybody asks for it. It says "ready" with
//! its process id (which the kernel vouches for), is sent one packet, and says "go" when it runs the program. Until then nothing of the program
//! has run: if the copy is lost, the program is started in a fresh interpreter on the same streams.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use guest_agent::proto::Exec;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send, sendmsg, socketpair,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::cgroup::Cgroup;
use crate::failure::Failure;
use crate::identity::Identity;
use crate::spawn::{self, Spawned, Theirs};

/// How long a copy may take to run its program before that is given up. Making one takes a second where a guest's kernel is emulated.
const PATIENCE: Duration = Duration::from_secs(20);

/// A pair of sockets for packets: ours, which does not block and tells who sends, and theirs.
///
/// # Errors
/// There are too many open files.
pub fn packet_sockets() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    set_socket_passcred(&ours, true)?;
    Ok((ours, theirs))
}

/// Receives a packet and who sent it, if there is one. An empty one, or an error, is the end.
pub fn receive(socket: &OwnedFd, room: &mut [u8]) -> Option<(usize, Option<Pid>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [IoSliceMut::new(room)];
    match recvmsg(socket, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(message) => {
            let sender = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmCredentials(sender) => Some(sender.pid),
                _ => None,
            });
            Some((message.bytes, sender))
        }
        Err(Errno::AGAIN | Errno::INTR) => None,
        Err(_) => Some((0, None)),
    }
}

/// What a copy says.
enum Word {
    Nothing,
    Ready(Pid),
    Go,
    Gone,
}

fn word(socket: &OwnedFd) -> Word {
    let mut room = [0; 16];
    match receive(socket, &mut room) {
        None => Word::Nothing,
        Some((count, sender)) => match (room.get(..count), sender) {
            (Some(b"ready"), Some(pid)) => Word::Ready(pid),
            (Some(b"go"), _) => Word::Go,
            _ => Word::Gone,
        },
    }
}

/// A copy that nobody has asked for yet.
pub struct Standby {
    socket: OwnedFd,
    /// Known once it is ready.
    pid: Option<Pid>,
    /// Our ends of its streams.
    spawned: Spawned,
    theirs: Theirs,
    /// Made, and the copy in it, once it is ready.
    pub cgroup: Option<Cgroup>,
}

impl Standby {
    /// Asks the interpreter behind `control` for a copy.
    ///
    /// # Errors
    /// There are too many open files, or the interpreter is gone or far behind.
    pub fn ask(control: &OwnedFd, identity: Option<&Identity>) -> Result<Self, Failure> {
        let failed = |errno: Errno| Failure::internal("ask the interpreter for a copy", errno);
        let (theirs, spawned) = spawn::pipes(true, identity)?;
        let (socket, its_socket) = packet_sockets().map_err(failed)?;
        let fds = [&its_socket, &theirs.stdin, &theirs.stdout, &theirs.stderr].map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(control, &[IoSlice::new(b"+")], &mut rights, flags).map_err(failed)?;
        Ok(Self {
            socket,
            pid: None,
            spawned,
            theirs,
            cgroup: None,
        })
    }

    /// Readable when the copy has something to say.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Its process id, once it is ready.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Hears what it says; says whether it is still there.
    pub fn hear(&mut self) -> bool {
        match word(&self.socket) {
            Word::Nothing => true,
            Word::Ready(pid) if self.pid.is_none() => {
                self.pid = Some(pid);
                true
            }
            Word::Ready(_) | Word::Go | Word::Gone => false,
        }
    }

    /// Has it run a program, which is `packet` to it and `exec` to a fresh interpreter. If it is ready, it is moved to `group`.
    pub fn begin(
        self,
        packet: Vec<u8>,
        exec: Exec,
        identity: Option<Identity>,
        group: Option<&Cgroup>,
    ) -> (Start, Spawned) {
        let mut spawned = self.spawned;
        if !exec.stdin {
            spawned.stdin = None;
        }
        let mut start = Start {
            socket: self.socket,
            pid: self.pid,
            theirs: self.theirs,
            packet,
            exec,
            identity,
            give_up: Some(Instant::now() + PATIENCE),
            signal: None,
            has_failed: false,
        };
        if self.pid.is_some() {
            start.send(group);
        }
        (start, spawned)
    }

    /// Lets go of it; its control group is to be removed.
    pub fn dismiss(self) -> Option<Cgroup> {
        self.cgroup
    }
}

/// A program on its way into a copy.
pub struct Start {
    socket: OwnedFd,
    pid: Option<Pid>,
    theirs: Theirs,
    packet: Vec<u8>,
    exec: Exec,
    identity: Option<Identity>,
    /// When a fresh interpreter is started instead.
    pub give_up: Option<Instant>,
    /// A signal that came too early.
    pub signal: Option<Signal>,
    has_failed: bool,
}

impl Start {
    /// Readable when the copy has something to say.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The copy's process id, once it is ready.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Whether it cannot come to run there.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// It shall not run there. If the copy is known, its end decides whether it had begun.
    pub fn give_up(&mut self) {
        self.give_up = None;
        match self.pid {
            Some(pid) => drop(kill_process(pid, Signal::KILL)),
            None => self.has_failed = true,
        }
    }

    /// The copy has ended, and its process id is another's from now on.
    pub fn lost(&mut self) {
        self.has_failed = true;
        self.pid = None;
    }

    fn send(&mut self, cgroup: Option<&Cgroup>) {
        let adopted = match (self.pid, cgroup) {
            (Some(pid), Some(cgroup)) => cgroup.adopt(pid).is_ok(),
            _ => true,
        };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        self.has_failed = !adopted || send(&self.socket, &self.packet, flags).is_err();
        self.packet = Vec::new();
    }

    /// Hears what the copy says; gives its process id when it runs the program.
    pub fn advance(&mut self, cgroup: Option<&Cgroup>) -> Option<Pid> {
        loop {
            if self.has_failed {
                return None;
            }
            match word(&self.socket) {
                Word::Nothing => return None,
                Word::Ready(pid) if self.pid.is_none() => {
                    self.pid = Some(pid);
                    self.send(cgroup);
                }
                Word::Go if self.pid.is_some() => return self.pid,
                // It ends by itself, or when it finds nobody at its socket.
                Word::Ready(_) | Word::Go | Word::Gone => self.has_failed = true,
            }
        }
    }

    /// Starts the program in a fresh interpreter.
    ///
    /// # Errors
    /// As [`spawn::start`].
    pub fn start_fresh(&self, cgroup: Option<&Cgroup>) -> Result<Pid, Failure> {
        spawn::start(&self.exec, self.identity.as_ref(), cgroup, &self.theirs)
    }
}
