//! userfaultfd: missing pages of guest memory are brought by a thread of ours.
//!
//! Invariant: only the memory of volatile slices is registered, to which no Rust reference exists. The kernel puts a page only where one is
//! missing and the memory is still registered, whatever address it is told: what is there is never overwritten, and what was unmapped
//! is registered no more. So filling is safe with any address.
//!
//! The registrations end with the descriptor, and who waits for a page then finds zeros. So the owner keeps it for as long as anybody may.
//!
//! Source: Linux, Documentation/admin-guide/mm/userfaultfd.rst and include/uapi/linux/userfaultfd.h.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// `_IO(0xAA, 0x00)`, of the device.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`.
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// `_IOWR(0xAA, 0x04, struct uffdio_zeropage)`.
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of a `struct uffd_msg`, and where a fault's address is in it.
const MESSAGE_BYTES: usize = 32;
const ADDRESS_AT: usize = 16;
/// Faults that are read at once.
const FAULTS_MAX: usize = 16;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdioCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    done: i64,
}

/// The `UFFD_FEATURE_*` bits that this host offers, or why this user may not have a userfaultfd.
pub fn features() -> io::Result<u64> {
    Userfaultfd::new().map(|uffd| uffd.features)
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    features: u64,
}

/// Where pages are missing that somebody waits for.
#[derive(Debug, Default)]
pub struct Faults {
    messages: [[u8; MESSAGE_BYTES]; FAULTS_MAX],
    count: usize,
}

impl Faults {
    /// The addresses, rounded down to pages by the kernel.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let messages = self.messages[..self.count].iter();
        messages
            .filter(|message| message[0] == UFFD_EVENT_PAGEFAULT)
            .filter_map(|message| message[ADDRESS_AT..].first_chunk().copied())
            .map(u64::from_ne_bytes)
    }
}

impl Userfaultfd {
    /// A new one that sees faults of the kernel's as well: those of KVM. By the system call, else by the device.
    pub fn new() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: a system call without pointers; its result is a new descriptor, or an error.
        let result = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = match take_fd(result) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                // What the system call said is what there is to know where the device is not for this user either.
                let device = File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/userfaultfd")
                    .map_err(|_| error)?;
                // SAFETY: the request takes its argument by value; its result is a new descriptor, or an error.
                let result = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
                take_fd(result.into())?
            }
            result => result?,
        };
        let mut api = UffdioApi {
            api: UFFD_API,
            ..Default::default()
        };
        // SAFETY: `api` has the layout that the request wants.
        unsafe { ioctl(fd.as_fd(), UFFDIO_API, &mut api)? };
        Ok(Self {
            fd,
            features: api.features,
        })
    }

    /// From now on whoever touches a missing page of `slice`, which is whole pages of private anonymous memory, waits until it is filled.
    pub fn register<B: BitmapSlice>(&self, slice: &VolatileSlice<B>) -> io::Result<()> {
        let guard = slice.ptr_guard_mut();
        let mut register = UffdioRegister {
            range: UffdioRange {
                start: guard.as_ptr() as u64,
                len: guard.len() as u64,
            },
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: `register` has the layout that the request wants. It changes no content, only who brings missing pages.
        unsafe { ioctl(self.fd.as_fd(), UFFDIO_REGISTER, &mut register) }.map_err(Into::into)
    }

    /// The faults that have come since the last call, as many as fit. None is [`Errno::AGAIN`].
    pub fn read(&self, faults: &mut Faults) -> Result<(), Errno> {
        faults.count = 0;
        let len = rustix::io::read(&self.fd, faults.messages.as_flattened_mut())?;
        faults.count = len / MESSAGE_BYTES;
        Ok(())
    }

    /// Puts `bytes`, whole pages, at `address`, and wakes who waits for them. Returns the length in bytes of what was put:
    /// it ends before a page that is there already. [`Errno::EXIST`] where that is the first.
    pub fn copy(&self, address: u64, bytes: &[u8]) -> Result<u64, Errno> {
        let mut copy = UffdioCopy {
            to: address,
            from: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode: 0,
            done: 0,
        };
        // SAFETY: `copy` has the layout that the request wants, and `bytes` may be read for as long as it takes; see above for the address.
        let result = unsafe { ioctl(self.fd.as_fd(), UFFDIO_COPY, &mut copy) };
        part_done(result, copy.done)
    }

    /// Like [`Userfaultfd::copy`], with `len` bytes of zeros, which take no memory until they are written to.
    pub fn zero(&self, address: u64, len: u64) -> Result<u64, Errno> {
        let range = UffdioRange {
            start: address,
            len,
        };
        let mut zeropage = UffdioZeropage {
            range,
            mode: 0,
            done: 0,
        };
        // SAFETY: `zeropage` has the layout that the request wants; see above for the address.
        let result = unsafe { ioctl(self.fd.as_fd(), UFFDIO_ZEROPAGE, &mut zeropage) };
        part_done(result, zeropage.done)
    }

    /// Has those who wait for pages in the `len` bytes from `address` look again.
    pub fn wake(&self, address: u64, len: u64) -> Result<(), Errno> {
        let mut range = UffdioRange {
            start: address,
            len,
        };
        // SAFETY: `range` has the layout that the request wants.
        unsafe { ioctl(self.fd.as_fd(), UFFDIO_WAKE, &mut range) }
    }
}

