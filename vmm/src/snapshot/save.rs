//! Takes a snapshot of a machine, into a store.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use snapshot_fmt::digest::Digest;
use snapshot_fmt::layer::LayerSummary;
use snapshot_fmt::manifest::{
    FORMAT, FileEntry, MEMORY, Machine as Description, Manifest, Programs, STATE, Warm, disk_layer,
};
use snapshot_fmt::state::machine::MachineState;
use snapshot_fmt::state_file;

use super::SnapshotError;
use super::description::cpu;
use super::disk_layer::{DiskChains, DiskToSave};
use super::memory_layer::{FrozenMemory, LayerInProgress, Lineage};
use crate::agent::{Agent, Quiet};
use crate::devices::virtio::blk::backup::Moment;
use crate::machine::Machine;
use crate::sandbox::record::now;
use crate::store::{Held, Owner, Store};
use crate::timings::monotonic_ns;

/// A snapshot to be taken.
pub struct Order<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// What it is, as it was when it was made: a disk's file that was put in the place of another is not its.
    pub description: &'a Description,
    /// The connection that its guest's agent has made to the host, if there still is one. It is kept over a restore where it is at rest.
    pub agent: Option<&'a Agent>,
    /// How programs are run in it.
    pub programs: Programs,
    /// The interpreter that stands ready in it.
    pub warm: Option<Warm>,
    /// What to call the snapshot.
    pub name: Option<String>,
    /// The process that it is there for alone, if it is.
    pub owner: Option<Owner>,
    /// What memory goes back to.
    pub lineage: Lineage<'a>,
    /// The disks of `lineage`'s parent; none where it has none.
    pub parent_disks: Option<&'a DiskChains>,
    /// The snapshot of `lineage`'s parent.
    pub parent: Option<Digest>,
    /// Says that nobody wants the snapshot any more.
    pub is_given_up: &'a dyn Fn() -> bool,
}

/// A snapshot that was taken.
pub struct Taken {
    /// It, kept from being removed.
    pub held: Held,
    /// What its memory came to.
    pub memory: LayerSummary,
    /// Its disks. Unless they are [kept](Moment::keep), the next snapshot's difference counts from the one before this one.
    pub disks: Vec<Moment>,
    /// How long that took.
    pub times: Times,
}

/// How long taking a snapshot took.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Until processors and devices stood still and their state was had.
    pub state: Duration,
    /// Until memory was frozen as well.
    pub freeze: Duration,
    /// Until everything ran again: all of the pause.
    pub pause: Duration,
    /// Until everything was written.
    pub total: Duration,
}

