//! Virtio devices, saved: the transport with its queues, and what each kind of device adds.
//!
//! The numbers are the driver's own (guest physical addresses, ring positions), so a reader must
//! treat every one of them as hostile: the monitor checks them as it checks register writes.

use serde::{Deserialize, Serialize};

/// One split virtqueue (Virtio 1.2, section 2.7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtqueueState {
    /// Number of descriptors that the driver chose.
    pub size: u32,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// Position in the available ring up to which the device has taken chains.
    pub next_avail: u16,
    /// Position in the used ring up to which the device has returned chains.
    pub next_used: u16,
}

/// A virtio-mmio transport (Virtio 1.2, section 4.2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMmioState {
    /// Virtio device type (section 5).
    pub device_type: u32,
    /// Which 32 feature bits `DeviceFeatures` shows.
    pub device_features_sel: u32,
    /// Which 32 feature bits `DriverFeatures` takes.
    pub driver_features_sel: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// The queue that the queue registers refer to.
    pub queue_sel: u32,
    /// Device status (section 2.1).
    pub status: u32,
    /// Interrupts that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// Generation of the configuration space.
    pub config_generation: u32,
    /// The queues, in order.
    pub queues: Vec<VirtqueueState>,
}

/// A virtio device: its transport, and what its kind adds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// The registers and queues.
    pub transport: VirtioMmioState,
    /// The device behind them.
    pub device: VirtioDeviceState,
}

/// What a kind of virtio device adds to its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VirtioDeviceState {
    /// A disk.
    Block(BlockState),
    /// Memory that is a file.
    Pmem(PmemState),
    /// The entropy device, which has nothing of its own.
    Rng,
    /// The socket device.
    Vsock(VsockState),
}

/// What virtio-blk adds; a restored disk must be the same size and kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Serial number that the guest reads.
    pub id: String,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
}

/// What virtio-pmem adds; a restored device must be in the same place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemState {
    /// What messages call it.
    pub id: String,
    /// First guest physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

/// What virtio-vsock adds. One connection may survive; the guest is told to drop the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub cid: u32,
    /// The next port to give to a connection from the host.
    pub next_host_port: u32,
    /// The connection that goes on. Without it the guest is told by one event to drop all that it has.
    pub kept: Option<VsockConnectionState>,
    /// Beside a kept connection, or a lane that is kept: those that end, with a packet each, once the guest has said something on that.
    pub ended: Vec<VsockPorts>,
    /// The guest is to be told by one event that it has none, whatever else is kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
}

/// The ends of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VsockPorts {
    /// The port on the host.
    pub host: u32,
    /// The port in the guest.
    pub guest: u32,
}

/// An established connection with nothing on its way in either direction. The counts are in bytes and wrap around (Virtio
/// 1.2, section 5.10.6.3).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConnectionState {
    /// Its ends.
    pub ports: VsockPorts,
    /// Room for what the guest sends.
    pub buf_alloc: u32,
    /// What the guest has sent; all of it was forwarded.
    pub forwarded: u32,
    /// How much of that the guest knows to be forwarded.
    pub forwarded_told: u32,
    /// What the guest was sent.
    pub sent: u32,
    /// How much of that it has said to have dealt with.
    pub peer_fwd_cnt: u32,
    /// The room that the guest has said to have.
    pub peer_buf_alloc: u32,
}
