//! What a disk is kept in, under a driver that behaves: overlays, and the disk of a moment while the driver writes on.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use snapshot_fmt::PAGE_SIZE;

use super::backup::{Moment, Preparation};
use super::stack::{BLOCK, BlockBytes, BlockSource, scratch_file};
use super::tests::{DATA, SECTORS, image, open, range, request};
use super::{Block, BlockConfig, BlockError, Disk};
use crate::devices::virtio::testing::{FakeDriver, HIGH, r, w};

pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const LEN: usize = 128 * 512;

pub(super) fn driver(disk: &Arc<Disk>) -> FakeDriver<Block> {
    let config = BlockConfig {
        disk: Arc::clone(disk),
        path: "disk".into(),
        id: "disk".into(),
    };
    FakeDriver::started(Block::new(config).unwrap())
}

pub(super) fn scratch(blocks: u64) -> File {
    let dir = tempfile::tempdir().unwrap();
    scratch_file(dir.path(), "scratch", blocks).unwrap()
}

pub(super) fn begin(disk: &Arc<Disk>) -> Moment {
    Preparation::new(disk, scratch(disk.blocks())).begin()
}

/// All of the disk of a moment, by blocks.
pub(super) fn content(moment: &Moment) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; PAGE_SIZE * usize::try_from(moment.blocks()).unwrap()];
    for (block, bytes) in (0..).zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
        moment.read(block, bytes.try_into().unwrap())?;
    }
    Ok(bytes)
}

/// The blocks that had changed by the moment.
pub(super) fn changed(moment: &Moment) -> Vec<u64> {
    let next = |last: &Range<u64>| moment.next_changed(last.end);
    let runs = std::iter::successors(moment.next_changed(0), next);
    runs.flatten().collect()
}

/// The blocks that need not have been zero at the moment.
pub(super) fn data(moment: &Moment) -> Vec<u64> {
    let next = |last: &Range<u64>| moment.next_data(last.end).unwrap();
    let runs = std::iter::successors(moment.next_data(0).unwrap(), next);
    runs.flatten().collect()
}

pub(super) fn write(driver: &mut FakeDriver<Block>, sector: u64, bytes: &[u8]) -> u8 {
    driver.write(DATA, bytes);
    let len = u32::try_from(bytes.len()).unwrap();
    request(driver, 1, sector, &[r(DATA, len)])
}

pub(super) fn zero(driver: &mut FakeDriver<Block>, kind: u32, sector: u64, sectors: u32) -> u8 {
    driver.write(DATA, &range(sector, sectors, 0));
    request(driver, kind, 0, &[r(DATA, 16)])
}

/// What the driver reads of the disk's first sectors.
pub(super) fn read(driver: &mut FakeDriver<Block>, sectors: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sector in 0..sectors {
        assert_eq!(request(driver, 0, sector, &[w(DATA, 512)]), OK, "{sector}");
        bytes.extend(driver.read(DATA, 512));
    }
    bytes
}

/// A saved disk: what it is, with every second block of it zero, and blocks that cannot be read.
struct Saved {
    bytes: Vec<u8>,
    broken: Option<u64>,
}

impl Saved {
    fn new() -> Self {
        let block = |n: usize| [u8::try_from(n * (n % 2)).unwrap(); PAGE_SIZE];
        let bytes = (0..LEN / PAGE_SIZE).flat_map(block).collect();
        Self {
            bytes,
            broken: None,
        }
    }
}

impl BlockSource for Saved {
    fn blocks(&self) -> u64 {
        self.bytes.len() as u64 / BLOCK
    }

    fn read(&self, block: u64, bytes: &mut BlockBytes) -> io::Result<()> {
        if self.broken == Some(block) {
            return Err(io::Error::other("a page is corrupt"));
        }
        let at = usize::try_from(block * BLOCK).unwrap();
        bytes.copy_from_slice(&self.bytes[at..at + PAGE_SIZE]);
        Ok(())
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let block = from | 1;
        Ok((block < self.blocks()).then_some(block..block + 1))
    }
}

/// A restored disk, and what it was.
pub(super) fn restored() -> (Arc<Disk>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved::new();
    let bytes = saved.bytes.clone();
    let disk = Disk::of_saved(Arc::new(saved), SECTORS, dir.path(), "overlay").unwrap();
    assert!(dir.path().read_dir().unwrap().next().is_none());
    (Arc::new(disk), bytes)
}

