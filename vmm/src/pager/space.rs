//! Guest memory as its pager sees it: pages of a linear space, and their addresses in this process.

use std::ops::Range;

use snapshot_fmt::PAGE_BYTES;
use snapshot_fmt::chain::Chain;

use crate::memory::{self, GuestMemory};

/// Zeros between two runs of data are left out of an area from this length on, in pages: a huge page of them.
const GAP_MIN: u64 = 512;
/// About as many areas at most: each is a mapping of its own to the host's kernel, which has 65530 for a process.
const AREAS_MAX: u64 = 1024;

/// Where the pages are. Addresses alone: nothing here keeps the memory, or touches it.
#[derive(Debug)]
pub struct Space {
    pieces: Vec<Piece>,
}

/// Pages that are contiguous in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The first page.
    pub first_page: u64,
    /// How many.
    pub count: u64,
    /// Address of the first.
    pub address: u64,
}

impl Space {
    /// That of `memory`.
    pub fn of(memory: &GuestMemory) -> Self {
        let pieces = memory::pages(memory, 0, u64::MAX).map(|(first_page, slice)| Piece {
            first_page,
            count: slice.len() as u64 / PAGE_BYTES,
            address: slice.ptr_guard().as_ptr() as u64,
        });
        Self {
            pieces: pieces.collect(),
        }
    }

    /// The addresses of all pages, in ranges.
    pub fn addresses(&self) -> impl Iterator<Item = Range<usize>> {
        self.pieces.iter().filter_map(|piece| {
            let end = piece.address + piece.count * PAGE_BYTES;
            Some(usize::try_from(piece.address).ok()?..usize::try_from(end).ok()?)
        })
    }

    /// The page that `address` lies in.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        self.pieces.iter().find_map(|piece| {
            let page = address.checked_sub(piece.address)? / PAGE_BYTES;
            (page < piece.count).then(|| piece.first_page + page)
        })
    }

    /// The pages from `first_page` to before `end`.
    pub fn pieces(&self, first_page: u64, end: u64) -> impl Iterator<Item = Piece> {
        self.pieces.iter().filter_map(move |piece| {
            let from = first_page.max(piece.first_page);
            let to = end.min(piece.first_page + piece.count);
            (from < to).then(|| Piece {
                first_page: from,
                count: to - from,
                address: piece.address + (from - piece.first_page) * PAGE_BYTES,
            })
        })
    }
}

/// The parts of a space in which pages are missing at first, ascending: the chain's runs of data with short stretches of zeros between them. All else is
/// zero anyway, and its faults are the host kernel's own.
pub fn areas(chain: &Chain) -> Vec<Range<u64>> {
    let gap = GAP_MIN.max(chain.total_pages() / AREAS_MAX);
    let mut areas: Vec<Range<u64>> = Vec::new();
    for run in chain.data_runs() {
        match areas.last_mut() {
            Some(last) if run.first_page - last.end < gap => last.end = run.end(),
            _ => areas.push(run.first_page..run.end()),
        }
    }
    areas
}

/// The one of `areas` that has `page`.
pub fn area_of(areas: &[Range<u64>], page: u64) -> Option<&Range<u64>> {
    let index = areas.partition_point(|area| area.end <= page);
    areas.get(index).filter(|area| area.contains(&page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_addresses_belong_together() {
        let memory = memory::create(&[(0, 0x2000), (0x10_0000, 0x3000)]).unwrap();
        let space = Space::of(&memory);
        for page in 0..5 {
            let piece = space.pieces(page, page + 1).next().unwrap();
            assert_eq!((piece.first_page, piece.count), (page, 1));
            assert_eq!(space.page_at(piece.address), Some(page));
            assert_eq!(space.page_at(piece.address + 0xfff), Some(page));
        }
        assert_eq!(space.page_at(0), None);
        let counts = |from, to| -> Vec<_> {
            let pieces = space.pieces(from, to);
            pieces
                .map(|piece| (piece.first_page, piece.count))
                .collect()
        };
        assert_eq!(counts(1, 9), [(1, 1), (2, 3)]);
        assert_eq!(counts(5, 9), []);
    }

    #[test]
    fn a_page_is_found_in_its_area() {
        let areas = [2..4, 9..10];
        let found = [1, 2, 3, 4, 9, 10].map(|page| area_of(&areas, page).map(|area| area.start));
        assert_eq!(found, [None, Some(2), Some(2), None, Some(9), None]);
    }
}
