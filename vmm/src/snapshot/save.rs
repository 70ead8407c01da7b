//! Takes a snapshot: what a machine is made of, into the files of a directory.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use snapshot_fmt::layer::LayerSummary;
use snapshot_fmt::manifest::{FileEntry, MEMORY, STATE};
use snapshot_fmt::state::machine::MachineState;
use snapshot_fmt::state_file;

use super::SnapshotError;
use super::memory_layer::{LayerInProgress, Lineage};
use crate::agent::{Agent, Quiet};
use crate::machine::Machine;

/// A machine's state and memory, written and synced.
#[derive(Debug)]
pub struct Written {
    /// The files, for the manifest.
    pub files: Vec<FileEntry>,
    /// What the memory came to.
    pub memory: LayerSummary,
    /// How long the machine stood still, and from when to when its memory was being copied.
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
    /// Until everything was on the disk.
    pub total: Duration,
}

/// Writes `machine` as it is now to `dir`, its memory as `lineage` wants it. `agent` is the connection that its guest's
/// agent has made to the host, if there still is one: it is kept over a restore where it is at rest.
pub fn save(
    machine: &Machine,
    agent: Option<&Agent>,
    dir: &Path,
    lineage: Lineage<'_>,
) -> Result<Written, SnapshotError> {
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

    let quiet = agent.map(Agent::quiesce);
    let start = Instant::now();
    let frozen = machine.freeze(|mut state: MachineState| {
        state.settle_agent(quiet.as_ref().and_then(Quiet::state));
        let had = start.elapsed();
        let memory = LayerInProgress::begin(machine.memory(), &layer, &layer_path, lineage);
        (state, memory, had, start.elapsed())
    })?;
    let pause = start.elapsed();
    drop(quiet);
    let (state, memory, had, freeze) = frozen;
    let memory = memory.map_err(SnapshotError::Memory)?;

    let state = state_file::write(&state_file, &state_path, &state)?;
    state_file.sync_all().map_err(|source| SnapshotError::Io {
        path: state_path,
        source,
    })?;
    let memory = memory.finish().map_err(SnapshotError::Memory)?;
    let entry = |name: &str, bytes, digest| FileEntry {
        name: name.to_owned(),
        bytes,
        digest,
    };
    Ok(Written {
        files: vec![
            entry(STATE, state.bytes, state.digest),
            entry(MEMORY, memory.bytes, memory.digest),
        ],
        memory,
        times: Times {
            state: had,
            freeze,
            pause,
            total: start.elapsed(),
        },
    })
}
