//! The devices of a machine, as those see them who save it and take it back.
//!
//! The order is that in which they were built: a restored machine has the same devices at the same addresses, each made
//! from its own state.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snapshot_fmt::state::machine::DeviceStates;
use snapshot_fmt::state::virtio::VirtioDeviceState;
use thiserror::Error;

use super::lane::{Lane, LaneError};
use super::serial::{SerialError, SerialPort};
use super::virtio::blk::stack::Backing;
use super::virtio::blk::{BlockError, Disk};
use super::virtio::mmio::{MmioTransport, TransportError};
use super::virtio::vsock::{Vsock, VsockError};

/// The disks that the guest may write to, by the numbers of their drives.
pub type Disks = BTreeMap<usize, Arc<Disk>>;

/// The devices that have a state. The keyboard controller's is none: only its reset line exists.
pub struct LiveDevices {
    /// COM1.
    pub serial: Arc<Mutex<SerialPort>>,
    /// The transports with their devices, by ascending address.
    pub virtio: Vec<Arc<Mutex<MmioTransport>>>,
    /// The one among them that has connections, if there is one.
    pub vsock: Option<Arc<Mutex<Vsock>>>,
    /// The lane, if there is one.
    pub lane: Option<Arc<Mutex<Lane>>>,
    /// What is behind the disks among them, where it can change.
    pub disks: Disks,
}

/// Why devices could not be taken back.
#[derive(Debug, Error)]
pub enum RewindDevicesError {
    /// They are others.
    #[error("{saved} virtio devices were saved, and there are {here}")]
    Count {
        /// How many were saved.
        saved: usize,
        /// How many there are.
        here: usize,
    },
    /// One has a lane, the other has none.
    #[error("only one of both machines has a lane")]
    OtherLane,
    /// The lane.
    #[error(transparent)]
    Lane(#[from] LaneError),
    /// A disk's content is missing.
    #[error("drive {0} has no content to go back to")]
    NoBacking(usize),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// A virtio transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] BlockError),
}

impl LiveDevices {
    /// What a new machine continues from. The processors are paused and the event loop stands still: otherwise the states
    /// are of different moments. The devices are left as they are, and go on when the machine does.
    pub fn save(&self) -> DeviceStates {
        DeviceStates {
            serial: lock(&self.serial).save(),
            virtio: self
                .virtio
                .iter()
                .map(|transport| lock(transport).save_with_device())
                .collect(),
            lane: self.lane.as_ref().map(|lane| lock(lane).save()),
        }
    }

    /// Gives the guest random bytes that no other of its kin has, now that its memory is there, and before it executes anything. One without a lane is told later, by its agent's host.
    pub fn give_seed(&self) -> Result<(), LaneError> {
        let lane = self.lane.as_ref();
        lane.map_or(Ok(()), |lane| lock(lane).give_seed())
    }

    /// Makes them what they were when they were [saved](Self::save), under the same conditions. Clients lose their connections; returns the host's end of the
    /// one that the guest's agent had, if that goes on. Where it fails, they are neither what they were nor what they are to be.
    ///
    /// The disks that the guest may write to go back to `backings`, by the numbers of their drives; what it writes from then on is kept in the directory `dir`.
    pub fn rewind(
        &self,
        states: &DeviceStates,
        backings: &BTreeMap<usize, Backing>,
        dir: &Path,
    ) -> Result<Option<UnixStream>, RewindDevicesError> {
        let (saved, here) = (states.virtio.len(), self.virtio.len());
        if saved != here {
            return Err(RewindDevicesError::Count { saved, here });
        }
        for transport in &self.virtio {
            lock(transport).stop();
        }
        for (&drive, disk) in &self.disks {
            let backing = backings.get(&drive).cloned();
            let backing = backing.ok_or(RewindDevicesError::NoBacking(drive))?;
            disk.rewind(backing, dir, "rewound")?;
        }
        let mut agent_link = match (&self.lane, &states.lane) {
            (Some(lane), Some(state)) => lock(lane).load(state)?,
            (None, None) => None,
            _ => return Err(RewindDevicesError::OtherLane),
        };
        if let Some(vsock) = &self.vsock {
            for state in &states.virtio {
                if let VirtioDeviceState::Vsock(state) = &state.device {
                    agent_link = lock(vsock).load_beside(state, agent_link.take())?;
                }
            }
        }
        for (transport, state) in self.virtio.iter().zip(&states.virtio) {
            lock(transport).load(&state.transport)?;
        }
        lock(&self.serial).rewind(&states.serial)?;
        Ok(agent_link)
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
