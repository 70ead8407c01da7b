//! The lane's memory, mapped: words, bytes of the rings, and the doorbell.
//!
//! The host writes to it at any time. So nothing here makes a reference to its bytes: words are atomic, and the bytes of a ring are copied
//! by who owns them at that moment, which the indices say. Every access is checked to lie in the mapping.
#![allow(unsafe_code)]

use std::fs::File;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::AtomicU32;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::epoll::Watched;

/// Bytes of the window.
const BYTES: usize = 64 * 1024;
/// Bytes of the page of registers behind it.
const REGISTERS: usize = 4096;
/// Where the doorbell is in that page.
const DOORBELL: usize = 0x10;

/// The memory of an open lane.
pub struct Window {
    device: Watched<File>,
    start: NonNull<u8>,
}

impl Window {
    /// Maps the memory of `device`.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn map(device: File) -> Result<Self, Errno> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, at an address that the kernel chooses: it takes nobody's memory.
        let start = unsafe { mmap(null_mut(), BYTES + REGISTERS, prot, flags, &device, 0)? };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self {
            device: device.into(),
            start,
        })
    }

    /// What it is the memory of.
    pub fn device(&self) -> &Watched<File> {
        &self.device
    }

    /// A word of the window.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset < BYTES);
        // SAFETY: it lies in the mapping, which lives as long as `self`, is aligned, as the mapping is to pages, and whoever else has the memory,
        // the host, uses it as an atomic as well.
        unsafe { AtomicU32::from_ptr(self.start.add(offset).cast().as_ptr()) }
    }

    /// Copies bytes of the window, which are this side's for now.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset <= BYTES && into.len() <= BYTES - offset);
        // SAFETY: both are as long as is copied, and do not overlap: nobody but this type has a pointer into the mapping. A host that
        // breaks the rules changes bytes meanwhile, which have no invalid values.
        unsafe {
            self.start
                .add(offset)
                .copy_to_nonoverlapping(NonNull::from(&mut *into).cast(), into.len());
        }
    }

    /// Writes bytes of the window, which are this side's for now.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= BYTES && bytes.len() <= BYTES - offset);
        // SAFETY: as in `read`.
        unsafe {
            self.start
                .add(offset)
                .copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len());
        }
    }

    /// Has the host look at the rings.
    pub fn ring_doorbell(&self) {
        // SAFETY: the register lies in the mapping, behind the window, and is aligned. To write it has no effect on this process's memory.
        unsafe {
            self.start
                .add(BYTES + DOORBELL)
                .cast::<u32>()
                .write_volatile(1);
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping is this type's, whose references into it do not outlive it.
        // It fails for no mapping that exists.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), BYTES + REGISTERS) };
    }
}
