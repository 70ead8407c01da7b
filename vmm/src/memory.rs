//! Guest memory: private anonymous pages, shown to KVM as one slot per range of RAM.
//!
//! Private, so that a fork of this process has the memory of one moment, which is how a snapshot is taken and a VM is branched,
//! and so that pages of a snapshot can be mapped over it. Nothing is reserved or touched until the guest does.

use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The guest's physical memory.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Why guest memory could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
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
    let mut regions = Vec::with_capacity(ranges.len());
    for &(start, len) in ranges {
        let size = usize::try_from(len).map_err(|error| map_error(error.to_string()))?;
        let mapping = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| map_error(error.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or_else(|| map_error("a range wraps around".to_owned()))?);
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
