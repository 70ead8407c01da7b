//! A disk of one moment, written as a layer while the guest writes on; and layers as what a restored disk rests on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::chain::Chain;
use snapshot_fmt::delta::DeltaWriter;
use snapshot_fmt::layer::LayerSummary;
use snapshot_fmt::manifest::disk_layer;

use super::SnapshotError;
use crate::devices::live::Disks;
use crate::devices::virtio::blk::backup::{Moment, Preparation};
use crate::devices::virtio::blk::stack::{BlockBytes, BlockSource, scratch_file};

/// The layers of disks, by the numbers of their drives.
pub type DiskChains = BTreeMap<usize, Arc<Chain>>;

/// Each block is checked as it is read.
impl BlockSource for Chain {
    fn blocks(&self) -> u64 {
        self.total_pages()
    }

    fn read(&self, block: u64, bytes: &mut BlockBytes) -> io::Result<()> {
        self.read_page(block, bytes).map_err(io::Error::other)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let runs = self.data_runs();
        let run = runs.get(runs.partition_point(|run| run.end() <= from));
        Ok(run.map(|run| run.first_page.max(from)..run.end()))
    }
}

/// A disk of a machine that is about to be saved.
pub struct DiskToSave {
    drive: usize,
    layer: File,
    path: PathBuf,
    preparation: Preparation,
}

impl DiskToSave {
    /// Makes what is needed in `dir`, which goes with it, for each of `disks`.
    pub fn all(disks: &Disks, dir: &Path) -> Result<Vec<Self>, SnapshotError> {
        let disks = disks.iter().map(|(&drive, disk)| {
            let path = dir.join(disk_layer(drive));
            let made = File::options().write(true).create_new(true).open(&path);
            let failed = |source| SnapshotError::Io {
                path: path.clone(),
                source,
            };
            let layer = made.map_err(failed)?;
            let scratch = scratch_file(dir, "scratch", disk.blocks()).map_err(failed)?;
            Ok(Self {
                drive,
                layer,
                path,
                preparation: Preparation::new(disk, scratch),
            })
        });
        disks.collect()
    }

    /// The moment is now: the machine stands still.
    pub fn freeze(self) -> FrozenDisk {
        FrozenDisk {
            drive: self.drive,
            layer: self.layer,
            path: self.path,
            moment: self.preparation.begin(),
        }
    }
}

/// A disk of the moment at which its machine stood still.
pub struct FrozenDisk {
    /// The number of its drive.
    pub drive: usize,
    layer: File,
    path: PathBuf,
    moment: Moment,
}

