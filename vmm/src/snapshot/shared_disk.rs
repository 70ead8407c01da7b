//! Disks of a moment on their way to another process: what they rest on, as open files and a description of those.
//!
//! A disk's files are, in this order: the file at the bottom, where that is no snapshot's, with its saved blocks; the maps of the layers' blocks, one behind the
//! other, if there are layers; and of each layer, the oldest first, its file and its saved blocks.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use snapshot_fmt::manifest::Machine;

use super::SnapshotError;
use super::branch::memory_file;
use crate::devices::live::Disks;
use crate::devices::virtio::blk::SECTOR;
use crate::devices::virtio::blk::allowance::Allowance;
use crate::devices::virtio::blk::block_map::BlockMap;
use crate::devices::virtio::blk::frozen::FrozenFile;
use crate::devices::virtio::blk::share::Sharing;
use crate::devices::virtio::blk::stack::{Backing, Base, Layer, blocks_of, scratch_file};

/// What a machine's disk rests on, but for a snapshot's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskParts {
    /// The number of its drive.
    pub drive: usize,
    /// Whether it has a file at the bottom. Otherwise that is the snapshot that the machine begins with.
    pub frozen: bool,
    /// How many layers are on that.
    pub layers: usize,
}

impl DiskParts {
    /// How many files it has.
    pub fn files(&self) -> usize {
        let pairs = usize::from(self.frozen).saturating_add(self.layers);
        pairs
            .saturating_mul(2)
            .saturating_add(usize::from(self.layers > 0))
    }

    /// Makes a disk of `machine` of the next of `files`, and of `base` where it rests on a snapshot.
    pub fn open(
        self,
        files: &mut impl Iterator<Item = File>,
        machine: &Machine,
        base: Option<Backing>,
    ) -> Result<Backing, SnapshotError> {
        let Self { drive, .. } = self;
        let failed = |source| SnapshotError::SharedDisk { drive, source };
        let other = |what: &'static str| failed(io::Error::other(what));
        let writable = machine.drives.get(drive).filter(|drive| !drive.read_only);
        let drive = writable.ok_or_else(|| other("it is none that the guest may write to"))?;
        let bytes = drive.bytes / SECTOR * SECTOR;
        let blocks = blocks_of(0, bytes).end;
        let missing = || other("a file is missing");
        let frozen = |files: &mut dyn Iterator<Item = File>| -> Result<_, SnapshotError> {
            let mut next = || files.next().ok_or_else(missing);
            Ok(FrozenFile::new(next()?, next()?, bytes))
        };
        let mut backing = match base {
            _ if self.frozen => Base::Frozen(Arc::new(frozen(files)?)).into(),
            Some(base) => base,
            None => return Err(other("it rests on no snapshot")),
        };
        if self.layers == 0 {
            return Ok(backing);
        }
        let maps = files.next().ok_or_else(missing)?;
        for number in 0..self.layers {
            let at = BlockMap::file_len(blocks).saturating_mul(number as u64);
            let has = BlockMap::read(&maps, at, blocks).map_err(failed)?;
            let blocks = frozen(files)?;
            backing.layers.push(Arc::new(Layer { has, blocks }));
        }
        Ok(backing)
    }
}

/// A disk of a machine that is about to be branched.
pub struct DiskToShare {
    drive: usize,
    sharing: Sharing,
}

impl DiskToShare {
    /// Makes what is needed for each of `disks`, in the file system of `dir`; `name` is nobody else's there. What is kept of them may come to `allowance`.
    pub fn all(
        disks: &Disks,
        dir: &Path,
        name: &str,
        allowance: &Arc<Allowance>,
    ) -> Result<Vec<Self>, SnapshotError> {
        let disks = disks.iter().map(|(&drive, disk)| {
            let scratch = scratch_file(dir, &format!("{name}-{drive}"), disk.blocks());
            let sharing = scratch.and_then(|scratch| Sharing::new(disk, scratch, allowance));
            let sharing = sharing.map_err(|source| SnapshotError::Io {
                path: dir.to_owned(),
                source,
            })?;
            Ok(Self { drive, sharing })
        });
        disks.collect()
    }

    /// The moment is now: the machine stands still.
    pub fn freeze(self) -> FrozenBacking {
        FrozenBacking {
            drive: self.drive,
            backing: self.sharing.begin(),
        }
    }
}

/// What a disk rests on that was frozen.
pub struct FrozenBacking {
    drive: usize,
    backing: Backing,
}

/// A disk of a moment. As long as this or a child's disk is there, what the disk was is kept.
pub struct SharedDisk {
    /// What it consists of.
    pub parts: DiskParts,
    backing: Backing,
    maps: Option<File>,
}

impl FrozenBacking {
    /// Makes it ready to be sent. The machine runs on already.
    pub fn pack(self) -> Result<SharedDisk, SnapshotError> {
        let Self { drive, backing } = self;
        let parts = DiskParts {
            drive,
            frozen: matches!(backing.base, Base::Frozen(_)),
            layers: backing.layers.len(),
        };
        let maps = match &*backing.layers {
            [] => None,
            layers => Some(
                write_maps(layers, backing.blocks())
                    .map_err(|source| SnapshotError::SharedDisk { drive, source })?,
            ),
        };
        Ok(SharedDisk {
            parts,
            backing,
            maps,
        })
    }
}

fn write_maps(layers: &[Arc<Layer>], blocks: u64) -> io::Result<File> {
    let file = memory_file("maps")?;
    let len = BlockMap::file_len(blocks);
    file.set_len(len.saturating_mul(layers.len() as u64))?;
    for (layer, number) in layers.iter().zip(0..) {
        layer.has.write(&file, len * number)?;
    }
    Ok(file)
}

