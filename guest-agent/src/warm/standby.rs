//! A copy of an interpreter that waits for a program, and the way of a program into it.
//!
//! The copy has its process, its streams and mostly its control group before anybody asks for it. It says "ready" with
//! its process id (which the kernel vouches for), and is sent one packet: from then on it is the program, and says that it cannot run, or that it has ended. If it is lost
//! before, the program is started in a fresh interpreter on the same streams.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use guest_agent::proto::Exec;
use guest_agent::proto::exited::Status;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, recvmsg, send,
    sendmsg, socketpair,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::cgroup::Cgroup;
use crate::epoll::Watched;
use crate::failure::Failure;
use crate::identity::Identity;
use crate::runners::Draft;
use crate::spawn::{self, Spawned, Theirs};
use crate::sys::Ended;

/// How long a copy may take to be ready before that is given up. Making one takes a second where a guest's kernel is emulated.
const PATIENCE: Duration = Duration::from_secs(20);

/// A pair of sockets for packets: ours, which does not block and tells who sends, and theirs.
///
/// # Errors
/// There are too many open files.
pub fn packet_sockets() -> Result<(Watched, OwnedFd), Errno> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    set_socket_passcred(&ours, true)?;
    // Who wants to be told who sends has a name (unix(7), `SO_PASSCRED`), and would get it when it sends first.
    bind(&ours, &SocketAddrUnix::new_unnamed())?;
    Ok((ours.into(), theirs))
}

/// Receives a packet and who sent it, if there is one. An empty one, or an error, is the end.
pub fn receive(socket: &Watched, room: &mut [u8]) -> Option<(usize, Option<Pid>)> {
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

/// The greatest number of an error (Linux, include/linux/err.h, `MAX_ERRNO`).
const ERRNO_MAX: i32 = 4095;

/// What a copy says.
enum Word {
    Nothing,
    Ready(Pid),
    /// The program cannot run: its directory, or else its file, is not to be had.
    No {
        is_directory: bool,
        errno: Errno,
        sender: Option<Pid>,
    },
    End(Ended),
    Gone,
}

fn word(socket: &Watched) -> Word {
    let mut room = [0; 512];
    match receive(socket, &mut room) {
        None => Word::Nothing,
        Some((count, sender)) => match (room.get(..count), sender) {
            (Some(b"ready"), Some(pid)) => Word::Ready(pid),
            (Some([b'n', b'o', what, errno @ ..]), sender) => {
                let errno = errno.try_into().map_or(0, i32::from_ne_bytes);
                Word::No {
                    is_directory: *what == b'd',
                    errno: Errno::from_raw_os_error(errno.clamp(1, ERRNO_MAX)),
                    sender,
                }
            }
            (Some([b'e', b'n', b'd', status, usage @ ..]), Some(pid)) => {
                Word::End(ended(pid, *status, usage))
            }
            _ => Word::Gone,
        },
    }
}

/// How a process ended that says so itself: its status, and what it used, as two `struct rusage`, its own and its children's.
fn ended(pid: Pid, status: u8, usage: &[u8]) -> Ended {
    /// In `struct rusage`: seconds and microseconds in user mode, the same in the kernel, kibibytes.
    const FIELDS: usize = 5;
    const RUSAGE: usize = 144;
    let mut fields = [[0; FIELDS]; 2];
    for (fields, rusage) in fields.iter_mut().zip(usage.chunks(RUSAGE)) {
        for (field, bytes) in fields.iter_mut().zip(rusage.chunks_exact(size_of::<u64>())) {
            *field = bytes.try_into().map_or(0, u64::from_ne_bytes);
        }
    }
    let time =
        |[seconds, micros]: [u64; 2]| seconds.saturating_mul(1_000_000).saturating_add(micros);
    let times = |at: fn(&[u64; FIELDS]) -> [u64; 2]| {
        let times = fields.iter().map(|fields| time(at(fields)));
        times.fold(0, u64::saturating_add)
    };
    Ended {
        pid,
        status: Status::Code(status.into()),
        user_us: times(|&[seconds, micros, ..]| [seconds, micros]),
        system_us: times(|&[_, _, seconds, micros, _]| [seconds, micros]),
        peak_bytes: fields
            .iter()
            .map(|[.., peak]| peak.saturating_mul(1024))
            .max()
            .unwrap_or(0),
    }
}

/// A copy that nobody has asked for yet.
pub struct Standby {
    socket: Watched,
    /// Known once it is ready.
    pid: Option<Pid>,
    /// Our ends of its streams.
    spawned: Spawned,
    theirs: Theirs,
    /// Made, and the copy in it, once it is ready.
    pub cgroup: Option<Cgroup>,
    /// A file for the source of its program, likewise.
    pub draft: Option<Draft>,
}

impl Standby {
    /// Asks the interpreter behind `control` for a copy.
    ///
    /// # Errors
    /// There are too many open files, or the interpreter is gone or far behind.
    pub fn ask(control: &Watched, identity: Option<&Identity>) -> Result<Self, Failure> {
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
            draft: None,
        })
    }

    /// Readable when the copy has something to say.
    pub fn socket(&self) -> &Watched {
        &self.socket
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
            Word::Ready(_) | Word::No { .. } | Word::End(_) | Word::Gone => false,
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
            state: State::Waiting,
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
    socket: Watched,
    pid: Option<Pid>,
    theirs: Theirs,
    packet: Vec<u8>,
    exec: Exec,
    identity: Option<Identity>,
    /// When a fresh interpreter is started instead.
    pub give_up: Option<Instant>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The copy is not ready.
    Waiting,
    /// It has the program.
    Sent,
    /// It is lost.
    Failed,
}