impl FrozenDisk {
    /// Writes it: what has changed since it was what `parent` has, or all of it. It is not kept in the guest's way any longer, and it is to be
    /// [kept](Moment::keep) once the layer is part of a snapshot.
    pub fn write(self, parent: Option<&Chain>) -> Result<(LayerSummary, Moment), SnapshotError> {
        let Self {
            drive,
            layer,
            path,
            moment,
        } = self;
        let cannot_read = |source| SnapshotError::Disk { drive, source };
        let mut layer = DeltaWriter::new(layer, &path, moment.blocks(), parent)?;
        let mut bytes = [0; PAGE_SIZE];
        let mut next = 0;
        loop {
            let run = match parent {
                Some(_) => moment.next_changed(next),
                None => moment.next_data(next).map_err(cannot_read)?,
            };
            let Some(run) = run else { break };
            next = run.end;
            for block in run {
                moment.read(block, &mut bytes).map_err(cannot_read)?;
                layer.put(block, &bytes)?;
            }
        }
        moment.release();
        let (summary, _) = layer.finish()?;
        Ok((summary, moment))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use snapshot_fmt::layer::Layer;

    use super::*;
    use crate::devices::virtio::blk::{Block, BlockConfig, Disk};
    use crate::devices::virtio::testing::{BUFFERS, FakeDriver, r, w};

    const PAGES: usize = 8;

    /// A guest that writes to a disk.
    struct Guest(FakeDriver<Block>);

    impl Guest {
        fn of(disk: &Arc<Disk>) -> Self {
            let config = BlockConfig {
                disk: Arc::clone(disk),
                path: "disk".into(),
                id: "disk".into(),
            };
            Self(FakeDriver::started(Block::new(config).unwrap()))
        }

        /// Fills a page.
        fn fill(&mut self, page: u64, byte: u8) {
            let [header, data, status] = [0, 0x1000, 0x100].map(|at| BUFFERS + at);
            let head = [1u32.to_le_bytes(), [0; 4]].concat();
            let sector = (page * 8).to_le_bytes();
            self.0.write(header, &[&head[..], &sector].concat());
            self.0.write(data, &[byte; PAGE_SIZE]);
            self.0
                .request(0, &[r(header, 16), r(data, 4096), w(status, 1)]);
            assert_eq!(self.0.read(status, 1), [0]);
        }
    }

    fn disks(disk: &Arc<Disk>) -> Disks {
        Disks::from([(3, Arc::clone(disk))])
    }

    fn freeze(disk: &Arc<Disk>, dir: &Path) -> FrozenDisk {
        let [one] = DiskToSave::all(&disks(disk), dir)
            .unwrap()
            .try_into()
            .ok()
            .unwrap();
        one.freeze()
    }

    fn layer(dir: &Path) -> Layer {
        let path = dir.join("disk-3.layer");
        Layer::open(File::open(&path).unwrap(), &path).unwrap()
    }

    fn restored(layers: Vec<Layer>) -> Arc<Disk> {
        let chain = Arc::new(Chain::new(layers).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::of_saved(chain, PAGES as u64 * 8, dir.path(), "overlay");
        Arc::new(disk.unwrap())
    }

    /// The pages' first bytes.
    fn content(disk: &Arc<Disk>) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let moment = freeze(disk, dir.path()).moment;
        let mut bytes = [0; PAGE_SIZE];
        let first_byte = |page| {
            moment.read(page, &mut bytes).unwrap();
            bytes[0]
        };
        (0..moment.blocks()).map(first_byte).collect()
    }

    /// A disk in a file with one page of data.
    fn in_file() -> Arc<Disk> {
        let file = tempfile::tempfile().unwrap();
        file.set_len((PAGES * PAGE_SIZE) as u64).unwrap();
        file.write_all_at(&[1; PAGE_SIZE], 4096).unwrap();
        Arc::new(Disk::of_file(file, "disk".as_ref(), false).unwrap())
    }

    #[test]
    fn layers_stack_to_the_disk_of_each_moment() {
        let dirs = [(); 4].map(|()| tempfile::tempdir().unwrap());
        let [a, b, c, full] = [0, 1, 2, 3].map(|nth| dirs[nth].path());
        let disk = in_file();
        let mut guest = Guest::of(&disk);
        guest.fill(2, 2);
        let frozen = freeze(&disk, a);
        // After the moment, over data and into a hole.
        guest.fill(2, 9);
        guest.fill(5, 9);
        let (summary, moment) = frozen.write(None).unwrap();
        moment.keep();
        assert_eq!((summary.data_pages, summary.zero_pages), (2, 0));

        guest.fill(1, 0);
        let parent = Chain::new(vec![layer(a)]).unwrap();
        let frozen = freeze(&disk, b);
        guest.fill(5, 8);
        let (summary, moment) = frozen.write(Some(&parent)).unwrap();
        moment.keep();
        assert_eq!((summary.data_pages, summary.zero_pages), (2, 1));

        let copy = restored(vec![layer(a)]);
        assert_eq!(content(&copy), [0, 1, 2, 0, 0, 0, 0, 0]);
        let copy = restored(vec![layer(a), layer(b)]);
        assert_eq!(content(&copy), [0, 0, 9, 0, 0, 9, 0, 0]);
        let mut guest = Guest::of(&copy);
        guest.fill(7, 7);
        // What it was already is no difference.
        guest.fill(2, 9);
        let parent = Chain::new(vec![layer(a), layer(b)]).unwrap();
        let (summary, moment) = freeze(&copy, c).write(Some(&parent)).unwrap();
        assert_eq!((summary.data_pages, summary.zero_pages), (1, 0));
        moment.keep();
        let (summary, _) = freeze(&copy, full).write(None).unwrap();
        assert_eq!((summary.data_pages, summary.zero_pages), (3, 0));
        for layers in [vec![layer(a), layer(b), layer(c)], vec![layer(full)]] {
            assert_eq!(content(&restored(layers)), [0, 0, 9, 0, 0, 9, 0, 7]);
        }
        assert_eq!(content(&disk), [0, 0, 9, 0, 0, 8, 0, 0]);
    }

    #[test]
    fn what_fails_leaves_the_next_difference_whole() {
        let dirs = [(); 4].map(|()| tempfile::tempdir().unwrap());
        let [a, b, c, d] = [0, 1, 2, 3].map(|nth| dirs[nth].path());
        let disk = in_file();
        let mut guest = Guest::of(&disk);
        freeze(&disk, a).write(None).unwrap().1.keep();
        let parent = Chain::new(vec![layer(a)]).unwrap();
        guest.fill(3, 3);
        let full = || File::options().read(true).write(true).open("/dev/full");

        let mut frozen = freeze(&disk, b);
        frozen.layer = full().unwrap();
        let error = frozen.write(Some(&parent)).err().unwrap().to_string();
        assert!(error.contains("disk-3.layer"), "{error}");

        let [mut to_save] = DiskToSave::all(&disks(&disk), c)
            .unwrap()
            .try_into()
            .ok()
            .unwrap();
        to_save.preparation = Preparation::new(&disk, full().unwrap());
        let frozen = to_save.freeze();
        guest.fill(3, 4);
        let error = frozen.write(Some(&parent)).err().unwrap().to_string();
        assert!(
            error.contains("drive 3") && error.contains("runs on"),
            "{error}"
        );

        // Written, and then not part of a snapshot.
        let (summary, moment) = freeze(&disk, d).write(Some(&parent)).unwrap();
        assert_eq!(summary.data_pages, 1);
        drop(moment);
        std::fs::remove_file(d.join("disk-3.layer")).unwrap();
        let (summary, _) = freeze(&disk, d).write(Some(&parent)).unwrap();
        assert_eq!(summary.data_pages, 1);
        assert_eq!(
            content(&restored(vec![layer(a), layer(d)])),
            [0, 1, 0, 4, 0, 0, 0, 0]
        );
    }
}
