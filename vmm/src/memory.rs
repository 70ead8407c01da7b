//! Guest memory: one memfd, mapped once, shown to KVM as one slot per range of RAM.
//!
//! It is file-backed so that later a snapshot or a branch can share or privately map its pages; nothing is
//! reserved or touched until the guest does.

use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The guest's physical memory.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Why guest memory could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The system gave no memory file of that size.
    #[error(
        "cannot make a memory file of {bytes} bytes: {source}; look at the limits of open files and file size (ulimit -n, -f)"
    )]
    Memfd {
        /// Size in bytes.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The system did not map it.
    #[error(
        "cannot map guest memory of {bytes} bytes: {why}; give less --memory, or raise the limit (ulimit -v)"
    )]
    Map {
        /// Size in bytes.
        bytes: u64,
        /// What was wrong.
        why: String,
    },
}

/// Makes memory for `ranges`, each (guest-physical start, bytes), ascending.
pub fn create(ranges: &[(u64, u64)]) -> Result<GuestMemory, MemoryError> {
    let bytes = ranges.iter().map(|(_, len)| len).sum();
    let map_error = |why: String| MemoryError::Map { bytes, why };
    let memfd = memfd_create("guest-memory", MemfdFlags::CLOEXEC)
        .and_then(|fd| ftruncate(&fd, bytes).map(|()| fd))
        .map_err(|errno| MemoryError::Memfd {
            bytes,
            source: errno.into(),
        })?;
    let file = Arc::new(std::fs::File::from(memfd));

    let mut offset = 0;
    let mut regions = Vec::with_capacity(ranges.len());
    for &(start, len) in ranges {
        let size = usize::try_from(len).map_err(|error| map_error(error.to_string()))?;
        let mapping = MmapRegionBuilder::new(size)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| map_error(error.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or_else(|| map_error("a range wraps around".to_owned()))?);
        offset += len;
    }
    GuestMemory::from_regions(regions).map_err(|error| map_error(error.to_string()))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::arch::x86_64::layout::{GAP_END, GAP_START, ram_ranges};

    #[test]
    fn ranges_do_not_share_pages() {
        let memory = create(&ram_ranges(GAP_START + (1 << 20))).unwrap();
        assert_eq!(memory.num_regions(), 2);
        memory.write_obj(1u64, GuestAddress(0)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(GAP_END)).unwrap(), 0);
        assert!(memory.write_obj(1u64, GuestAddress(GAP_START)).is_err());
        memory
            .write_obj(1u8, GuestAddress(GAP_END + (1 << 20) - 1))
            .unwrap();
    }
}
