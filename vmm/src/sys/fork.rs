//! A child process with a copy of this one's private memory as it is at this moment: fork(2).
//!
//! The copy is the host kernel's (copy-on-write): nothing is copied until one of both sides writes. The child has one thread, the one that
//! called. Invariant: it takes no lock that another thread may have held, so it does not log, and it never returns into the
//! caller's code: it leaves by `_exit`. Allocating is all right: the C library makes its allocator usable in a child.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

/// A forked child, which is killed and reaped when this is dropped.
#[derive(Debug)]
pub struct Child {
    pidfd: OwnedFd,
    ended: bool,
}

/// Says that this process is a child, alone with its copy of memory.
pub struct Frozen(());

impl Frozen {
    /// The bytes of a piece of private guest memory.
    pub fn bytes<'a, B: BitmapSlice>(&'a self, slice: &'a VolatileSlice<'_, B>) -> &'a [u8] {
        let guard = slice.ptr_guard();
        // SAFETY: the memory is mapped for as long as the slice lives. It is this process's own copy, in which no processor runs and no other
        // thread exists; and this thread writes to no guest memory while it has the only `Frozen`.
        unsafe { std::slice::from_raw_parts(guard.as_ptr(), guard.len()) }
    }
}

impl Child {
    /// Forks. The child closes every descriptor but `keep`, is killed when this thread dies, and ends with what `body` returns;
    /// its signals are blocked. In between it must keep to this file's invariant.
    pub fn fork(keep: &[BorrowedFd<'_>], body: impl FnOnce(&Frozen) -> u8) -> io::Result<Self> {
        let mut kept: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
        kept.sort_unstable();
        let parent = rustix::process::getpid();
        // SAFETY: the child runs `body` alone and leaves by `_exit`, see above.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            become_child(&kept, parent);
            exit(body(&Frozen(())))
        }
        // -1 is a failure here, and as the number of a process it is all of them.
        let pid = Pid::from_raw(pid.max(0)).ok_or_else(io::Error::last_os_error)?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self {
                pidfd,
                ended: false,
            }),
            Err(errno) => {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                Err(errno.into())
            }
        }
    }

    /// Waits for its end: its exit status, or `None` where a signal killed it.
    pub fn wait(mut self) -> io::Result<Option<i32>> {
        self.reap()
    }

    /// Ends it, and waits for that on a thread: to take the memory of a large one down takes milliseconds.
    pub fn end_aside(self) {
        // Where there is no thread to be had, its closure is dropped here.
        let _ = std::thread::Builder::new().spawn(|| drop(self));
    }

    fn reap(&mut self) -> io::Result<Option<i32>> {
        use std::os::fd::AsFd;
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Ok(status) => {
                    self.ended = true;
                    return Ok(status.and_then(|status| status.exit_status()));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            use rustix::process::{Signal, pidfd_send_signal};
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            let _ = self.reap();
        }
    }
}

/// Ends the child without running anything of the parent's.
fn exit(status: u8) -> ! {
    // SAFETY: it does not return, and runs no code of this process.
    unsafe { libc::_exit(status.into()) }
}

/// What the child does before its work. A failure ends it.
fn become_child(kept: &[RawFd], parent: Pid) {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    // The message of a panic would take a lock.
    std::panic::set_hook(Box::new(|_| exit(u8::MAX)));
    // SAFETY: a signal set is plain data; the call reads it.
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
    let bound = set_parent_process_death_signal(Some(Signal::KILL));
    if bound.is_err() || getppid() != Some(parent) {
        exit(1);
    }
    let mut from: RawFd = 0;
    for &fd in kept {
        close_range(from, fd - 1);
        from = fd + 1;
    }
    close_range(from, RawFd::MAX);
}

/// Closes descriptors, so that no peer of the parent's sockets waits for the child's end.
fn close_range(from: RawFd, to: RawFd) {
    if let (Ok(from), Ok(to)) = (libc::c_uint::try_from(from), libc::c_uint::try_from(to))
        && from <= to
    {
        // SAFETY: nothing in the child uses these descriptors; it never drops what owns them.
        unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
    }
}
