//! The system calls that no safe library offers: starting processes, and reaping them.
//!
//! The agent has exactly one thread. That is what makes a forked copy of it usable, and
//! what a child that shares its memory relies on: while that child runs, the agent does not.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};

use guest_agent::proto::exited::Status;
use nix::libc;
use rustix::io::Errno;
use rustix::process::Pid;

/// The stack of a child that shares the agent's memory.
const STACK: usize = 64 * 1024;

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

fn pid_of(raw: i64) -> Result<Option<Pid>, Errno> {
    match i32::try_from(raw).map_err(|_| Errno::RANGE)? {
        negative @ ..=-1 => Err(Errno::from_raw_os_error(negative.saturating_neg())),
        pid => Ok(Pid::from_raw(pid)),
    }
}

fn arguments(flags: i32, cgroup: Option<BorrowedFd<'_>>) -> libc::clone_args {
    // SAFETY: a structure of integers, for which zero means "nothing".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags.unsigned_abs());
    arguments.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    if let Some(cgroup) = cgroup {
        // CLONE_INTO_CGROUP is wider than libc's type for it.
        arguments.flags |= 0x2_0000_0000;
        arguments.cgroup = cgroup.as_raw_fd().unsigned_abs().into();
    }
    arguments
}

/// Starts a copy of the agent, in `cgroup` from its first moment, which runs `child` and ends with
/// what that returns. No descriptor but 0, 1 and 2 survives, if `child` calls [`close_others`].
///
/// # Errors
/// Those of clone3(2).
pub fn fork(cgroup: Option<BorrowedFd<'_>>, child: impl FnOnce() -> u8) -> Result<Pid, Errno> {
    let arguments = arguments(0, cgroup);
    // SAFETY: a fork: the child has a copy of everything, including this stack. Only this one
    // thread exists, so no lock is held by one that the child lacks.
    let raw = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    };
    if raw < 0 {
        return Err(last_errno());
    }
    if let Some(pid) = pid_of(raw)? {
        return Ok(pid);
    }
    let status = child();
    // SAFETY: ends this process without running what the agent has registered for its end.
    unsafe { libc::_exit(status.into()) }
}

/// Starts a process, in `cgroup` from its first moment, that shares the agent's memory until it
/// executes a program or ends; the agent sleeps meanwhile. `child` executes a program, or leaves
/// word of why it could not in what it captures. It must not keep memory that it allocates.
///
/// # Errors
/// Those of clone3(2).
pub fn vfork(cgroup: Option<BorrowedFd<'_>>, child: &mut dyn FnMut()) -> Result<Pid, Errno> {
    extern "C" fn enter(child: *mut c_void) -> ! {
        // SAFETY: `vfork` below passes a pointer to its own reference, which outlives the child.
        let child = unsafe { &mut *child.cast::<&mut dyn FnMut()>() };
        child();
        // SAFETY: ends the child alone.
        unsafe { libc::_exit(127) }
    }

    let mut child: &mut dyn FnMut() = child;
    let mut stack = Vec::<u128>::with_capacity(STACK / size_of::<u128>());
    let mut arguments = arguments(libc::CLONE_VM | libc::CLONE_VFORK, cgroup);
    arguments.stack = stack.as_mut_ptr().expose_provenance() as u64;
    arguments.stack_size = STACK as u64;
    let raw: i64;
    // SAFETY: the child starts on its own stack, which lives until this function ends, and that is
    // after the child has let go of our memory (CLONE_VFORK). It never returns from `enter`. The
    // kernel keeps all registers but rax, rcx and r11; its stack's end is aligned to 16 bytes.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => raw,
            in("rdi") &raw mut arguments,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") &raw mut child,
            in("r13") enter as extern "C" fn(*mut c_void) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    pid_of(raw)?.ok_or(Errno::INVAL)
}

/// What execve(2) wants: everything is allocated before there is a child.
pub struct Image {
    /// The program's file, or the candidates for it.
    pub paths: Vec<CString>,
    argv: Vec<CString>,
    envp: Vec<CString>,
    argv_pointers: Vec<*const c_char>,
    envp_pointers: Vec<*const c_char>,
}

impl Image {
    /// A program with its arguments and environment.
    pub fn new(paths: Vec<CString>, argv: Vec<CString>, envp: Vec<CString>) -> Self {
        let pointers = |texts: &[CString]| {
            let texts = texts.iter().map(|text| text.as_ptr());
            texts.chain([std::ptr::null()]).collect()
        };
        let (argv_pointers, envp_pointers) = (pointers(&argv), pointers(&envp));
        Self {
            paths,
            argv,
            envp,
            argv_pointers,
            envp_pointers,
        }
    }

    /// Executes it; comes back only with an error.
    pub fn execute(&self, path: &CStr) -> Errno {
        debug_assert!(self.argv.len() < self.argv_pointers.len());
        debug_assert!(self.envp.len() < self.envp_pointers.len());
        // SAFETY: both lists end with a null pointer and point to strings that `self` owns and
        // that nobody changes.
        unsafe {
            libc::execve(
                path.as_ptr(),
                self.argv_pointers.as_ptr(),
                self.envp_pointers.as_ptr(),
            )
        };
        last_errno()
    }
}

