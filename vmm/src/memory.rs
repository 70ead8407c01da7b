//! Guest memory: private anonymous pages, shown to KVM as one slot per range of RAM.
//!
//! Private, so that a fork of this process has the memory of one moment, which is how a snapshot is taken and a VM is branched,
//! and so that pages of a snapshot can be mapped over it. Nothing is reserved or touched until the guest does.

use snapshot_fmt::PAGE_BYTES;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

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

/// How many pages `memory` has.
pub fn total_pages(memory: &GuestMemory) -> u64 {
    memory.iter().map(|region| region.len() / PAGE_BYTES).sum()
}

/// The pages of `memory` from `first_page` to before `first_page + count`, counted over its ranges one behind the other, in pieces
/// that are contiguous. What lies behind the end is left out.
pub fn pages(
    memory: &GuestMemory,
    first_page: u64,
    count: u64,
) -> impl Iterator<Item = (u64, VolatileSlice<'_>)> {
    let end = first_page.saturating_add(count);
    let mut next = 0;
    memory.iter().filter_map(move |region| {
        let (start, pages) = (next, region.len() / PAGE_BYTES);
        next += pages;
        let (from, to) = (first_page.max(start), end.min(start + pages));
        let bytes = usize::try_from(to.checked_sub(from)? * PAGE_BYTES).ok()?;
        let offset = usize::try_from((from - start) * PAGE_BYTES).ok()?;
        // Nothing of it, or an address beyond what this machine can have: no piece.
        let slice = region.get_slice(MemoryRegionAddress(offset as u64), bytes);
        slice.ok().filter(|_| bytes > 0).map(|slice| (from, slice))
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::arch::x86_64::layout::{GAP_END, GAP_START, ram_ranges};

    #[test]
    fn pages_are_counted_over_the_gap() {
        let memory = create(&[(0, 0x2000), (0x10_0000, 0x3000)]).unwrap();
        let pieces = |first, count| -> Vec<_> {
            pages(&memory, first, count)
                .map(|(page, slice)| (page, slice.len()))
                .collect()
        };
        assert_eq!(pieces(0, 5), [(0, 0x2000), (2, 0x3000)]);
        assert_eq!(pieces(1, 2), [(1, 0x1000), (2, 0x1000)]);
        assert_eq!(pieces(3, u64::MAX), [(3, 0x2000)]);
        assert_eq!((pieces(5, 9), pieces(1, 0)), (vec![], vec![]));
        let slice = pages(&memory, 2, 1).next().unwrap().1;
        memory.write_obj(7u8, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(slice.read_obj::<u8>(0).unwrap(), 7);
    }

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
