//! Mapped guest memory whose file has lost its pages, or whose host has: SIGBUS.
//!
//! Whoever touches such a page, while its guest runs, waits for good: there is nothing to go on with. The handler writes down which page it was, makes an
//! eventfd readable, and never returns. While a machine is being made, where nobody watches that eventfd yet, the page becomes zeros, and
//! the machine must not run. Any other SIGBUS kills the process, as it would without the handler.
//!
//! Invariant: the handler is async-signal-safe. It reads a list that only grows, whose entries are never changed but by atomics and never
//! freed, and otherwise makes system calls alone.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use rustix::io::Errno;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

const PAGE: usize = 4096;

/// The first of the list.
static WATCHED: AtomicPtr<Watched> = AtomicPtr::new(ptr::null_mut());

/// An entry of the list.
struct Watched {
    /// Addresses.
    memory: Vec<Range<usize>>,
    event: OwnedFd,
    /// Somebody watches by it. One that nobody does is for the next who watches the same memory.
    taken: AtomicBool,
    /// It counts: false once the memory may be gone.
    active: AtomicBool,
    guest_runs: AtomicBool,
    /// The first address that was touched in vain; 0 before.
    lost: AtomicUsize,
    next: AtomicPtr<Self>,
}

/// Guest memory that is watched for lost pages, until this is dropped.
pub struct BusErrors(&'static Watched);

impl BusErrors {
    /// Watches `memory`, ranges of addresses of guest memory and of nothing else. `event`, an eventfd, will be readable once a page is lost to a
    /// guest that runs. The entry is not freed at the end, but used again: a process has one guest, whose memory may be exchanged often.
    pub fn watch(memory: Vec<Range<usize>>, event: BorrowedFd<'_>) -> io::Result<Self> {
        static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
        INSTALLED
            .get_or_init(install)
            .map_err(io::Error::from_raw_os_error)?;
        let free =
            |entry: &&Watched| entry.memory == memory && !entry.taken.swap(true, Ordering::SeqCst);
        if let Some(entry) = entries().find(free) {
            entry.watch_again(event)?;
            return Ok(Self(entry));
        }
        // Never freed, see above.
        let watched: &'static Watched = Box::leak(Box::new(Watched {
            memory,
            event: event.try_clone_to_owned()?,
            taken: AtomicBool::new(true),
            active: AtomicBool::new(true),
            guest_runs: AtomicBool::new(false),
            lost: AtomicUsize::new(0),
            next: AtomicPtr::default(),
        }));
        // Entries are never taken out, so a head that is the same is the same entry.
        let entry = ptr::from_ref(watched).cast_mut();
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        let added = WATCHED.fetch_update(success, failure, |head| {
            watched.next.store(head, Ordering::Release);
            Some(entry)
        });
        debug_assert!(added.is_ok());
        Ok(Self(watched))
    }

    /// From now on whoever touches a lost page waits for good.
    pub fn guest_starts(&self) {
        self.0.guest_runs.store(true, Ordering::SeqCst);
    }

    /// The address of the first page that was touched in vain.
    pub fn lost(&self) -> Option<u64> {
        let address = self.0.lost.load(Ordering::SeqCst);
        (address != 0).then_some(address as u64)
    }
}

impl Drop for BusErrors {
    fn drop(&mut self) {
        // Where somebody waits, the memory stays, and others may come to wait.
        if self.lost().is_none() {
            self.0.active.store(false, Ordering::SeqCst);
            self.0.taken.store(false, Ordering::SeqCst);
        }
    }
}

/// All entries.
fn entries() -> impl Iterator<Item = &'static Watched> {
    let next = |at: &AtomicPtr<Watched>| {
        // SAFETY: entries are never freed.
        unsafe { at.load(Ordering::Acquire).as_ref() }
    };
    std::iter::successors(next(&WATCHED), move |entry| next(&entry.next))
}

impl Watched {
    /// Makes an entry that was just taken, and had no page lost, as new.
    fn watch_again(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        let (new, own) = (event.as_raw_fd(), self.event.as_raw_fd());
        // SAFETY: both are open, and the second stays so, as the same number: a handler that writes to it always has an eventfd there.
        if unsafe { libc::dup3(new, own, libc::O_CLOEXEC) } < 0 {
            let error = io::Error::last_os_error();
            self.taken.store(false, Ordering::SeqCst);
            return Err(error);
        }
        self.guest_runs.store(false, Ordering::SeqCst);
        self.active.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn has(&self, address: usize) -> bool {
        self.active.load(Ordering::SeqCst)
            && self.memory.iter().any(|range| range.contains(&address))
    }

    /// Called by the handler. True where who touched `address` may go on.
    fn lose(&self, address: usize) -> bool {
        let order = Ordering::SeqCst;
        let _ = self.lost.compare_exchange(0, address, order, order);
        if !self.guest_runs.load(order) {
            return put_zeros(address);
        }
        let one = 1u64.to_ne_bytes();
        // SAFETY: the descriptor is the entry's own, the bytes are eight. It fails only where the counter is full, and then it is readable.
        unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        loop {
            // SAFETY: it touches nothing.
            unsafe { libc::pause() };
        }
    }
}

/// Maps zeros in place of the page that `address`, of guest memory, is in.
fn put_zeros(address: usize) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let start = (address & !(PAGE - 1)) as *mut libc::c_void;
    // SAFETY: a page of guest memory, to which no Rust reference exists, stays mapped, readable and writable.
    let put = unsafe { libc::mmap(start, PAGE, access, flags, -1, 0) };
    put != libc::MAP_FAILED
}

fn install() -> Result<(), i32> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    // SAFETY: the action is plain data, filled in before it is used; the handler keeps to this file's invariant.
    let result = unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // Nothing else shall run on a stack that is left to itself.
        libc::sigfillset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut())
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives it, see SA_SIGINFO.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let mut next = WATCHED.load(Ordering::Acquire);
    // One that another process has sent has no address: its code is not above zero.
    while code > 0 && !next.is_null() {
        // SAFETY: what is in the list is a `&'static`.
        let watched = unsafe { &*next };
        if watched.has(address) && watched.lose(address) {
            return;
        }
        next = watched.next.load(Ordering::Acquire);
    }
    // SAFETY: both may be called in a handler. The signal is delivered as this returns.
    unsafe {
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
        libc::raise(libc::SIGBUS);
    }
}

/// Touches `slices` where the system said `error` of a call that it was to read or write them in. A system call that meets a lost page says EFAULT, and
/// then whoever made it waits here, instead of taking that for an error of what it worked on.
pub fn wait_where_lost<B: BitmapSlice>(error: &io::Error, slices: &[VolatileSlice<'_, B>]) {
    if Errno::from_io_error(error) != Some(Errno::FAULT) {
        return;
    }
    for slice in slices {
        for at in (0..slice.len())
            .step_by(PAGE)
            .chain(slice.len().checked_sub(1))
        {
            // In a slice there is nothing to fail.
            let _ = slice.read_obj::<u8>(at);
        }
    }
}
