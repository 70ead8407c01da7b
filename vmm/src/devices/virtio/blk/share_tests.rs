//! Disks that rest on another's moment, under drivers that behave: whoever of them writes, the others are what they were.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use snapshot_fmt::PAGE_SIZE;

use super::allowance::Allowance;
use super::disk_tests::{
    IOERR, LEN, OK, begin, changed, content, data, driver, read, restored, scratch, write, zero,
};
use super::share::Sharing;
use super::stack::{Backing, Base, BlockSource};
use super::tests::{DATA, SECTORS, image, open, range, request};
use super::{Block, Disk};
use crate::devices::virtio::testing::{FakeDriver, r, w};

fn share(disk: &Arc<Disk>) -> Backing {
    share_of(disk, &Arc::default())
}

fn share_of(disk: &Arc<Disk>, allowance: &Arc<Allowance>) -> Backing {
    let sharing = Sharing::new(disk, scratch(disk.blocks()), allowance);
    sharing.unwrap().begin()
}

/// A disk on the moment of another.
fn child(backing: Backing) -> Arc<Disk> {
    let dir = tempfile::tempdir().unwrap();
    Arc::new(Disk::over(backing, SECTORS, dir.path(), "overlay").unwrap())
}

fn all(driver: &mut FakeDriver<Block>) -> Vec<u8> {
    read(driver, SECTORS)
}

/// A disk of its own file, or a restored one; both with something written.
fn parents() -> [Arc<Disk>; 2] {
    let parents = [Arc::new(open(&image(), false).unwrap()), restored().0];
    for parent in &parents {
        assert_eq!(write(&mut driver(parent), 12, &[0xaa; 8192]), OK);
    }
    parents
}

#[test]
fn each_of_a_family_has_what_was_before_and_its_own() {
    for parent in parents() {
        let mut own = driver(&parent);
        let before = all(&mut own);
        let kids = [(); 2].map(|()| child(share(&parent)));
        let [mut one, mut other] = [driver(&kids[0]), driver(&kids[1])];
        // Over what it had written, over what it had not, and a part of a block.
        assert_eq!(write(&mut own, 8, &[0xb0; 4096 + 512]), OK);
        assert_eq!(write(&mut own, 64, &[0xb1; 512]), OK);
        assert_eq!(zero(&mut own, 13, 100, 9), OK);
        let mut after = before.clone();
        after[8 * 512..17 * 512].fill(0xb0);
        after[64 * 512..65 * 512].fill(0xb1);
        after[100 * 512..109 * 512].fill(0);
        assert_eq!(write(&mut one, 15, &[0xc0; 512]), OK);
        let mut of_one = before.clone();
        of_one[15 * 512..16 * 512].fill(0xc0);
        // A grandchild, and a child of a later moment.
        let grandchild = child(share(&kids[0]));
        let late = child(share(&parent));
        assert_eq!(write(&mut one, 15, &[0xc1; 512]), OK);
        assert_eq!(write(&mut one, 127, &[0xc2; 512]), OK);
        assert_eq!(write(&mut own, 0, &[0xb2; LEN]), OK);
        assert_eq!(all(&mut own), [0xb2; LEN]);
        assert_eq!(all(&mut other), before);
        assert_eq!(all(&mut driver(&grandchild)), of_one);
        assert_eq!(all(&mut driver(&late)), after);
        of_one[15 * 512..16 * 512].fill(0xc1);
        of_one[127 * 512..].fill(0xc2);
        assert_eq!(all(&mut one), of_one);
        // The parent ends, and then the child.
        drop((own, parent));
        assert_eq!(all(&mut other), before);
        drop((one, other, kids));
        of_one[15 * 512..16 * 512].fill(0xc0);
        of_one[127 * 512..].copy_from_slice(&before[127 * 512..]);
        assert_eq!(all(&mut driver(&grandchild)), of_one);
    }
}

/// Whatever a block was at the moment, it is for good.
#[test]
fn children_read_while_the_parent_writes() {
    let parent = Arc::new(open(&image(), false).unwrap());
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut own = driver(&parent);
            for byte in (0..u8::MAX).cycle() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                assert_eq!(write(&mut own, 0, &[byte; PAGE_SIZE]), OK);
            }
        });
        let reader = scope.spawn(|| {
            for _ in 0..1000 {
                let Base::Frozen(file) = share(&parent).base else {
                    panic!("no file of its own");
                };
                let block = || {
                    let mut bytes = [0; PAGE_SIZE];
                    file.read(0, &mut bytes).unwrap();
                    bytes
                };
                let first = block();
                for _ in 0..5 {
                    assert!(block() == first);
                }
            }
        });
        let read = reader.join();
        ended.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        read.unwrap();
    });
}