/// Readable where there are faults.
impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn take_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call that gave this result has just made the descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
///
/// `argument` has the layout that `request` wants, and addresses in it are those that `request` may read.
unsafe fn ioctl<T>(
    fd: BorrowedFd<'_>,
    request: libc::c_ulong,
    argument: &mut T,
) -> Result<(), Errno> {
    // SAFETY: the caller's promise; `argument` lives throughout the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) } < 0 {
        let errno = io::Error::last_os_error().raw_os_error();
        return Err(Errno::from_raw_os_error(errno.unwrap_or(libc::EIO)));
    }
    Ok(())
}

/// A request that was carried out in part has failed with EAGAIN, and says how far it came.
fn part_done(result: Result<(), Errno>, done: i64) -> Result<u64, Errno> {
    match (u64::try_from(done), result) {
        (Ok(done), _) if done > 0 => Ok(done),
        (_, Err(errno)) => Err(errno),
        _ => Err(Errno::AGAIN),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    #[test]
    fn what_is_there_is_never_overwritten() {
        let memory = crate::memory::create(&[(0, 0x6000)]).unwrap();
        let slice = memory.get_slice(GuestAddress(0), 0x5000).unwrap();
        let address = slice.ptr_guard().as_ptr() as u64;
        let uffd = Userfaultfd::new().unwrap();
        uffd.register(&slice).unwrap();
        assert_eq!(uffd.copy(address + 0x2000, &[2; 0x1000]), Ok(0x1000));
        assert_eq!(uffd.copy(address, &[1; 0x4000]), Ok(0x2000));
        assert_eq!(uffd.copy(address + 0x1000, &[3; 0x1000]), Err(Errno::EXIST));
        assert_eq!(uffd.zero(address + 0x2000, 0x1000), Err(Errno::EXIST));
        assert_eq!(uffd.zero(address + 0x3000, 0x1000), Ok(0x1000));
        assert_eq!(uffd.copy(address + 0x5000, &[9; 0x1000]), Err(Errno::NOENT));
        assert_eq!(uffd.read(&mut Faults::default()), Err(Errno::AGAIN));
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([0, 0x1000, 0x2000, 0x3000].map(byte), [1, 1, 2, 0]);
    }

    #[test]
    fn who_touches_a_missing_page_waits_for_it() {
        let memory = crate::memory::create(&[(0, 0x2000)]).unwrap();
        let slice = memory.get_slice(GuestAddress(0), 0x2000).unwrap();
        let address = slice.ptr_guard().as_ptr() as u64;
        let uffd = Userfaultfd::new().unwrap();
        uffd.register(&slice).unwrap();
        std::thread::scope(|scope| {
            let touch = scope.spawn(|| memory.read_obj::<u8>(GuestAddress(0x1234)).unwrap());
            let mut faults = Faults::default();
            while uffd.read(&mut faults) == Err(Errno::AGAIN) {
                std::thread::yield_now();
            }
            assert_eq!(faults.addresses().collect::<Vec<_>>(), [address + 0x1000]);
            uffd.wake(address + 0x1000, 0x1000).unwrap();
            uffd.copy(address + 0x1000, &[7; 0x1000]).unwrap();
            assert_eq!(touch.join().unwrap(), 7);
        });
    }
}
