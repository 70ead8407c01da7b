//! The block device under a driver that behaves.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use super::{Block, BlockConfig, BlockError, Disk};
use crate::devices::virtio::testing::{BUFFERS, Desc, FakeDriver, HIGH, r, w};

/// Where the tests put a request's header, data and status.
pub(super) const HEADER: u64 = BUFFERS;
pub(super) const DATA: u64 = BUFFERS + 0x1000;
pub(super) const STATUS: u64 = BUFFERS + 0x100;

/// Size of the tests' disk.
pub(super) const SECTORS: u64 = 128;

/// A disk whose sector `n` is full of the byte `n`.
pub(super) fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        let bytes = [u8::try_from(sector).unwrap(); 512];
        file.write_all_at(&bytes, sector * 512).unwrap();
    }
    file
}

pub(super) fn open(file: &File, read_only: bool) -> Result<Disk, BlockError> {
    Disk::of_file(file.try_clone().unwrap(), "disk.img".as_ref(), read_only)
}

pub(super) fn config(file: &File, read_only: bool) -> BlockConfig {
    BlockConfig {
        disk: Arc::new(open(file, read_only).unwrap()),
        path: "disk.img".into(),
        id: "root".into(),
    }
}

pub(super) fn disk(read_only: bool) -> (File, FakeDriver<Block>) {
    let file = image();
    let block = Block::new(config(&file, read_only)).unwrap();
    (file, FakeDriver::started(block))
}

pub(super) fn put_header(driver: &FakeDriver<Block>, kind: u32, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.write(HEADER, &header);
    driver.write(STATUS, &[0xee]);
}

/// Makes a request with `data` between header and status; returns its status.
pub(super) fn request(driver: &mut FakeDriver<Block>, kind: u32, sector: u64, data: &[Desc]) -> u8 {
    put_header(driver, kind, sector);
    let chain = [&[r(HEADER, 16)], data, &[w(STATUS, 1)]].concat();
    let used = driver.request(0, &chain);
    let writable: u32 = chain.iter().filter(|d| d.write).map(|d| d.len).sum();
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].1, writable);
    driver.read(STATUS, 1)[0]
}

pub(super) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn describes_itself() {
    let (_, mut driver) = disk(false);
    assert_eq!(u64::from_le_bytes(driver.config(0)), SECTORS);
    assert_eq!(u32::from_le_bytes(driver.config(12)), 126);
    assert_eq!(u32::from_le_bytes(driver.config(20)), 512);
    assert_ne!(u32::from_le_bytes(driver.config(36)), 0);
    let (_, mut driver) = disk(true);
    assert_eq!(u32::from_le_bytes(driver.config(36)), 0);
    assert_eq!(driver.config(60), [0; 4]);
}

#[test]
fn reads_into_scattered_buffers() {
    for read_only in [true, false] {
        let (_, mut driver) = disk(read_only);
        let data = [w(DATA, 512), w(HIGH, 100), w(DATA + 0x1000, 924)];
        assert_eq!(request(&mut driver, 0, 7, &data), 0);
        assert_eq!(driver.read(DATA, 512), [7; 512]);
        assert_eq!(driver.read(HIGH, 101), [&[8; 100][..], &[0]].concat());
        assert_eq!(driver.read(DATA + 0x1000, 412), [8; 412]);
        assert_eq!(driver.read(DATA + 0x1000 + 412, 512), [9; 512]);
    }
}

#[test]
fn writes_from_scattered_buffers() {
    let (file, mut driver) = disk(false);
    driver.write(DATA, &[0xaa; 1024]);
    driver.write(HIGH, &[0xbb; 512]);
    let data = [r(DATA, 1000), r(HIGH, 512), r(DATA + 1000, 24)];
    assert_eq!(request(&mut driver, 1, SECTORS - 3, &data), 0);
    let mut got = [0; 1536];
    file.read_exact_at(&mut got, (SECTORS - 3) * 512).unwrap();
    assert_eq!(
        got[..],
        [&[0xaa; 1000][..], &[0xbb; 512], &[0xaa; 24]].concat()
    );
    assert_eq!(request(&mut driver, 4, 0, &[]), 0);
}

#[test]
fn any_framing_will_do() {
    let (_, mut driver) = disk(false);
    put_header(&driver, 0, 5);
    // The header in three pieces; data and status in one buffer.
    let chain = [
        r(HEADER, 1),
        r(HEADER + 1, 0),
        r(HEADER + 1, 15),
        w(DATA, 513),
    ];
    assert_eq!(driver.request(0, &chain).len(), 1);
    assert_eq!(driver.read(DATA, 513), [&[5; 512][..], &[0]].concat());
    // Header and data in one buffer, an empty one last.
    put_header(&driver, 1, 6);
    driver.write(HEADER + 16, &[0xcc; 512]);
    let chain = [r(HEADER, 528), w(DATA, 1), w(DATA, 0)];
    assert_eq!(driver.request(0, &chain).len(), 1);
    assert_eq!(driver.read(DATA, 1), [0]);
}