#[test]
fn a_child_of_a_restored_disk_differs_from_what_that_was_saved_as() {
    let (parent, _) = restored();
    let mut own = driver(&parent);
    assert_eq!(write(&mut own, 16, &[1; 512]), OK);
    let kid = child(share(&parent));
    assert_eq!(write(&mut own, 24, &[1; 512]), OK);
    assert_eq!(write(&mut driver(&kid), 40, &[1; 512]), OK);
    let grandchild = child(share(&kid));
    assert_eq!(write(&mut driver(&grandchild), 16, &[1; 512]), OK);
    assert_eq!(write(&mut driver(&grandchild), 56, &[1; 512]), OK);
    assert_eq!(changed(&begin(&parent)), [2, 3]);
    assert_eq!(changed(&begin(&kid)), [2, 5]);
    assert_eq!(changed(&begin(&grandchild)), [2, 5, 7]);
    // What is saved of it is what it reads.
    let expected = all(&mut driver(&grandchild));
    let moment = begin(&grandchild);
    assert_eq!(content(&moment).unwrap(), expected);
    assert_eq!(data(&moment)[..5], [1, 2, 3, 5, 7]);
}

#[test]
fn what_was_data_is_so_for_a_child_although_it_is_a_hole_now() {
    let file = image();
    let parent = Arc::new(open(&file, false).unwrap());
    let mut own = driver(&parent);
    assert_eq!(zero(&mut own, 11, 8, 24), OK);
    let kid = child(share(&parent));
    let holes = |kid| {
        let data = data(&begin(kid));
        (0..16)
            .filter(|block| !data.contains(block))
            .collect::<Vec<_>>()
    };
    assert_eq!(holes(&kid), [1, 2, 3]);
    // With unmap.
    own.write(DATA, &range(32, 32, 1));
    assert_eq!(request(&mut own, 13, 0, &[r(DATA, 16)]), OK);
    assert_eq!(write(&mut own, 16, &[7; 512]), OK);
    let data = data(&begin(&kid));
    assert!((4..16).all(|block| data.contains(&block)), "{data:?}");
}

#[test]
fn nothing_is_saved_for_those_that_are_gone() {
    let file = image();
    let parent = Arc::new(open(&file, false).unwrap());
    let mut own = driver(&parent);
    let before = all(&mut own);
    let kid = child(share(&parent));
    let grandchild = child(share(&kid));
    // A discard would have to be saved.
    assert_eq!(zero(&mut own, 11, 8, 8), OK);
    assert_eq!(all(&mut own), before);
    drop(kid);
    assert_eq!(write(&mut own, 0, &[1; 512]), OK);
    assert_eq!(all(&mut driver(&grandchild)), before);
    drop(grandchild);
    assert_eq!(zero(&mut own, 11, 8, 8), OK);
    assert_eq!(all(&mut own)[8 * 512..16 * 512], [0; PAGE_SIZE]);
}

#[test]
fn a_generation_that_wrote_is_a_layer() {
    let [parent, _] = parents();
    let mut expected = all(&mut driver(&parent));
    let mut disks = vec![parent];
    for generation in 1..=16u8 {
        let backing = share(&disks[disks.len() - 1]);
        // The first one's file is at the bottom, and every second one has written something.
        assert_eq!(backing.layers.len(), usize::from(generation - 1) / 2);
        disks.push(child(backing));
        let mut own = driver(&disks[disks.len() - 1]);
        assert_eq!(all(&mut own), expected);
        if generation % 2 == 0 {
            let sector = u64::from(generation) * 7;
            assert_eq!(write(&mut own, sector, &[generation; 1024]), OK);
            let at = usize::try_from(sector * 512).unwrap();
            expected[at..at + 1024].fill(generation);
        }
        // Nobody needs those above its parent to live.
        if disks.len() > 2 {
            disks.remove(0);
        }
    }
}

