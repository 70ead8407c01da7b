//! The block device, on an image in memory or restored from one, and saved meanwhile.

use std::fs::File;
use std::io;
use std::ops::Range as Blocks;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::Arbitrary;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm::devices::virtio::blk::backup::{Moment, Preparation};
use vmm::devices::virtio::blk::share::Sharing;
use vmm::devices::virtio::blk::stack::{BLOCK, BlockBytes, BlockSource};
use vmm::devices::virtio::blk::{Block, BlockConfig, Disk};
use vmm::devices::virtio::testing::{r, w};

use crate::guest::{BUFFERS, Guest, MAX_STEPS, desc};
use crate::step::{Buffer, Step};

const SECTORS: u64 = 64;
const HEADER: u64 = BUFFERS;
const RANGES: u64 = BUFFERS + 0x100;
const STATUS: u64 = BUFFERS + 0xff0;

/// The guest may only read.
const READ_ONLY: u8 = 1;
/// The disk was saved, and has an overlay.
const RESTORED: u8 = 2;
/// The disk is saved as it is before the first step, while they are taken.
const MOMENT: u8 = 4;
/// Another disk rests on what it is half way.
const SHARED: u8 = 8;

/// A disk and steps of its driver.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    /// [`READ_ONLY`], or [`RESTORED`]; and [`MOMENT`], and [`SHARED`] where it is not read-only.
    kind: u8,
    steps: Vec<BlkStep>,
}

/// A sector.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Sector {
    /// On the disk, or a little beyond.
    Near(u8),
    /// Anywhere.
    Any(u64),
}

impl Sector {
    fn number(self) -> u64 {
        match self {
            Self::Near(sector) => u64::from(sector) % (SECTORS + 2),
            Self::Any(sector) => sector,
        }
    }
}

/// A range to discard or to zero: first sector, sectors, flags.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Range(Sector, u16, u8);

/// A step.
#[derive(Arbitrary, Clone, Debug)]
pub enum BlkStep {
    /// Any driver's.
    Any(Step),
    /// A request of this type with these buffers.
    Request(u8, Sector, Vec<Buffer>),
    /// A request that makes sense: read or write.
    Transfer(bool, Sector, u8),
    /// A request for these ranges: discard or zero.
    Ranges(bool, Vec<Range>),
}

/// A saved disk.
struct Saved(Vec<u8>);

impl BlockSource for Saved {
    fn blocks(&self) -> u64 {
        self.0.len() as u64 / BLOCK
    }

