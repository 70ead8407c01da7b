//! A running machine's moment, in memory files, for machines that go on from it: its children.
//!
//! It is a snapshot that never sees a disk: the state, and a layer over what the machine's own memory began with. Children map the layers privately,
//! so they share what none of them writes to. The guest's own disks are shared likewise ([`super::shared_disk`]). The files live as long as anybody has them open or mapped, whoever of the family dies first.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use snapshot_fmt::chain::Chain;
use snapshot_fmt::layer::{Layer, LayerSummary};
use snapshot_fmt::manifest::{MEMORY, Machine as Description, Programs, STATE, Warm};
use snapshot_fmt::state::machine::MachineState;
use snapshot_fmt::state_file;

use super::SnapshotError;
use super::memory::Memory;
use super::memory_layer::{LayerInProgress, Lineage};
use super::restore::{Base, Saved};
use super::save::{self, Clock, Times};
use super::shared_disk::{DiskParts, DiskToShare, FrozenBacking, SharedDisk};
use crate::agent::Agent;
use crate::devices::virtio::blk::allowance::Allowance;
use crate::machine::Machine;
use crate::pager::Mode;
use crate::sys::fork::Child;

/// A machine's moment, but for its memory.
pub struct Point {
    /// A state file.
    pub state: File,
    /// The disks that the guest may write to.
    pub disks: Vec<SharedDisk>,
    /// When it was: [`Saved::moment`].
    pub moment: u64,
}

/// The memory of a machine's moment.
pub struct PointMemory {
    /// The layer over what memory began with.
    pub layer: File,
    /// What that came to.
    pub summary: LayerSummary,
    /// The process that has written it, which ends when this is dropped.
    pub writer: Child,
    /// How long it took.
    pub times: Times,
}

/// An empty file in memory.
pub(super) fn memory_file(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MemfdFlags::CLOEXEC)?))
}

/// An empty file in memory that is called as one of a snapshot.
fn file_of(name: &str) -> Result<File, SnapshotError> {
    memory_file(name).map_err(|source| SnapshotError::Io {
        path: name.into(),
        source,
    })
}

/// The memory of a moment that is still being written. The machine runs on already.
pub struct Freezing {
    layer: File,
    memory: LayerInProgress,
    clock: Clock,
}

/// Freezes `machine`, whose memory began with `origin`. It stands still for its state only. What its disks are is kept in the file system of `dir`, under no
/// name, as long as it comes to no more than `allowance`; `name` is nobody else's there meanwhile.
pub fn freeze(
    machine: &Machine,
    agent: Option<&Agent>,
    origin: Option<&Chain>,
    dir: &Path,
    name: &str,
    allowance: &Arc<Allowance>,
) -> Result<(Point, Freezing), SnapshotError> {
    let layer = file_of(MEMORY)?;
    let disks = DiskToShare::all(machine.disks(), dir, name, allowance)?;
    let lineage = Lineage::for_children(origin);
    let frozen = save::freeze(machine, agent, &layer, Path::new(MEMORY), lineage, || {
        disks
            .into_iter()
            .map(DiskToShare::freeze)
            .collect::<Vec<_>>()
    })?;
    let state = file_of(STATE)?;
    state_file::write(&state, Path::new(STATE), &frozen.state)?;
    let disks = frozen.disks.into_iter().map(FrozenBacking::pack);
    let point = Point {
        state,
        disks: disks.collect::<Result<_, _>>()?,
        moment: frozen.moment,
    };
    let freezing = Freezing {
        layer,
        memory: frozen.memory,
        clock: frozen.clock,
    };
    Ok((point, freezing))
}

impl Freezing {
    /// Waits until memory is written, or `is_given_up` says that nobody wants it any more.
    pub fn finish(self, is_given_up: &dyn Fn() -> bool) -> Result<PointMemory, SnapshotError> {
        let written = self.memory.finish(is_given_up);
        let (summary, writer) = written.map_err(SnapshotError::Memory)?;
        Ok(PointMemory {
            layer: self.layer,
            summary,
            writer,
            times: self.clock.stop(),
        })
    }
}