#[test]
fn the_disk_of_a_moment_is_not_what_is_written_after_it() {
    let file = image();
    let mut before = vec![0; LEN];
    file.read_exact_at(&mut before, 0).unwrap();
    let disk = Arc::new(open(&file, false).unwrap());
    let mut driver = driver(&disk);
    let moment = begin(&disk);
    assert_eq!(write(&mut driver, 3, &[0xaa; 1024]), OK);
    assert_eq!(write(&mut driver, 7, &[0xbb; 1024]), OK);
    assert_eq!(zero(&mut driver, 13, 32, 8), OK);
    // Twice: what is saved is the oldest.
    assert_eq!(write(&mut driver, 3, &[0xcc; 512]), OK);
    assert_eq!(content(&moment).unwrap(), before);
    assert_eq!(data(&moment).len(), 16);
    let mut sector = [0; 512];
    for (at, byte) in [
        (3, 0xcc),
        (4, 0xaa),
        (7, 0xbb),
        (8, 0xbb),
        (32, 0),
        (40, 40),
    ] {
        file.read_exact_at(&mut sector, at * 512).unwrap();
        assert_eq!(sector, [byte; 512], "{at}");
    }
    // Two moments at once are each their own.
    let later = begin(&disk);
    let mut between = vec![0; LEN];
    file.read_exact_at(&mut between, 0).unwrap();
    assert_eq!(write(&mut driver, 64, &[0xdd; 512]), OK);
    assert_eq!(content(&moment).unwrap(), before);
    assert_eq!(content(&later).unwrap(), between);
}

#[test]
fn a_hole_of_the_moment_is_one_and_a_new_one_is_none() {
    let file = image();
    let disk = Arc::new(open(&file, false).unwrap());
    let mut driver = driver(&disk);
    assert_eq!(zero(&mut driver, 11, 8, 16), OK);
    let moment = begin(&disk);
    assert_eq!(data(&moment)[..3], [0, 3, 4]);
    driver.write(DATA, &range(40, 8, 1));
    assert_eq!(request(&mut driver, 13, 0, &[r(DATA, 16)]), OK);
    assert!(data(&moment).contains(&5));
    let mut block = [0; PAGE_SIZE];
    moment.read(5, &mut block).unwrap();
    assert_eq!(block[..512], [40; 512]);
    // A discard would have to be saved.
    assert_eq!(zero(&mut driver, 11, 56, 8), OK);
    file.read_exact_at(&mut block, 7 * BLOCK).unwrap();
    assert_eq!(block[..512], [56; 512]);
    moment.release();
    assert_eq!(zero(&mut driver, 11, 56, 8), OK);
    file.read_exact_at(&mut block, 7 * BLOCK).unwrap();
    assert_eq!(block, [0; PAGE_SIZE]);
}

