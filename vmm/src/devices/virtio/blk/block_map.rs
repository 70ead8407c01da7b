//! A set of a disk's blocks, to which one thread adds while others look.
//!
//! Blocks are never taken out: what was found in it stays there. Adding is a full barrier, so what its thread does to
//! the disk afterwards is not seen by others before the block is (see [`super::backup`]).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks of a word.
const WORD: u64 = u64::BITS as u64;

/// A bit per block.
#[derive(Debug)]
pub struct BlockMap {
    words: Box<[AtomicU64]>,
    blocks: u64,
}

impl BlockMap {
    /// None of `blocks` blocks.
    pub fn new(blocks: u64) -> Self {
        let words = (0..blocks.div_ceil(WORD)).map(|_| AtomicU64::new(0));
        Self {
            words: words.collect(),
            blocks,
        }
    }

    /// How many blocks the disk has.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Adds blocks; those behind the disk's end are left out.
    pub fn add(&self, blocks: Range<u64>) {
        let end = blocks.end.min(self.blocks);
        let mut at = blocks.start;
        while at < end {
            let next = end.min((at / WORD + 1) * WORD);
            let ones = u64::MAX >> (WORD - (next - at));
            self.word(at)
                .fetch_or(ones << (at % WORD), Ordering::SeqCst);
            at = next;
        }
    }

    /// Adds what `other` has, which is of the same disk.
    pub fn merge(&self, other: &Self) {
        for (own, other) in self.words.iter().zip(&other.words) {
            own.fetch_or(other.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    /// Whether `block` is in it.
    pub fn has(&self, block: u64) -> bool {
        block < self.blocks && self.word(block).load(Ordering::SeqCst) >> (block % WORD) & 1 == 1
    }

    /// The first run of blocks among `within` that are in it.
    pub fn run(&self, within: Range<u64>) -> Option<Range<u64>> {
        let start = self.find(within.clone(), true);
        let end = self.find(start..within.end, false);
        (start < end).then_some(start..end)
    }

    /// The first block of `within` that is in it, or is not; the end of `within`, or of the disk, where there is none.
    pub fn find(&self, within: Range<u64>, is_in: bool) -> u64 {
        let end = within.end.min(self.blocks);
        let mut at = within.start;
        while at < end {
            let word = self.word(at).load(Ordering::SeqCst);
            let word = if is_in { word } else { !word };
            let sought = word >> (at % WORD);
            if sought != 0 {
                return end.min(at + u64::from(sought.trailing_zeros()));
            }
            at = (at / WORD + 1) * WORD;
        }
        end
    }

    /// The word of a block of the disk.
    fn word(&self, block: u64) -> &AtomicU64 {
        let index = usize::try_from(block / WORD).unwrap_or(usize::MAX);
        &self.words[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(map: &BlockMap) -> Vec<Range<u64>> {
        let next = |last: &Range<u64>| map.run(last.end..u64::MAX);
        std::iter::successors(map.run(0..u64::MAX), next).collect()
    }

    #[test]
    fn runs_are_found_over_the_borders_of_words() {
        let map = BlockMap::new(200);
        assert_eq!(runs(&map), []);
        for run in [3..4, 60..70, 70..71, 127..129, 190..300, 9..9] {
            map.add(run);
        }
        assert_eq!(runs(&map), [3..4, 60..71, 127..129, 190..200]);
        assert_eq!(map.run(65..68), Some(65..68));
        assert_eq!(map.run(4..60), None);
        for (block, is_in) in [(0, false), (3, true), (64, true), (199, true), (200, false)] {
            assert_eq!(map.has(block), is_in, "{block}");
        }
        assert_eq!((map.find(3..9, false), map.find(4..9, true)), (4, 9));
        assert_eq!(
            (map.find(191..999, false), map.find(300..301, true)),
            (200, 200)
        );
        map.add(0..200);
        assert_eq!(map.run(0..u64::MAX), Some(0..200));
    }

    #[test]
    fn a_merged_map_has_the_blocks_of_both() {
        let (one, other) = (BlockMap::new(130), BlockMap::new(130));
        one.add(1..2);
        other.add(2..3);
        other.add(129..130);
        one.merge(&other);
        assert_eq!(runs(&one), [1..3, 129..130]);
    }
}