#[test]
fn a_batch_is_one_interrupt() {
    let (_, mut driver) = disk(false);
    put_header(&driver, 0, 1);
    for n in 0..40 {
        driver.add(0, &[r(HEADER, 16), w(DATA + n * 512, 512), w(STATUS, 1)]);
    }
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 40);
    assert_eq!(driver.irq.count(), 1);
}

#[test]
fn says_its_serial_number() {
    let (_, mut driver) = disk(true);
    driver.write(DATA, &[0xff; 20]);
    assert_eq!(request(&mut driver, 8, 0, &[w(DATA, 20)]), 0);
    assert_eq!(driver.read(DATA, 6), *b"root\0\0");
}

#[test]
fn discards_and_zeroes() {
    let (file, mut driver) = disk(false);
    let blocks = file.metadata().unwrap().blocks();
    for (kind, flags, sector) in [(11, 0, 8), (13, 1, 16), (13, 0, 24)] {
        driver.write(DATA, &range(sector, 8, flags));
        assert_eq!(request(&mut driver, kind, 0, &[r(DATA, 16)]), 0);
        let mut got = [1; 4096];
        file.read_exact_at(&mut got, sector * 512).unwrap();
        assert_eq!(got, [0; 4096], "{kind} {flags}");
    }
    let mut next = [0; 1];
    file.read_exact_at(&mut next, 32 * 512).unwrap();
    assert_eq!(next, [32]);
    assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
    assert!(file.metadata().unwrap().blocks() < blocks);
}

#[test]
fn several_ranges_in_one_request() {
    let (file, mut driver) = disk(false);
    let list = [range(1, 1, 0), range(3, 2, 0), range(9, 0, 0)].concat();
    driver.write(DATA, &list);
    assert_eq!(
        request(&mut driver, 13, 0, &[r(DATA, 40), r(DATA + 40, 8)]),
        0
    );
    for (sector, want) in [(0, 0), (1, 0), (2, 2), (3, 0), (4, 0), (5, 5), (9, 9)] {
        let mut got = [0xff; 1];
        file.read_exact_at(&mut got, sector * 512).unwrap();
        assert_eq!(got, [want], "{sector}");
    }
}

#[test]
fn an_odd_end_is_out_of_reach() {
    let file = image();
    file.set_len(1023).unwrap();
    let mut driver = FakeDriver::started(Block::new(config(&file, true)).unwrap());
    assert_eq!(u64::from_le_bytes(driver.config(0)), 1);
    assert_eq!(request(&mut driver, 0, 0, &[w(DATA, 512)]), 0);
    assert_eq!(request(&mut driver, 0, 1, &[w(DATA, 512)]), 1);
}

#[test]
fn unusable_files_are_named() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(511).unwrap();
    let error = open(&file, true).err().unwrap();
    assert_eq!(
        error.to_string(),
        "disk.img has 511 bytes, less than one sector of 512"
    );
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(512).unwrap();
    let file = File::open(path.path()).unwrap();
    let error = open(&file, false).err().unwrap();
    assert!(matches!(error, BlockError::NotWritable { .. }));
    assert!(open(&file, true).is_ok());
    for path in ["/dev", "/dev/zero"] {
        let file = File::open(path).unwrap();
        let error = open(&file, true).err().unwrap();
        assert!(matches!(error, BlockError::Kind { .. }), "{path}");
    }
}

#[test]
fn a_saved_disk_goes_on_where_it_was() {
    let (file, mut old) = disk(false);
    assert_eq!(request(&mut old, 0, 1, &[w(DATA, 512)]), 0);
    let transport = old.transport.save();
    let state = old.device.lock().unwrap().save();
    let block = Block::restore(config(&file, false), &state).unwrap();
    assert_eq!(block.save(), state);
    let mut driver = FakeDriver::restored(block, &old, &transport);
    assert_eq!(driver.transport.save(), transport);
    assert_eq!(request(&mut driver, 0, 2, &[w(DATA, 512)]), 0);
    assert_eq!(driver.read(DATA, 1), [2]);
}

#[test]
fn another_disk_is_refused_at_restore() {
    let (file, driver) = disk(false);
    let state = driver.device.lock().unwrap().save();
    let error = Block::restore(config(&file, true), &state).err().unwrap();
    assert_eq!(
        error.to_string(),
        "the disk disk.img is read-only, the saved one was not"
    );
    file.set_len(4096).unwrap();
    let error = Block::restore(config(&file, false), &state).err().unwrap();
    assert!(matches!(error, BlockError::SavedSize { sectors: 8, .. }));
}
