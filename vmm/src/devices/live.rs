//! The devices of a machine, as those see them who save it.
//!
//! The order is that in which they were built: a restored machine has the same devices at the same addresses, each made
//! from its own state.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use snapshot_fmt::state::machine::DeviceStates;

use super::serial::SerialPort;
use super::virtio::blk::Disk;
use super::virtio::mmio::MmioTransport;

/// The disks that the guest may write to, by the numbers of their drives.
pub type Disks = BTreeMap<usize, Arc<Disk>>;

/// The devices that have a state. The keyboard controller's is none: only its reset line exists.
pub struct LiveDevices {
    /// COM1.
    pub serial: Arc<Mutex<SerialPort>>,
    /// The transports with their devices, by ascending address.
    pub virtio: Vec<Arc<Mutex<MmioTransport>>>,
    /// What is behind the disks among them, where it can change.
    pub disks: Disks,
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
        }
    }
}

fn lock<T>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
