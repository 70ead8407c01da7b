//! A whole machine, saved: everything about it but its memory and its disks.

use serde::{Deserialize, Serialize};

use super::agent::AgentState;
use super::platform::PlatformState;
use super::serial::SerialState;
use super::vcpu::VcpuState;
use super::virtio::{VirtioDeviceState, VirtioState};

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
    /// The agent's connection, where it was at rest and its vsock connection was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentState>,
}

impl MachineState {
    /// Gives up the agent's connection unless both sides of it can go on: the agent's own, and its socket's. The guest is then told of the
    /// loss when it is restored.
    pub fn settle_agent(&mut self, agent: Option<AgentState>) {
        let mut vsock =
            self.devices
                .virtio
                .iter_mut()
                .filter_map(|virtio| match &mut virtio.device {
                    VirtioDeviceState::Vsock(vsock) => Some(vsock),
                    _ => None,
                });
        let Some(vsock) = vsock.next() else { return };
        if vsock.kept.is_none() {
            return;
        }
        if agent.is_none() {
            vsock.kept = None;
            vsock.ended.clear();
        }
        self.agent = agent;
    }
}