#[test]
fn what_cannot_be_saved_costs_the_moment_and_not_the_write() {
    let file = image();
    let disk = Arc::new(open(&file, false).unwrap());
    let mut driver = driver(&disk);
    let mut options = File::options();
    let full = options.read(true).write(true).open("/dev/full").unwrap();
    let moment = Preparation::new(&disk, full).begin();
    let mut block = [0; PAGE_SIZE];
    moment.read(1, &mut block).unwrap();
    assert_eq!(write(&mut driver, 8, &[0xaa; 512]), OK);
    assert_eq!(write(&mut driver, 16, &[0xaa; 512]), OK);
    for block_number in [0, 1, 2] {
        let error = moment.read(block_number, &mut block).unwrap_err();
        assert!(error.to_string().contains("cannot be kept"), "{error}");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
    assert_eq!(request(&mut driver, 0, 16, &[w(DATA, 512)]), OK);
    assert_eq!(driver.read(DATA, 512), [0xaa; 512]);
    drop(moment);
    assert_eq!(changed(&begin(&disk)), [1, 2]);
}

#[test]
fn what_has_changed_counts_until_it_is_kept() {
    let disk = Arc::new(open(&image(), false).unwrap());
    let mut driver = driver(&disk);
    assert_eq!(write(&mut driver, 8, &[1; 512]), OK);
    let moment = begin(&disk);
    assert_eq!(changed(&moment), [1]);
    assert_eq!(write(&mut driver, 24, &[1; 512]), OK);
    assert_eq!(changed(&moment), [1]);
    // It comes to nothing.
    drop(moment);
    let moment = begin(&disk);
    assert_eq!(changed(&moment), [1, 3]);
    assert_eq!(zero(&mut driver, 13, 120, 8), OK);
    moment.keep();
    let moment = begin(&disk);
    assert_eq!(changed(&moment), [15]);
    moment.keep();
    assert_eq!(zero(&mut driver, 11, 47, 2), OK);
    assert_eq!(changed(&begin(&disk)), [5, 6]);
}

#[test]
fn the_last_block_may_lie_on_the_disk_in_part() {
    let file = image();
    file.set_len(4096 + 1024 + 7).unwrap();
    let disk = Arc::new(open(&file, false).unwrap());
    let mut driver = driver(&disk);
    let moment = begin(&disk);
    assert_eq!(moment.blocks(), 2);
    assert_eq!(data(&moment), [0, 1]);
    assert_eq!(write(&mut driver, 9, &[0xaa; 512]), OK);
    let mut block = [1; PAGE_SIZE];
    moment.read(1, &mut block).unwrap();
    let expected = [&[8; 512][..], &[9; 512], &[0; 3072]].concat();
    assert_eq!(block[..], expected);

    let saved = Saved {
        bytes: [[5; PAGE_SIZE], block].concat(),
        broken: None,
    };
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::of_saved(Arc::new(saved), 10, dir.path(), "overlay").unwrap();
    let disk = Arc::new(disk);
    let mut driver = super::disk_tests::driver(&disk);
    assert_eq!(zero(&mut driver, 11, 8, 2), OK);
    assert_eq!(
        read(&mut driver, 10),
        [[5; 4096].as_slice(), &[0; 1024]].concat()
    );
    assert_eq!(request(&mut driver, 0, 10, &[w(DATA, 512)]), IOERR);
}

#[test]
fn a_restored_disk_is_what_was_saved_and_what_was_written() {
    let (disk, mut model) = restored();
    let mut driver = driver(&disk);
    assert_eq!(read(&mut driver, SECTORS), model);
    let mut random = 1u64;
    let mut next = |below: u64| {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for step in 0..200u8 {
        let sector = next(SECTORS);
        let sectors = 1 + next(20.min(SECTORS - sector));
        let at = usize::try_from(sector * 512).unwrap();
        let len = usize::try_from(sectors * 512).unwrap();
        let part = &mut model[at..at + len];
        let sectors = u32::try_from(sectors).unwrap();
        match next(4) {
            0 => {
                assert_eq!(zero(&mut driver, 13, sector, sectors), OK);
                part.fill(0);
            }
            1 => {
                let cut = u32::try_from(next(len as u64)).unwrap();
                driver.write(DATA, &vec![0xee; len]);
                driver.write(HIGH, &vec![0xee; len]);
                let len = u32::try_from(len).unwrap();
                let pieces = [w(DATA, cut), w(HIGH, len - cut)];
                assert_eq!(request(&mut driver, 0, sector, &pieces), OK);
                let (cut, len) = (cut as usize, len as usize);
                assert_eq!(driver.read(DATA, cut), part[..cut]);
                assert_eq!(driver.read(HIGH, len - cut), part[cut..]);
            }
            _ => {
                assert_eq!(write(&mut driver, sector, &vec![step; len]), OK);
                part.fill(step);
            }
        }
    }
    assert_eq!(request(&mut driver, 4, 0, &[]), OK);
    assert_eq!(read(&mut driver, SECTORS), model);
    assert_eq!(content(&begin(&disk)).unwrap(), model);
}

#[test]
fn a_discard_makes_whole_blocks_of_an_overlay_zero() {
    let (disk, mut model) = restored();
    let mut driver = driver(&disk);
    assert_eq!(zero(&mut driver, 11, 23, 10), OK);
    model[3 * PAGE_SIZE..4 * PAGE_SIZE].fill(0);
    assert_eq!(zero(&mut driver, 11, 41, 4), OK);
    assert_eq!(read(&mut driver, SECTORS), model);
}

#[test]
fn a_saved_block_that_cannot_be_read_is_an_error_of_its_own() {
    let saved = Saved {
        broken: Some(3),
        ..Saved::new()
    };
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::of_saved(Arc::new(saved), SECTORS, dir.path(), "overlay").unwrap();
    let disk = Arc::new(disk);
    let mut driver = driver(&disk);
    assert_eq!(request(&mut driver, 0, 24, &[w(DATA, 512)]), IOERR);
    // A part of it cannot be written, all of it can.
    assert_eq!(write(&mut driver, 25, &[1; 512]), IOERR);
    assert_eq!(write(&mut driver, 24, &[1; 4096]), OK);
    assert_eq!(request(&mut driver, 0, 24, &[w(DATA, 512)]), OK);
    assert_eq!(driver.read(DATA, 512), [1; 512]);
}

#[test]
fn a_saved_disk_of_another_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for sectors in [0, SECTORS - 8, SECTORS + 1, u64::MAX] {
        let made = Disk::of_saved(Arc::new(Saved::new()), sectors, dir.path(), "overlay");
        let error = made.err().unwrap();
        assert!(matches!(error, BlockError::SavedBlocks { .. }), "{error}");
    }
}