/// Takes a snapshot, and puts it into `store`.
pub fn take(order: Order<'_>, store: &Store) -> Result<Taken, SnapshotError> {
    let mut draft = store.begin()?;
    if let Some(owner) = order.owner {
        draft.belong_to(owner);
    }
    let written = write(&order, draft.path())?;
    let manifest = Manifest {
        format: FORMAT,
        id: Digest([0; 32]),
        name: order.name,
        created: now(),
        software: concat!("bough-vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
        parent: order.parent,
        machine: order.description.clone(),
        programs: order.programs,
        cpu: cpu(),
        warm: order.warm,
        files: written.files,
    };
    Ok(Taken {
        held: draft.publish(manifest)?,
        memory: written.memory,
        disks: written.disks,
        times: written.times,
    })
}

/// A machine at one moment, with its disks as `D`. It runs on already.
pub struct Frozen<D> {
    /// All but memory.
    pub state: MachineState,
    /// Memory, which is being written.
    pub memory: LayerInProgress,
    /// Its disks.
    pub disks: D,
    /// When that was: [`monotonic_ns`].
    pub moment: u64,
    /// How long it stood still.
    pub clock: Clock,
}

/// When a machine was to stand still, and how long that took.
#[derive(Clone, Copy)]
pub struct Clock {
    start: Instant,
    state: Duration,
    freeze: Duration,
    pause: Duration,
}

impl Clock {
    /// All times, now that everything is written.
    pub fn stop(self) -> Times {
        Times {
            state: self.state,
            freeze: self.freeze,
            pause: self.pause,
            total: self.start.elapsed(),
        }
    }
}

/// Has `machine` stand still for its state and for `disks`, and its memory of that moment be written to `layer`, which `path` names in messages.
pub fn freeze<D>(
    machine: &Machine,
    agent: Option<&Agent>,
    layer: &File,
    path: &Path,
    lineage: Lineage<'_>,
    disks: impl FnOnce() -> D,
) -> Result<Frozen<D>, SnapshotError> {
    // A page that is gone keeps whoever touches it, and to save the lane is to look into memory.
    check_memory(machine)?;
    let quiet = agent.map(Agent::quiesce);
    let start = Instant::now();
    let frozen = machine.freeze(|mut state: MachineState| {
        state.settle_agent(quiet.as_ref().and_then(Quiet::state));
        let (had, moment) = (start.elapsed(), monotonic_ns());
        let memory = FrozenMemory::take(machine.memory(), layer, path, lineage);
        (state, memory, disks(), moment, had, start.elapsed())
    })?;
    let pause = start.elapsed();
    let (state, memory, disks, moment, had, freeze) = frozen;
    let memory = memory.map(FrozenMemory::write);
    Ok(Frozen {
        state,
        disks,
        moment,
        memory: memory.map_err(SnapshotError::Memory)?,
        clock: Clock {
            start,
            state: had,
            freeze,
            pause,
        },
    })
}

/// State, memory and disks, written.
struct Written {
    files: Vec<FileEntry>,
    memory: LayerSummary,
    disks: Vec<Moment>,
    times: Times,
}

/// Whether all memory of `machine` that is not its own yet can still be had.
fn check_memory(machine: &Machine) -> Result<(), SnapshotError> {
    let whole = machine.pager().map_or(Ok(()), |pager| pager.check());
    whole.map_err(|error| SnapshotError::Memory(io::Error::other(error)))
}

fn write(order: &Order<'_>, dir: &Path) -> Result<Written, SnapshotError> {
    let make = |name: &str| {
        let path = dir.join(name);
        match File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
        {
            Ok(file) => Ok((file, path)),
            Err(source) => Err(SnapshotError::Io { path, source }),
        }
    };
    let (layer, layer_path) = make(MEMORY)?;
    let (state_file, state_path) = make(STATE)?;
    let disks = DiskToSave::all(order.machine.disks(), dir)?;

    let frozen = freeze(
        order.machine,
        order.agent,
        &layer,
        &layer_path,
        order.lineage,
        || {
            disks
                .into_iter()
                .map(DiskToSave::freeze)
                .collect::<Vec<_>>()
        },
    )?;
    let state = state_file::write(&state_file, &state_path, &frozen.state)?;
    state_file.sync_all().map_err(|source| SnapshotError::Io {
        path: state_path,
        source,
    })?;
    let entry = |name: &str, bytes, digest| FileEntry {
        name: name.to_owned(),
        bytes,
        digest,
    };
    // While the child writes memory.
    let (mut of_disks, mut disks) = (Vec::new(), Vec::new());
    for disk in frozen.disks {
        let drive = disk.drive;
        let parent = order.parent_disks.and_then(|disks| disks.get(&drive));
        let (layer, moment) = disk.write(parent.map(|chain| &**chain))?;
        of_disks.push(entry(&disk_layer(drive), layer.bytes, layer.digest));
        disks.push(moment);
    }
    let (memory, writer) = frozen
        .memory
        .finish(order.is_given_up)
        .map_err(SnapshotError::Memory)?;
    writer.end_aside();
    check_memory(order.machine)?;
    let mut files = vec![
        entry(STATE, state.bytes, state.digest),
        entry(MEMORY, memory.bytes, memory.digest),
    ];
    files.append(&mut of_disks);
    Ok(Written {
        files,
        memory,
        disks,
        times: frozen.clock.stop(),
    })
}