impl Point {
    /// The files that a child needs besides the newest layer, whose parent's memory began with `origin`: [`Begun::files`].
    pub fn files<'a>(&'a self, origin: Option<&'a Chain>) -> Vec<&'a File> {
        let layers = origin.map_or(&[][..], Chain::layers).iter();
        [&self.state]
            .into_iter()
            .chain(layers.map(|layer| layer.file()))
            .chain(self.disks.iter().flat_map(SharedDisk::files))
            .collect()
    }
}

/// What a child goes on from.
pub struct Begun {
    /// The parent's machine.
    pub machine: Description,
    /// How programs are run in it.
    pub programs: Programs,
    /// The interpreter that stands ready in it.
    pub warm: Option<Warm>,
    /// A state file; the layers of its memory, the root first; those of its disks.
    pub files: Vec<File>,
    /// Waits for the newest layer of its memory, where it comes behind the others.
    pub newest: Option<Box<dyn FnOnce() -> io::Result<File> + Send>>,
    /// Its disks, but for those that are as the snapshot has them.
    pub disks: Vec<DiskParts>,
    /// The snapshot that the first layers are.
    pub base: Option<Base>,
    /// When that was: [`Saved::moment`].
    pub moment: Option<u64>,
}

/// Opens layers of memory, the root first, and checks them.
pub fn open_layers(files: impl IntoIterator<Item = File>) -> Result<Chain, SnapshotError> {
    let layers = files.into_iter().map(open_layer);
    chain_of(layers.collect::<Result<_, _>>()?)
}

fn open_layer(file: File) -> Result<Layer, SnapshotError> {
    Ok(Layer::open_handed(file, Path::new(MEMORY))?)
}

fn chain_of(layers: Vec<Layer>) -> Result<Chain, SnapshotError> {
    Chain::new(layers).map_err(|error| SnapshotError::Memory(io::Error::other(error)))
}

impl Begun {
    /// Opens it. Everything is checked as in a snapshot's files.
    pub fn open(self) -> Result<Saved, SnapshotError> {
        let Self {
            machine,
            programs,
            warm,
            mut files,
            newest,
            disks,
            base,
            moment,
        } = self;
        let wrong = |what: &str| SnapshotError::Description {
            what: what.to_owned(),
        };
        let of_disks = disks.iter().map(DiskParts::files);
        let of_disks = of_disks.fold(0, usize::saturating_add);
        let first = files.len().checked_sub(of_disks);
        let first = first.ok_or_else(|| wrong("a disk has too few files"))?;
        let mut of_disks = files.split_off(first).into_iter();
        let mut files = files.into_iter();
        let state = files.next().ok_or_else(|| wrong("it has no state"))?;
        let (state, _): (MachineState, _) = state_file::read(state, Path::new(STATE))?;
        let memory = match newest {
            None => Arc::new(open_layers(files)?).into(),
            Some(newest) => {
                // Those that are there are looked at meanwhile.
                let mut layers = files.map(open_layer).collect::<Result<Vec<_>, _>>()?;
                Memory::late(move || {
                    layers.push(open_layer(newest().map_err(SnapshotError::Memory)?)?);
                    chain_of(layers)
                })
            }
        };
        let mut backings = base.as_ref().map(Base::backings).unwrap_or_default();
        for disk in disks {
            let below = backings.remove(&disk.drive);
            let backing = disk.open(&mut of_disks, &machine, below)?;
            backings.insert(disk.drive, backing);
        }
        Ok(Saved {
            state: Arc::new(state),
            memory,
            backings,
            mode: Mode::Map,
            machine,
            programs,
            warm,
            working_set: None,
            base,
            moment,
        })
    }
}