#[test]
fn moments_without_a_write_between_them_share_what_is_saved() {
    for parent in parents() {
        let mut own = driver(&parent);
        let before = all(&mut own);
        let inode = |backing: &Backing| {
            let file = match (&backing.base, backing.layers.last()) {
                (_, Some(layer)) => layer.blocks.files()[1],
                (Base::Frozen(file), None) => file.files()[1],
                _ => panic!("nothing is shared"),
            };
            file.metadata().unwrap().ino()
        };
        let first = share(&parent);
        let second = share(&parent);
        assert_eq!(inode(&first), inode(&second));
        drop(first);
        assert_eq!(write(&mut own, 12, &[1; 512]), OK);
        let third = share(&parent);
        assert_ne!(inode(&second), inode(&third));
        assert_eq!(all(&mut driver(&child(second))), before);
        let now = all(&mut own);
        assert_eq!(write(&mut own, 12, &[2; 512]), OK);
        assert_eq!(all(&mut driver(&child(third))), now);
        // What is before it is not in use any more.
        let fourth = share(&parent);
        assert_eq!(write(&mut own, 0, &[3; LEN]), OK);
        assert_ne!(all(&mut driver(&child(fourth))), [3; LEN]);
    }
}

#[test]
fn what_cannot_be_saved_costs_the_children_and_not_the_write() {
    let file = image();
    let parent = Arc::new(open(&file, false).unwrap());
    let mut own = driver(&parent);
    let scratch = memfd_create("scratch", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let scratch = File::from(scratch.unwrap());
    let sharing = Sharing::new(&parent, scratch.try_clone().unwrap(), &Arc::default()).unwrap();
    let kid = child(sharing.begin());
    let mut kid_driver = driver(&kid);
    assert_eq!(write(&mut kid_driver, 8, &[5; 4096]), OK);
    assert_eq!(request(&mut kid_driver, 0, 0, &[w(DATA, 512)]), OK);
    fcntl_add_seals(&scratch, SealFlags::WRITE).unwrap();
    assert_eq!(write(&mut own, 0, &[0xaa; 512]), OK);
    assert_eq!(all(&mut own)[..512], [0xaa; 512]);
    for sector in [0, 64] {
        assert_eq!(request(&mut kid_driver, 0, sector, &[w(DATA, 512)]), IOERR);
    }
    let error = content(&begin(&kid)).unwrap_err().to_string();
    assert!(
        error.contains("could not keep what its disk was"),
        "{error}"
    );
    // Its own it still has.
    assert_eq!(request(&mut kid_driver, 0, 8, &[w(DATA, 512)]), OK);
    assert_eq!(kid_driver.read(DATA, 512), [5; 512]);
}

#[test]
fn what_may_not_be_kept_costs_the_children_of_that_moment_alone() {
    const PAGE: u64 = PAGE_SIZE as u64;
    for parent in parents() {
        let mut own = driver(&parent);
        // What is saved of a restored disk is what its overlay has.
        assert_eq!(write(&mut own, 0, &[9; LEN]), OK);
        let allowance = Arc::new(Allowance::new(Some(3 * PAGE)));
        let fill = |own: &mut FakeDriver<Block>, block: u64, byte| {
            assert_eq!(write(own, block * 8, &[byte; PAGE_SIZE]), OK);
        };
        let first = child(share_of(&parent, &allowance));
        fill(&mut own, 0, 1);
        fill(&mut own, 1, 1);
        // Once is enough.
        fill(&mut own, 1, 2);
        let second = child(share_of(&parent, &allowance));
        let now = all(&mut own);
        // The first child has no use for this, and the second takes the last.
        fill(&mut own, 0, 3);
        assert_eq!(all(&mut driver(&first)), [9; LEN]);
        assert_eq!(all(&mut driver(&second)), now);
        // The first child's moment is the first that needs more.
        fill(&mut own, 2, 4);
        assert_eq!(request(&mut driver(&first), 0, 0, &[w(DATA, 512)]), IOERR);
        // What it had is the other's now.
        assert_eq!(all(&mut driver(&second)), now);
        fill(&mut own, 3, 5);
        assert_eq!(all(&mut driver(&second)), now);
        fill(&mut own, 4, 6);
        assert_eq!(request(&mut driver(&second), 0, 0, &[w(DATA, 512)]), IOERR);
        // And those that are gone have nothing.
        drop((first, second));
        let third = child(share_of(&parent, &allowance));
        let now = all(&mut own);
        (0..3).for_each(|block| fill(&mut own, block, 7));
        assert_eq!(all(&mut driver(&third)), now);
        drop(third);
        let fourth = child(share_of(&parent, &allowance));
        (0..3).for_each(|block| fill(&mut own, block, 8));
        assert_eq!(all(&mut driver(&fourth))[..PAGE_SIZE], [7; PAGE_SIZE]);
    }
}
