//! Pages of a file laid over guest memory: mmap(2), private, at the same addresses.
//!
//! The guest sees the file's pages from the host's page cache until it writes to one, which then becomes its own copy: the file is never
//! changed. What the file must not do is change or shrink under the mapping: a snapshot's layers are written once and renamed
//! into place, and whoever takes one away does so by unlinking it.

use std::fs::File;
use std::io;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Lays `file` from `offset` on over `slice`; both are whole pages. What `slice` held is gone.
pub fn lay_over<B: BitmapSlice>(
    slice: &VolatileSlice<B>,
    file: &File,
    offset: u64,
) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the pages are those of a volatile slice, to which no Rust reference exists; they stay mapped, readable and
    // writable, for as long as they were.
    unsafe {
        mmap(
            guard.as_ptr().cast(),
            guard.len(),
            access,
            flags,
            file,
            offset,
        )?
    };
    Ok(())
}

/// Has `slice`, whole pages, be what is mapped there, without what was written to it since: the file's pages, or zeros.
pub fn drop_copies<B: BitmapSlice>(slice: &VolatileSlice<B>) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the pages are those of a volatile slice, to which no Rust reference exists; they stay mapped.
    unsafe { madvise(guard.as_ptr().cast(), guard.len(), Advice::LinuxDontNeed)? };
    Ok(())
}

/// Lays zeros over `slice`, whole pages. What it held is gone, files and all.
pub fn lay_zeros_over<B: BitmapSlice>(slice: &VolatileSlice<B>) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: as in `lay_over`.
    unsafe { mmap_anonymous(guard.as_ptr().cast(), guard.len(), access, flags)? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    #[test]
    fn a_page_is_the_files_until_it_is_written() {
        let memory = crate::memory::create(&[(0, 0x4000)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 0x3000], 0).unwrap();
        memory.write_slice(&[1; 0x4000], GuestAddress(0)).unwrap();
        let slice = memory.get_slice(GuestAddress(0x1000), 0x2000).unwrap();
        lay_over(&slice, &file, 0x1000).unwrap();
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            [byte(0xfff), byte(0x1000), byte(0x2fff), byte(0x3000)],
            [1, 7, 7, 1]
        );
        memory.write_obj(9u8, GuestAddress(0x1000)).unwrap();
        let mut in_file = [0];
        file.read_exact_at(&mut in_file, 0x1000).unwrap();
        assert_eq!((byte(0x1000), in_file), (9, [7]));
    }

    #[test]
    fn what_was_written_can_be_taken_back() {
        let memory = crate::memory::create(&[(0, 0x2000)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 0x1000], 0).unwrap();
        let all = memory.get_slice(GuestAddress(0), 0x2000).unwrap();
        lay_over(&all.subslice(0, 0x1000).unwrap(), &file, 0).unwrap();
        let bytes = || [0, 0x1000].map(|at| memory.read_obj::<u8>(GuestAddress(at)).unwrap());
        memory.write_slice(&[1; 0x2000], GuestAddress(0)).unwrap();
        assert_eq!(bytes(), [1, 1]);
        drop_copies(&all).unwrap();
        assert_eq!(bytes(), [7, 0]);
        memory.write_slice(&[1; 0x2000], GuestAddress(0)).unwrap();
        lay_zeros_over(&all).unwrap();
        assert_eq!(bytes(), [0, 0]);
    }
}
