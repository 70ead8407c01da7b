//! Positional vectored file I/O straight to and from guest memory: preadv(2) and pwritev(2).
//!
//! A `VolatileSlice` may change under us at any time, so it can never become a Rust slice; only the
//! kernel may be given its address.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::bus_error::wait_where_lost;

/// Most pieces of one call (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// Reads at `offset` into up to [`MAX_PIECES`] of `slices`; returns the number of bytes, 0 at the end
/// of the file.
pub fn read_at<B: BitmapSlice>(
    file: &File,
    slices: &[VolatileSlice<B>],
    offset: u64,
) -> io::Result<usize> {
    let offset = to_off_t(offset)?;
    let slices = &slices[..slices.len().min(MAX_PIECES)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    // SAFETY: Every piece is the memory of a volatile slice, valid for writes of its length while its
    // guard lives, and nobody holds a Rust reference to it. The count is that of the vector.
    let done = unsafe { libc::preadv64(file.as_raw_fd(), pieces.as_ptr(), count(&pieces), offset) };
    let done = transferred(done, slices)?;
    let mut left = done;
    for slice in slices {
        let len = slice.len().min(left);
        slice.bitmap().mark_dirty(0, len);
        left -= len;
    }
    Ok(done)
}

/// Writes up to [`MAX_PIECES`] of `slices` at `offset`; returns the number of bytes.
pub fn write_at<B: BitmapSlice>(
    file: &File,
    slices: &[VolatileSlice<B>],
    offset: u64,
) -> io::Result<usize> {
    let offset = to_off_t(offset)?;
    let slices = &slices[..slices.len().min(MAX_PIECES)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    // SAFETY: Every piece is the memory of a volatile slice, valid for reads of its length while its
    // guard lives, and pwritev does not write to it. The count is that of the vector.
    let done =
        unsafe { libc::pwritev64(file.as_raw_fd(), pieces.as_ptr(), count(&pieces), offset) };
    transferred(done, slices)
}

/// What a call that was to transfer `slices` has returned.
fn transferred<B: BitmapSlice>(done: isize, slices: &[VolatileSlice<B>]) -> io::Result<usize> {
    usize::try_from(done)
        .map_err(|_| io::Error::last_os_error())
        .inspect_err(|error| wait_where_lost(error, slices))
}

fn count(pieces: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(pieces.len()).unwrap_or(0)
}

fn to_off_t(offset: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn moves_bytes_at_an_offset_in_pieces() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        let (mut a, mut b) = (*b"....", *b"....");
        let slices = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
        ];
        assert_eq!(read_at(&file, &slices, 4).unwrap(), 6);
        assert_eq!(write_at(&file, &slices, 0).unwrap(), 8);
        assert_eq!((&a, &b), (b"4567", b"89.."));
        let mut all = [0; 10];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(&all, b"456789..89");
    }

    #[test]
    fn the_end_of_the_file_and_bad_offsets_are_no_surprise() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = [0; 4];
        let slices = [VolatileSlice::from(&mut bytes[..])];
        assert_eq!(read_at(&file, &slices, 1 << 40).unwrap(), 0);
        assert_eq!(read_at::<()>(&file, &[], 0).unwrap(), 0);
        assert!(read_at(&file, &slices, u64::MAX).is_err());
        assert!(write_at(&file, &slices, u64::MAX).is_err());
    }
}
