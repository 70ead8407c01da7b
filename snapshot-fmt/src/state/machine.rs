//! A whole machine, saved: everything about it but its memory and its disks.

use serde::{Deserialize, Serialize};

use super::platform::PlatformState;
use super::serial::SerialState;
use super::vcpu::VcpuState;
use super::virtio::VirtioState;

/// The devices that have a state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStates {
    /// COM1.
    pub serial: SerialState,
    /// The virtio devices, by ascending address.
    pub virtio: Vec<VirtioState>,
}

/// A machine at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// The processors, by their APIC ids.
    pub vcpus: Vec<VcpuState>,
    /// What they share.
    pub platform: PlatformState,
    /// The devices.
    pub devices: DeviceStates,
}