impl SharedDisk {
    /// Its files, in order.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        let base = match &self.backing.base {
            Base::Frozen(file) => Some(file.files()),
            Base::Saved(_) => None,
        };
        let layers = self.backing.layers.iter();
        let layers = layers.flat_map(|layer| layer.blocks.files());
        base.into_iter().flatten().chain(&self.maps).chain(layers)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use snapshot_fmt::PAGE_SIZE;
    use snapshot_fmt::manifest::{Drive, KernelFile};

    use super::*;
    use crate::devices::virtio::blk::Disk;
    use crate::devices::virtio::blk::stack::BlockSource;

    const PAGES: usize = 5;
    const BLOCKS: u64 = PAGES as u64;
    const SECTORS: u64 = BLOCKS * 8;

    /// A snapshot's disk, which is all zero.
    struct Zeroes;

    impl BlockSource for Zeroes {
        fn blocks(&self) -> u64 {
            BLOCKS
        }

        fn read(&self, _: u64, bytes: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
            bytes.fill(0);
            Ok(())
        }

        fn next_data(&self, _: u64) -> io::Result<Option<std::ops::Range<u64>>> {
            Ok(None)
        }
    }

    /// A machine whose drive 1 is writable.
    fn machine() -> Machine {
        let drive = |read_only| Drive {
            path: "disk".to_owned(),
            read_only,
            interface: "blk".to_owned(),
            bytes: SECTORS * 512,
            mtime_ns: 0,
            digest: None,
        };
        Machine {
            cpus: 1,
            memory: Vec::new(),
            kernel: KernelFile {
                path: "vmlinux".to_owned(),
                digest: None,
            },
            cmdline: String::new(),
            drives: vec![drive(true), drive(false)],
            vsock_cid: None,
            lane: false,
        }
    }

    fn zeroes() -> Option<Backing> {
        Some(Base::Saved(Arc::new(Zeroes)).into())
    }

    /// A file of blocks that have this byte, with no block saved.
    fn frozen(byte: u8) -> FrozenFile {
        let [file, saved] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let bytes = vec![byte; PAGE_SIZE * PAGES];
        file.write_all_at(&bytes, 0).unwrap();
        saved.set_len(BLOCKS * (PAGE_SIZE as u64 + 1)).unwrap();
        FrozenFile::new(file, saved, SECTORS * 512)
    }

    fn layer(byte: u8, block: u64) -> Arc<Layer> {
        let has = BlockMap::new(BLOCKS);
        has.add(block..block + 1);
        let blocks = frozen(byte);
        Arc::new(Layer { has, blocks })
    }

    fn pack(backing: Backing) -> (DiskParts, Vec<File>) {
        let disk = FrozenBacking { drive: 1, backing }.pack().unwrap();
        let files: Vec<_> = disk.files().map(|file| file.try_clone().unwrap()).collect();
        assert_eq!(files.len(), disk.parts.files());
        (disk.parts, files)
    }

    /// The blocks' first bytes.
    fn content(backing: Backing) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::over(backing, SECTORS, dir.path(), "overlay");
        let disks = Disks::from([(1, Arc::new(disk.unwrap()))]);
        let mut saved = crate::snapshot::disk_layer::DiskToSave::all(&disks, dir.path()).unwrap();
        let (summary, moment) = saved.remove(0).freeze().write(None).unwrap();
        assert_eq!(summary.zero_pages, 0);
        let mut bytes = [0; PAGE_SIZE];
        let first_byte = |block| {
            moment.read(block, &mut bytes).unwrap();
            bytes[0]
        };
        (0..BLOCKS).map(first_byte).collect()
    }

    #[test]
    fn a_disk_arrives_as_it_went() {
        for (base, byte) in [
            (zeroes().unwrap(), 0),
            (Base::Frozen(Arc::new(frozen(9))).into(), 9),
        ] {
            for layers in [vec![], vec![layer(1, 1), layer(2, 2)]] {
                let backing = Backing {
                    layers,
                    ..base.clone()
                };
                let mut expected = [byte; PAGES];
                if !backing.layers.is_empty() {
                    expected[1..3].copy_from_slice(&[1, 2]);
                }
                let (parts, files) = pack(backing);
                let json = serde_json::to_string(&parts).unwrap();
                let parts: DiskParts = serde_json::from_str(&json).unwrap();
                let opened = parts.open(&mut files.into_iter(), &machine(), zeroes());
                assert_eq!(content(opened.unwrap()), expected);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let backing = Backing {
            layers: vec![layer(1, 1)],
            ..zeroes().unwrap()
        };
        let (parts, files) = pack(backing);
        let open = |parts: DiskParts, count: usize, base| {
            let files = files.iter().map(|file| file.try_clone().unwrap());
            let opened = parts.open(&mut files.take(count), &machine(), base);
            opened.err().unwrap().to_string()
        };
        for drive in [0, 2] {
            let error = open(DiskParts { drive, ..parts }, 9, zeroes());
            assert!(
                error.contains("none that the guest may write to"),
                "{error}"
            );
        }
        assert!(open(parts, 9, None).contains("rests on no snapshot"));
        for count in 0..3 {
            assert!(open(parts, count, zeroes()).contains("is missing"));
        }
        let layers = usize::MAX;
        let error = open(DiskParts { layers, ..parts }, 9, zeroes());
        assert!(error.contains("drive 1"), "{error}");
        assert_eq!(DiskParts { layers, ..parts }.files(), usize::MAX);
    }
}
