//! A whole file mapped for a guest to read, followed by zeroes up to a size that the guest can use.
//!
//! Invariant: nothing in this process reads or writes through the mapping. KVM does so on the guest's behalf, in the
//! kernel, so a file that is truncated under the mapping raises no SIGBUS here: a page that is gone makes KVM_RUN fail,
//! which ends the VM with a message. The mapping shares the host's page cache: every guest with the same file has the same pages.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A mapping; it goes when it is dropped, and so does the file with its lock.
#[derive(Debug)]
pub struct FileMapping {
    address: usize,
    len: usize,
    _file: File,
}

impl FileMapping {
    /// Maps all of `file`, a regular file or a block device, and zeroes from its end to the next multiple of `granule`.
    ///
    /// An empty file is [`io::ErrorKind::InvalidInput`].
    pub fn new(mut file: File, granule: usize) -> io::Result<Self> {
        let file_len = usize::try_from(file.seek(SeekFrom::End(0))?);
        let file_len = file_len.ok().filter(|&len| len > 0);
        let len = file_len.and_then(|len| len.checked_next_multiple_of(granule));
        let (Some(file_len), Some(len)) = (file_len, len) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is empty, or larger than memory can be",
            ));
        };
        let (read, zeroes) = (ProtFlags::READ, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, read, zeroes)? };
        let mapping = Self {
            address: start as usize,
            len,
            _file: file,
        };
        let over = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces the front of the mapping that was just made, to which nothing refers yet.
        unsafe { mmap(start, file_len, read, over, &mapping._file, 0)? };
        Ok(mapping)
    }

    /// Where it is in this process.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Its length in bytes, a multiple of the granule.
    pub fn size(&self) -> usize {
        self.len
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, whole; whoever shows it to a VM drops that first.
        let _ = unsafe { munmap(self.address as *mut _, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// The mapping as a process that may touch it would see it.
    fn bytes(mapping: &FileMapping) -> &[u8] {
        // SAFETY: mapped and readable for as long as `mapping` lives; no test writes meanwhile.
        unsafe { std::slice::from_raw_parts(mapping.address as *const u8, mapping.len) }
    }

    #[test]
    fn a_file_ends_in_zeroes() {
        for len in [1u64, 4095, 4096, 4097, 0x1_0000] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            file.write_all_at(&[7], 0).unwrap();
            file.write_all_at(&[9], len - 1).unwrap();
            let mapping = FileMapping::new(file, 0x1_0000).unwrap();
            assert_eq!(mapping.size(), 0x1_0000);
            let end = usize::try_from(len).unwrap();
            assert_eq!(bytes(&mapping)[end - 1], 9);
            assert!(bytes(&mapping)[end..].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn an_empty_file_is_refused() {
        let error = FileMapping::new(tempfile::tempfile().unwrap(), 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_lock_lasts_as_long_as_the_mapping() {
        use rustix::fs::{FlockOperation, flock};
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let file = File::open(image.path()).unwrap();
        flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
        let mapping = FileMapping::new(file, 4096).unwrap();
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        assert!(flock(image.as_file(), exclusive).is_err());
        drop(mapping);
        flock(image.as_file(), exclusive).unwrap();
    }
}