/// Gives SIGPIPE its usual meaning, which Rust takes from it, and those that a shell takes from what runs in its background; lets every signal through.
pub fn usual_signals() {
    // SAFETY: no handler is involved, and the mask is a valid, empty one.
    unsafe {
        for signal in [libc::SIGPIPE, libc::SIGINT, libc::SIGQUIT] {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut mask = std::mem::zeroed();
        libc::sigemptyset(&raw mut mask);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut());
    }
}

/// Makes the kernel's random numbers depend on `bytes`, which count as random in full, from now on. `device` is
/// /dev/urandom or /dev/random, opened in any way.
///
/// # Errors
/// Those of random(4); `EINVAL` for more bytes than fit in a request.
pub fn reseed(device: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    // From <linux/random.h>.
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

    let size = i32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
    let bits = size.checked_mul(8).ok_or(Errno::INVAL)?;
    // struct rand_pool_info: how many random bits, how many bytes, the bytes.
    let mut info = Vec::with_capacity(8 + bytes.len());
    info.extend(bits.to_ne_bytes());
    info.extend(size.to_ne_bytes());
    info.extend(bytes);
    // SAFETY: the kernel reads the two numbers and as many bytes as the second says, all of them in `info`.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) } < 0 {
        return Err(last_errno());
    }
    // Until then the generators go on with what they were seeded with before.
    // SAFETY: this one takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } < 0 {
        return Err(last_errno());
    }
    Ok(())
}

/// Has this process go before others that want the processor, and what it starts be as others are.
///
/// # Errors
/// Those of sched_setattr(2).
pub fn go_first() -> Result<(), Errno> {
    // SAFETY: a structure of integers, for which zero is the usual policy.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = size_of::<libc::sched_attr>().try_into().unwrap_or(0);
    attributes.sched_flags = libc::SCHED_FLAG_RESET_ON_FORK.unsigned_abs().into();
    attributes.sched_nice = -20;
    // SAFETY: the kernel reads the structure, of the size that it says.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result < 0 {
        return Err(last_errno());
    }
    Ok(())
}

/// Closes every descriptor but 0, 1, 2 and those in `kept`: for a copy of the agent alone, which never comes back
/// to what owns them.
pub fn close_others(kept: &[BorrowedFd<'_>]) {
    let mut kept: Vec<_> = kept
        .iter()
        .filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok())
        .collect();
    kept.sort_unstable();
    let mut first = 3_u32;
    for end in kept.into_iter().chain([u32::MAX]) {
        let last = if end == u32::MAX { end } else { end - 1 };
        if first <= last {
            // SAFETY: nothing that runs in the copy uses them again: `fork`'s child ends by _exit.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) };
        }
        first = first.max(end.saturating_add(1));
    }
}

/// Has a pipe refer to `bytes` where they are, as far as it has room; says how many it took. What the reader
/// finds is what they are when it reads.
///
/// # Errors
/// Those of vmsplice(2).
pub fn lend(pipe: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    let slice = [IoSlice::new(bytes)];
    // SAFETY: `IoSlice` is a `struct iovec`, and the kernel only reads what it names. The pages live
    // for as long as the pipe refers to them, whatever becomes of our mapping.
    let taken = unsafe {
        libc::vmsplice(
            pipe.as_raw_fd(),
            slice.as_ptr().cast(),
            slice.len(),
            libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(taken).map_err(|_| last_errno())
}

/// A child that has ended.
pub struct Ended {
    /// Its process id.
    pub pid: Pid,
    /// How.
    pub status: Status,
    /// Its processor time in user mode, and that of the children it waited for, in microseconds.
    pub user_us: u64,
    /// Likewise in the kernel.
    pub system_us: u64,
    /// The most memory that one of them had, in bytes.
    pub peak_bytes: u64,
}

/// Reaps a child that has ended, if there is one.
pub fn reap() -> Option<Ended> {
    let mut raw = 0;
    // SAFETY: a structure of integers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to locals that outlive the call.
    let pid = unsafe { libc::wait4(-1, &raw mut raw, libc::WNOHANG, &raw mut usage) };
    let pid = Pid::from_raw(pid.max(0))?;
    let status = if libc::WIFEXITED(raw) {
        Status::Code(libc::WEXITSTATUS(raw).unsigned_abs())
    } else {
        Status::Signal(libc::WTERMSIG(raw).unsigned_abs())
    };
    let micros = |time: libc::timeval| {
        let (seconds, micros) = (time.tv_sec.unsigned_abs(), time.tv_usec.unsigned_abs());
        seconds.saturating_mul(1_000_000).saturating_add(micros)
    };
    Some(Ended {
        pid,
        status,
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
        peak_bytes: usage.ru_maxrss.unsigned_abs().saturating_mul(1024),
    })
}