    fn read(&self, block: u64, bytes: &mut BlockBytes) -> io::Result<()> {
        bytes.copy_from_slice(&self.0[(block * BLOCK) as usize..][..BLOCK as usize]);
        Ok(())
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Blocks<u64>>> {
        Ok((from < self.blocks()).then(|| from..self.blocks()))
    }
}

fn memory_file() -> File {
    File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memory file"))
}

/// The moment is now.
fn begin(disk: &Arc<Disk>) -> Moment {
    let scratch = memory_file();
    scratch.set_len(SECTORS * 512).expect("a scratch file");
    Preparation::new(disk, scratch).begin()
}

/// A disk that rests on what `disk` is now.
fn child(disk: &Arc<Disk>) -> Arc<Disk> {
    let sharing = Sharing::new(disk, memory_file(), &Arc::default()).expect("a shared disk");
    let (dir, name) = (std::env::temp_dir(), std::process::id().to_string());
    let child = Disk::over(sharing.begin(), SECTORS, &dir, &name);
    Arc::new(child.expect("a child's disk"))
}

fn content(moment: &Moment) -> Vec<u8> {
    let mut bytes = [0; BLOCK as usize];
    (0..moment.blocks())
        .flat_map(|block| {
            moment.read(block, &mut bytes).expect("a block");
            bytes
        })
        .collect()
}

/// Runs the device under the driver.
pub fn run(input: &Input) {
    let read_only = input.kind & READ_ONLY != 0;
    let file = memory_file();
    let image: Vec<u8> = (0..SECTORS)
        .flat_map(|sector| [sector as u8 ^ 0x5a; 512])
        .collect();
    file.write_all_at(&image, 0).expect("an image");
    let restored = input.kind & RESTORED != 0 && !read_only;
    let disk = if restored {
        let (dir, name) = (std::env::temp_dir(), std::process::id().to_string());
        Disk::of_saved(Arc::new(Saved(image.clone())), SECTORS, &dir, &name)
    } else {
        let own = file.try_clone().expect("a descriptor");
        Disk::of_file(own, "fuzz".as_ref(), read_only)
    };
    let disk = Arc::new(disk.expect("a disk"));
    let moment = (input.kind & MOMENT != 0).then(|| begin(&disk));
    let config = BlockConfig {
        disk: Arc::clone(&disk),
        path: "fuzz".into(),
        id: "fuzz".into(),
    };
    let mut guest = Guest::new(Block::new(config).expect("a device"));
    guest.restart(true);
    let steps = &input.steps[..input.steps.len().min(MAX_STEPS)];
    let (before, after) = steps.split_at(steps.len() / 2);
    before.iter().for_each(|step| take(&mut guest, step));
    let child = (input.kind & SHARED != 0 && !read_only).then(|| {
        guest.driver.run();
        (child(&disk), content(&begin(&disk)))
    });
    after.iter().for_each(|step| take(&mut guest, step));
    guest.driver.run();
    if let Some((child, then)) = child {
        assert!(content(&begin(&child)) == then, "the child is another now");
    }
    guest.check_memory();
    if let Some(moment) = moment {
        assert!(content(&moment) == image, "the moment is another now");
    }
    let now = content(&begin(&disk));
    assert!(!read_only || now == image, "a read-only disk was written");
    let mut in_file = vec![0; image.len() + 1];
    let len = file.read_at(&mut in_file, 0).expect("the image");
    assert_eq!(len, image.len(), "the image has another length");
    let expected = if restored { &image } else { &now };
    assert!(in_file[..len] == expected[..], "the image is another");
    guest.restart(true);
    header(&mut guest, 0, 0);
    guest
        .driver
        .request(0, &[r(HEADER, 16), w(RANGES, 512), w(STATUS, 1)]);
    assert_eq!(guest.driver.read(STATUS, 1), [0]);
    assert_eq!(guest.driver.read(RANGES, 512), now[..512]);
}

fn take(guest: &mut Guest<Block>, step: &BlkStep) {
    match *step {
        BlkStep::Any(ref step) => guest.step(step),
        BlkStep::Request(kind, sector, ref buffers) => {
            header(guest, kind.into(), sector.number());
            let mut chain = vec![r(HEADER, 16)];
            chain.extend(buffers.iter().take(8).map(|&buffer| desc(buffer)));
            chain.push(w(STATUS, 1));
            guest.offer(0, &chain);
        }
        BlkStep::Transfer(write, sector, sectors) => {
            header(guest, write.into(), sector.number());
            let len = u32::from(sectors % 8) * 512;
            let data = if write { r } else { w };
            guest.offer(
                0,
                &[r(HEADER, 16), data(BUFFERS + 0x2000, len), w(STATUS, 1)],
            );
        }
        BlkStep::Ranges(discard, ref ranges) => {
            header(guest, if discard { 11 } else { 13 }, 0);
            let mut len = 0;
            for &Range(sector, sectors, flags) in ranges.iter().take(20) {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&sector.number().to_le_bytes());
                bytes[8..10].copy_from_slice(&sectors.to_le_bytes());
                bytes[12] = flags;
                guest.write(RANGES + u64::from(len), &bytes);
                len += 16;
            }
            guest.offer(0, &[r(HEADER, 16), r(RANGES, len), w(STATUS, 1)]);
        }
    }
}

fn header(guest: &mut Guest<Block>, kind: u32, sector: u64) {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    guest.write(HEADER, &bytes);
}
