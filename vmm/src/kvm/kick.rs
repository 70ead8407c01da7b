//! Makes a processor's thread leave KVM_RUN, whatever it is doing.
//!
//! A signal ends KVM_RUN only when it arrives inside it. So `immediate_exit` is set first: a thread that
//! is just about to enter then returns at once (Linux, Documentation/virt/kvm/api.rst, "KVM_RUN").

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// The second mapping of a processor's `kvm_run` page: its own, so that it may outlive the thread that runs.
pub struct Kick {
    run: NonNull<kvm_run>,
}

// SAFETY: the page is only touched through an atomic byte (`immediate_exit`), from any thread.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// Maps the page of `vcpu`.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; the size is that of the structure, which
        // KVM's mapping is never smaller than. Nothing else refers to it.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(page.cast())
            .map(|run| Self { run })
            .ok_or_else(io::Error::last_os_error)
    }

    /// Makes the next, or the present, KVM_RUN of `thread` return with EINTR.
    pub fn kick<T>(&self, thread: &JoinHandle<T>) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        // It fails only where the thread is gone already, and that is as good.
        let _ = thread.kill(SIGRTMIN());
    }

    /// Lets the thread enter the guest again. Only that thread calls this, and only where nobody wants it out any more.
    pub fn clear(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping lives as long as `self`; the byte is a field of it, and the kernel
        // reads it as a byte. All users in this process go through this atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, made in `new` with this size.
        unsafe { libc::munmap(self.run.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick's signal interrupt system calls instead of killing the process. Call once, before processors run.
pub fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), ignore).map_err(Into::into)
}
