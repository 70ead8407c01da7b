//! What a monitor may ask the host's kernel for: a seccomp filter (seccomp(2)) over all its threads, and no new privileges (`PR_SET_NO_NEW_PRIVS`).
//!
//! A guest that takes a monitor over has its user's files then, with the user's sockets and /proc among them, and the system calls below: no network of its own, no ptrace(2), no namespaces or
//! mounts, none of the kernel's larger interfaces (bpf, io_uring, perf, keys). A call that is not below fails as on a kernel that has no such call (`ENOSYS`), of which the C
//! library knows what to do; so does what the monitor starts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter, apply_filter_all_threads,
};

/// What monitors call, and what the C library may call for them in other versions.
const CALLS: &[c_long] = &[
    // Files.
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_ioctl,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_sync_file_range,
    libc::SYS_umask,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_write,
    libc::SYS_writev,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_munmap,
    libc::SYS_userfaultfd,
    // Sockets, and waiting.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // Processes, threads, signals, time.
    libc::SYS_arch_prctl,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fork,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpgid,
    libc::SYS_getpgrp,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_kill,
    libc::SYS_nanosleep,
    libc::SYS_pause,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setpgid,
    libc::SYS_setsid,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_time,
    libc::SYS_uname,
    libc::SYS_vfork,
    libc::SYS_wait4,
    libc::SYS_waitid,
];

/// Flags of clone(2) that make namespaces. Those of clone3(2) lie in memory, where no filter sees them: it is not allowed, and the C library goes back to the other.
const NAMESPACES: u64 = 0x7e02_0080;

/// That this process is confined.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// Whether this process is confined, and so what it starts.
pub fn is_confined() -> bool {
    CONFINED.load(Ordering::Relaxed)
}

/// The process that has started this one is confined, and so is this one.
pub fn inherit() {
    CONFINED.store(true, Ordering::Relaxed);
}

/// Confines this process for the rest of its life, unless it is already.
pub fn confine() -> Result<(), seccompiler::Error> {
    if !is_confined() {
        apply_filter_all_threads(&filter()?)?;
        inherit();
    }
    Ok(())
}

/// Whether a process can be confined here: tried on a thread that ends.
pub fn try_out() -> Result<(), seccompiler::Error> {
    let filter = filter()?;
    let thread = std::thread::spawn(move || apply_filter(&filter));
    thread.join().unwrap_or(Ok(()))
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let argument = |index, operator, value| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    let mut rules: BTreeMap<_, _> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        let unix = u64::from(libc::AF_UNIX.unsigned_abs());
        rules.insert(call, argument(0, SeccompCmpOp::Eq, unix)?);
    }
    // Of the thread that asks.
    for call in [
        libc::SYS_sched_getattr,
        libc::SYS_sched_setaffinity,
        libc::SYS_sched_setattr,
    ] {
        rules.insert(call, argument(0, SeccompCmpOp::Eq, 0)?);
    }
    let no_namespaces = SeccompCmpOp::MaskedEq(NAMESPACES);
    rules.insert(libc::SYS_clone, argument(0, no_namespaces, 0)?);
    let nothing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(
        rules,
        nothing,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?
    .try_into()
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use rustix::net::{AddressFamily, SocketType, socket};
    use rustix::thread::{sched_getaffinity, sched_setaffinity};

    use super::*;

    #[test]
    fn what_is_not_needed_is_not_there() {
        // Of this thread alone, and what it starts.
        let confined = std::thread::spawn(|| {
            apply_filter(&filter().unwrap()).unwrap();
            let gone = Some(libc::ENOSYS);
            let error = TcpStream::connect("127.0.0.1:9").unwrap_err();
            assert_eq!(error.raw_os_error(), gone);
            let error = socket(AddressFamily::NETLINK, SocketType::RAW, None).unwrap_err();
            assert_eq!(Some(error.raw_os_error()), gone);
            let all = sched_getaffinity(None).unwrap();
            sched_setaffinity(None, &all).unwrap();
            let error = sched_setaffinity(rustix::process::getppid(), &all).unwrap_err();
            assert_eq!(Some(error.raw_os_error()), gone);
            // What a program finds that is started from here.
            let output = Command::new("unshare").args(["--user", "true"]).output();
            let said = String::from_utf8_lossy(&output.unwrap().stderr).into_owned();
            assert!(said.contains("not implemented"), "{said}");

            UnixStream::pair().unwrap();
            let file = tempfile::tempfile().unwrap();
            file.set_len(1).unwrap();
            let threads = std::thread::spawn(|| 7);
            assert_eq!(threads.join().unwrap(), 7);
        });
        confined.join().unwrap();
    }
}
