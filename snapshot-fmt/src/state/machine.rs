//! A whole machine, saved: everything about it but its memory and its disks.

use serde::{Deserialize, Serialize};

use super::agent::AgentState;
use super::lane::LaneState;
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
    /// The lane, where the machine has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lane: Option<LaneState>,
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
    /// The agent's connection, where it was at rest and its transport, the lane or vsock, keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentState>,
}

impl MachineState {
    /// Gives up the agent's connection unless both sides of it can go on: the agent's own, and its transport's. The guest is then told of the
    /// loss when it is restored. It has one transport: a vsock connection beside a lane's is somebody else's.
    pub fn settle_agent(&mut self, agent: Option<AgentState>) {
        let lane = self.devices.lane.as_mut().filter(|lane| lane.open);
        let mut vsock =
            self.devices
                .virtio
                .iter_mut()
                .filter_map(|virtio| match &mut virtio.device {
                    VirtioDeviceState::Vsock(vsock) => Some(vsock),
                    _ => None,
                });
        let mut vsock = vsock.next();
        let is_kept = match (lane, &mut vsock) {
            (Some(lane), vsock) => {
                lane.kept &= agent.is_some();
                if let Some(vsock) = vsock {
                    vsock.ended.extend(vsock.kept.take().map(|kept| kept.ports));
                }
                lane.kept
            }
            (None, Some(vsock)) => {
                vsock.kept.take_if(|_| agent.is_none());
                vsock.kept.is_some()
            }
            (None, None) => false,
        };
        if is_kept {
            self.agent = agent;
        } else if let Some(vsock) = vsock {
            // One event ends any number.
            vsock.ended.clear();
        }
    }
}
