//! A running machine's moment, in memory files, for machines that go on from it: its children.
//!
//! It is a snapshot that never sees a disk: the state, and a layer over what the machine's own memory began with. Children map the layers privately,
//! so they share what none of them writes to. The files live as long as anybody has them open or mapped, whoever of the family dies first.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use snapshot_fmt::chain::Chain;
use snapshot_fmt::layer::{Layer, LayerSummary};
use snapshot_fmt::manifest::{MEMORY, Machine as Description, Programs, STATE, Warm};
use snapshot_fmt::state_file;

use super::SnapshotError;
use super::memory_layer::Lineage;
use super::restore::{Base, Saved};
use super::save::{self, Frozen, Times};
use crate::agent::Agent;
use crate::machine::Machine;
use crate::pager::Mode;

/// A machine's moment.
pub struct Point {
    /// A state file.
    pub state: File,
    /// The layer over what memory began with.
    pub memory: File,
    /// What that came to.
    pub summary: LayerSummary,
    /// How long it took.
    pub times: Times,
}

/// An empty file in memory.
fn memory_file(name: &str) -> Result<File, SnapshotError> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC).map_err(|errno| SnapshotError::Io {
        path: name.into(),
        source: errno.into(),
    })?;
    Ok(File::from(file))
}

/// A moment of which the memory is still being written. The machine runs on already.
pub struct Freezing {
    frozen: Frozen,
    memory: File,
}

/// Freezes `machine`, whose memory began with `origin`. It stands still for its state only.
pub fn freeze(
    machine: &Machine,
    agent: Option<&Agent>,
    origin: Option<&Chain>,
) -> Result<Freezing, SnapshotError> {
    let memory = memory_file(MEMORY)?;
    let lineage = Lineage::over_origin(origin);
    let frozen = save::freeze(
        machine,
        agent,
        &memory,
        Path::new(MEMORY),
        lineage,
        Vec::new(),
    )?;
    Ok(Freezing { frozen, memory })
}

impl Freezing {
    /// Waits until everything is written, or `is_given_up` says that nobody wants it any more.
    pub fn finish(self, is_given_up: &dyn Fn() -> bool) -> Result<Point, SnapshotError> {
        let Self { frozen, memory } = self;
        let state = memory_file(STATE)?;
        state_file::write(&state, Path::new(STATE), &frozen.state)?;
        let summary = frozen
            .memory
            .finish(is_given_up)
            .map_err(SnapshotError::Memory)?;
        Ok(Point {
            state,
            memory,
            summary,
            times: frozen.clock.stop(),
        })
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
    /// A state file.
    pub state: File,
    /// The layers of its memory, the root first.
    pub layers: Vec<File>,
    /// The snapshot that the first layers are.
    pub base: Option<Base>,
}

impl Begun {
    /// Opens it. Everything is checked as in a snapshot's files.
    pub fn open(self) -> Result<Saved, SnapshotError> {
        let (state, _) = state_file::read(self.state, Path::new(STATE))?;
        let layers = self
            .layers
            .into_iter()
            .map(|file| Layer::open(file, Path::new(MEMORY)))
            .collect::<Result<_, _>>()?;
        let chain =
            Chain::new(layers).map_err(|error| SnapshotError::Memory(io::Error::other(error)))?;
        Ok(Saved {
            state: Arc::new(state),
            memory: Arc::new(chain),
            backings: BTreeMap::new(),
            mode: Mode::Map,
            machine: self.machine,
            programs: self.programs,
            warm: self.warm,
            working_set: None,
            base: self.base,
        })
    }
}