impl Start {
    /// Readable when the copy has something to say.
    pub fn socket(&self) -> &Watched {
        &self.socket
    }

    /// The copy's process id, once it is ready.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Whether it cannot come to run there.
    pub fn has_failed(&self) -> bool {
        self.state == State::Failed
    }

    /// It shall not run there.
    pub fn give_up(&mut self) {
        self.give_up = None;
        if let Some(pid) = self.pid {
            let _ = kill_process(pid, Signal::KILL);
        }
        self.state = State::Failed;
    }

    /// The copy has ended, and its process id is another's from now on.
    pub fn lost(&mut self) {
        self.state = State::Failed;
        self.pid = None;
    }

    fn send(&mut self, cgroup: Option<&Cgroup>) {
        let adopted = match (self.pid, cgroup) {
            (Some(pid), Some(cgroup)) => cgroup.adopt(pid).is_ok(),
            _ => true,
        };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        self.state = match adopted && send(&self.socket, &self.packet, flags).is_ok() {
            true => State::Sent,
            false => State::Failed,
        };
        self.packet = Vec::new();
    }

    /// Hears what a copy says that was not ready; gives its process id once it has the program.
    pub fn advance(&mut self, cgroup: Option<&Cgroup>) -> Option<Pid> {
        if self.state == State::Waiting {
            match word(&self.socket) {
                Word::Nothing => {}
                Word::Ready(pid) => {
                    self.pid = Some(pid);
                    self.send(cgroup);
                }
                // It ends by itself, or when it finds nobody at its socket.
                Word::No { .. } | Word::End(_) | Word::Gone => self.state = State::Failed,
            }
        }
        self.pid.filter(|_| self.state == State::Sent)
    }

    /// What is left once the copy runs the program.
    pub fn into_copy(self) -> Copy {
        Copy {
            socket: self.socket,
            cwd: self.exec.cwd,
            settled_at: Instant::now() + SETTLED_AFTER,
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

/// How long a copy is left alone to become its program: a signal would meet it unprepared.
const SETTLED_AFTER: Duration = Duration::from_millis(200);

/// A copy that runs a program. It says when that is over, before its process has ended: clearing the memory is
/// most of a short program's work where a guest's kernel is emulated.
pub struct Copy {
    socket: Watched,
    /// Where its program was to run.
    cwd: Vec<u8>,
    settled_at: Instant,
}

/// What a copy that runs says.
pub enum Tidings {
    /// Nothing yet.
    None,
    /// The program cannot run, and why.
    Failed(Failure),
    /// The program is over.
    Ended(Ended),
    /// Nothing any more: the end is that of its process.
    Last,
}

impl Copy {
    /// Readable when it has something to say.
    pub fn socket(&self) -> &Watched {
        &self.socket
    }

    /// When it surely is its program.
    pub fn settled_at(&self) -> Instant {
        self.settled_at
    }

    /// It is its program.
    pub fn settle(&mut self) {
        self.settled_at = self.settled_at.min(Instant::now());
    }

    /// Hears what it says. The program may say it as well: then it has chosen its own end.
    pub fn hear(&self, pid: Pid) -> Tidings {
        match word(&self.socket) {
            Word::Nothing => Tidings::None,
            Word::No {
                is_directory,
                errno,
                sender,
            } if sender == Some(pid) => Tidings::Failed(match is_directory {
                true => spawn::bad_directory(&self.cwd, errno),
                false => Failure::internal("the program's file", errno),
            }),
            Word::End(ended) if ended.pid == pid => Tidings::Ended(ended),
            // Of a process that the program has forked, for one.
            Word::Ready(_) | Word::No { .. } | Word::End(_) => Tidings::None,
            Word::Gone => Tidings::Last,
        }
    }
}
