//! A set of a disk's blocks, to which one thread adds while others look.
//!
//! Blocks are never taken out: what was found in it stays there. Adding is a full barrier, so what its thread does to
//! the disk afterwards is not seen by others before the block is (see [`super::backup`]). It takes memory where it has blocks: a disk may be
//! large and empty, and its size somebody else's word.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks of a word.
const WORD: u64 = u64::BITS as u64;
/// Words of a part: 4 KiB, for 128 MiB of the disk.
const WORDS: usize = 512;
/// Blocks of a part.
const PART: u64 = WORD * WORDS as u64;
/// Bytes of a part.
const PART_BYTES: usize = WORDS * size_of::<u64>();

type Part = [AtomicU64; WORDS];

/// A bit per block.
#[derive(Debug)]
pub struct BlockMap {
    /// Those that have blocks.
    parts: Box<[OnceLock<Box<Part>>]>,
    blocks: u64,
}

impl BlockMap {
    /// None of `blocks` blocks.
    pub fn new(blocks: u64) -> Self {
        let parts = (0..blocks.div_ceil(PART)).map(|_| OnceLock::new());
        Self {
            parts: parts.collect(),
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
            let (part, word) = place(at);
            let part = self.parts[part].get_or_init(new_part);
            part[word].fetch_or(ones << (at % WORD), Ordering::SeqCst);
            at = next;
        }
    }

    /// Adds what `other` has, which is of the same disk.
    pub fn merge(&self, other: &Self) {
        for (own, other) in self.parts.iter().zip(&other.parts) {
            let Some(other) = other.get() else { continue };
            for (own, other) in own.get_or_init(new_part).iter().zip(&**other) {
                own.fetch_or(other.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        }
    }

    /// Whether no block is in it.
    pub fn is_empty(&self) -> bool {
        self.find(0..self.blocks, true) == self.blocks
    }

    /// Bytes of a map of `blocks` blocks in a file.
    pub fn file_len(blocks: u64) -> u64 {
        blocks.div_ceil(PART).saturating_mul(PART_BYTES as u64)
    }

    /// Writes it to `file` from `offset` on, which has holes only there and is long enough: a bit per block, in words that have their least significant
    /// byte first. Parts without blocks stay holes.
    pub fn write(&self, file: &File, offset: u64) -> io::Result<()> {
        for (part, at) in self.parts.iter().zip((offset..).step_by(PART_BYTES)) {
            let Some(part) = part.get() else { continue };
            let words = part.iter().map(|word| word.load(Ordering::SeqCst));
            let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            file.write_all_at(&bytes, at)?;
        }
        Ok(())
    }

    /// Reads one of `blocks` blocks that was [written](Self::write). Bits behind the disk's end are an error, as is a file that is too short.
    pub fn read(file: &File, offset: u64, blocks: u64) -> io::Result<Self> {
        let map = Self::new(blocks);
        let mut bytes = [0; PART_BYTES];
        for ((part, number), at) in map
            .parts
            .iter()
            .zip(0..)
            .zip((offset..).step_by(PART_BYTES))
        {
            file.read_exact_at(&mut bytes, at)?;
            if bytes == [0; PART_BYTES] {
                continue;
            }
            let words = part.get_or_init(new_part);
            let bytes = bytes.chunks_exact(8).flat_map(<[u8]>::first_chunk);
            for (word, bytes) in words.iter().zip(bytes) {
                word.store(u64::from_le_bytes(*bytes), Ordering::SeqCst);
            }
            let last = words
                .iter()
                .rposition(|word| word.load(Ordering::SeqCst) != 0);
            let bits = last.map_or(0, |last| {
                let unused = words[last].load(Ordering::SeqCst).leading_zeros();
                (last as u64 + 1) * WORD - u64::from(unused)
            });
            if number * PART + bits > blocks {
                return Err(ErrorKind::InvalidData.into());
            }
        }
        Ok(map)
    }

    /// Whether `block` is in it.
    pub fn has(&self, block: u64) -> bool {
        block < self.blocks && self.word(block).unwrap_or(0) >> (block % WORD) & 1 == 1
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
            let Some(word) = self.word(at) else {
                if !is_in {
                    return at;
                }
                at = (at / PART + 1) * PART;
                continue;
            };
            let word = if is_in { word } else { !word };
            let sought = word >> (at % WORD);
            if sought != 0 {
                return end.min(at + u64::from(sought.trailing_zeros()));
            }
            at = (at / WORD + 1) * WORD;
        }
        end
    }

    /// The word of a block of the disk; `None` where its part has no block.
    fn word(&self, block: u64) -> Option<u64> {
        let (part, word) = place(block);
        let part = self.parts[part].get()?;
        Some(part[word].load(Ordering::SeqCst))
    }
}

impl Clone for BlockMap {
    fn clone(&self) -> Self {
        let word = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::SeqCst));
        let copy = |part: &Part| Box::new(std::array::from_fn(|at| word(&part[at])));
        let parts = self.parts.iter();
        let parts = parts.map(|part| {
            part.get()
                .map_or_else(OnceLock::new, |part| copy(part).into())
        });
        Self {
            parts: parts.collect(),
            blocks: self.blocks,
        }
    }
}

/// The part and the word in it that a block is in.
fn place(block: u64) -> (usize, usize) {
    let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    (index(block / PART), index(block % PART / WORD))
}

fn new_part() -> Box<Part> {
    Box::new([const { AtomicU64::new(0) }; WORDS])
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
    fn parts_without_blocks_take_no_memory() {
        let map = BlockMap::new(u64::from(u32::MAX));
        map.add(PART - 1..PART + 1);
        map.add(9 * PART..9 * PART + 3);
        assert_eq!(runs(&map), [PART - 1..PART + 1, 9 * PART..9 * PART + 3]);
        assert_eq!(map.find(5 * PART..6 * PART, true), 6 * PART);
        assert_eq!(map.find(5 * PART + 7..6 * PART, false), 5 * PART + 7);
        let other = BlockMap::new(u64::from(u32::MAX));
        other.merge(&map);
        assert_eq!(runs(&other), runs(&map));
        let parts = other.parts.iter().filter(|part| part.get().is_some());
        assert_eq!(parts.count(), 3);
    }

    #[test]
    fn a_map_goes_through_a_file() {
        let blocks = 2 * PART + 70;
        let map = BlockMap::new(blocks);
        assert!(map.is_empty());
        map.add(3..4);
        map.add(2 * PART + 60..blocks);
        assert!(!map.is_empty());
        let file = tempfile::tempfile().unwrap();
        file.set_len(9 + BlockMap::file_len(blocks)).unwrap();
        map.write(&file, 9).unwrap();
        assert_eq!(runs(&BlockMap::read(&file, 9, blocks).unwrap()), runs(&map));
        assert_eq!(runs(&map.clone()), runs(&map));
        // Of a smaller disk, or cut short.
        for (blocks, kind) in [
            (blocks - 1, ErrorKind::InvalidData),
            (4, ErrorKind::InvalidData),
            (blocks + PART, ErrorKind::UnexpectedEof),
        ] {
            let mut file = file.try_clone().unwrap();
            if blocks == 4 {
                file = tempfile::tempfile().unwrap();
                file.set_len(9 + BlockMap::file_len(4)).unwrap();
                file.write_all_at(&[0x10], 9).unwrap();
            }
            let error = BlockMap::read(&file, 9, blocks).unwrap_err();
            assert_eq!(error.kind(), kind, "{blocks}");
        }
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
