//! Virtio devices (Virtio 1.2) behind a memory-mapped transport.
//!
//! A device is an `Arc<Mutex<_>>` that two threads reach: its [`mmio::MmioTransport`], on a vCPU's
//! thread, negotiates, activates and resets it; the event loop, for which every device is an
//! `event_manager::MutEventSubscriber`, carries out its requests. A device watches its queue events
//! from the start and ignores them until it is activated; activation notifies every queue once, so a
//! notification that came early is not lost.
//!
//! Everything that a driver supplies is hostile. A request that breaks the rules of the rings stops
//! its device with one logged reason ([`signal::Signal::fail`]), and nothing else.

use std::sync::Arc;

use event_manager::{EventOps, Events};
use snapshot_fmt::state::virtio::VirtioDeviceState;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub mod blk;
#[cfg(test)]
mod hostile_tests;
pub mod mmio;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod signal;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;

use signal::Signal;

/// The guest's memory, as devices see it.
pub type GuestMemory = GuestMemoryMmap;
/// A piece of the guest's memory that is contiguous in ours.
pub type GuestSlice<'a> = VolatileSlice<'a, ()>;

/// `VIRTIO_F_RING_EVENT_IDX`: interrupts and notifications by ring position (section 2.7.10).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: not a legacy driver. Every driver must accept it.
pub const F_VERSION_1: u64 = 1 << 32;

/// Device types (section 5).
pub mod device_type {
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Socket device.
    pub const VSOCK: u32 = 19;
    /// Persistent memory.
    pub const PMEM: u32 = 27;
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The way back to the driver.
    pub signal: Arc<Signal>,
    /// The queues, in order. Those that the driver left out are not `ready`; the others are valid.
    pub queues: Vec<Queue>,
    /// Features that the driver accepted, all of them offered.
    pub features: u64,
}

/// A virtio device as its transport sees it.
pub trait VirtioDevice: Send {
    /// What messages call it, for example `virtio-blk root`.
    fn name(&self) -> String;

    /// Device type, see [`device_type`].
    fn device_type(&self) -> u32;

    /// Features that the device offers, [`F_VERSION_1`] among them.
    fn features(&self) -> u64;

    /// Largest size of each queue, a power of two each.
    fn queue_sizes(&self) -> &[u16];

    /// One event for each queue: the driver's notification.
    fn queue_events(&self) -> Arc<[EventFd]>;

    /// The driver reads `data.len()` bytes at `offset` in the configuration space. Bytes beyond its
    /// end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes to the configuration space. No field of our devices is writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: the device may use its queues from now on.
    fn activate(&mut self, activation: Activation);

    /// Forgets everything that the driver set up, requests in flight included.
    fn reset(&mut self);

    /// The queues of an activated device; empty otherwise.
    fn queues_mut(&mut self) -> &mut [Queue];

    /// What is saved of the device besides its queues. A new device of the same kind is made from it, and then gets the
    /// queues by [`mmio::MmioTransport::restore`]. The device must be quiet: the event loop stands still.
    fn state(&self) -> VirtioDeviceState;
}

/// One non-blocking event for each of `count` queues.
pub(crate) fn new_queue_events(count: usize) -> std::io::Result<Arc<[EventFd]>> {
    (0..count).map(|_| EventFd::new(EFD_NONBLOCK)).collect()
}

/// Notifies every queue, as a driver would.
pub(crate) fn notify_all(events: &[EventFd]) {
    for event in events {
        // The only failure is a full counter, and then the event is pending anyway.
        let _ = event.write(1);
    }
}

/// Watches queue events; the data of queue `n`'s event is `n`.
pub(crate) fn watch_queues(events: &[EventFd], ops: &mut EventOps) {
    for (index, event) in (0..).zip(events) {
        if let Err(error) = ops.add(Events::with_data(event, index, EventSet::IN)) {
            log::error!("the event of virtio queue {index} cannot be watched: {error:?}");
        }
    }
}

/// Reads from a configuration space that is held in `bytes`.
pub(crate) fn read_config_bytes(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..));
    if let Some(rest) = rest {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_beyond_its_end_reads_zero() {
        for (offset, want) in [(0, [1, 2]), (1, [2, 3]), (2, [3, 0]), (3, [0, 0])] {
            let mut data = [9; 2];
            read_config_bytes(&[1, 2, 3], offset, &mut data);
            assert_eq!(data, want);
        }
        let mut data = [9; 8];
        read_config_bytes(&[1], u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
