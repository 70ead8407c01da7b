//! The persistent memory device: where its memory is, and a queue of flushes.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use snapshot_fmt::state::virtio::VirtioDeviceState;
use thiserror::Error;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::queue::request;
use crate::devices::virtio::queue::{Outcome, Served, serve};
use crate::devices::virtio::{
    Activation, F_EVENT_IDX, F_VERSION_1, VirtioDevice, device_type, new_queue_events, notify_all,
    read_config_bytes, watch_queues,
};

/// The driver flushes one at a time.
const QUEUE_SIZES: [u16; 1] = [8];

/// Size in bytes of `struct virtio_pmem_config` (section 5.19.4).
const CONFIG_SIZE: usize = 16;

/// Memory that the guest may read.
#[derive(Debug, Clone)]
pub struct PmemConfig {
    /// What messages call it.
    pub id: String,
    /// First guest physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Why there is no such device.
#[derive(Debug, Error)]
pub enum PmemError {
    /// No event for its queue.
    #[error("cannot make an eventfd for virtio-pmem: {0}")]
    EventFd(#[source] io::Error),
    /// It is not where it was when it was saved, or not of that size.
    #[error(
        "virtio-pmem {id} is at {start:#x} with {size:#x} bytes, the saved one at {saved_start:#x} with {saved_size:#x}"
    )]
    SavedPlace {
        /// Its name.
        id: String,
        /// Where it is.
        start: u64,
        /// Its size in bytes.
        size: u64,
        /// Where it was.
        saved_start: u64,
        /// The size that it had.
        saved_size: u64,
    },
}

/// A persistent memory device.
pub struct Pmem {
    pub(super) config: PmemConfig,
    events: Arc<[EventFd]>,
    active: Option<Activation>,
}

impl Pmem {
    /// A device in the reset state. The caller shows the memory to the guest before the driver asks for it.
    pub fn new(config: PmemConfig) -> Result<Self, PmemError> {
        let events = new_queue_events(QUEUE_SIZES.len()).map_err(PmemError::EventFd)?;
        Ok(Self {
            config,
            events,
            active: None,
        })
    }

    fn serve(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        if active.signal.has_failed() {
            return;
        }
        let memory = &*active.memory;
        let served = serve(&mut active.queues[0], memory, &active.signal, |chain| {
            request(memory, chain).map(Outcome::Used)
        });
        match served {
            Ok(Served::All) => {}
            Ok(Served::More) => notify_all(&self.events),
            Err(error) => active.signal.fail(error),
        }
    }
}

impl VirtioDevice for Pmem {
    fn name(&self) -> String {
        format!("virtio-pmem {}", self.config.id)
    }

    fn device_type(&self) -> u32 {
        device_type::PMEM
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> Arc<[EventFd]> {
        self.events.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_SIZE];
        config[..8].copy_from_slice(&self.config.start.to_le_bytes());
        config[8..].copy_from_slice(&self.config.size.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Some(activation);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queues_mut(&mut self) -> &mut [Queue] {
        self.active.as_mut().map_or(&mut [], |a| &mut a.queues)
    }

    fn state(&self) -> VirtioDeviceState {
        VirtioDeviceState::Pmem(self.save())
    }
}

impl MutEventSubscriber for Pmem {
    fn init(&mut self, ops: &mut EventOps) {
        watch_queues(&self.events, ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // An empty counter is as good as a full one: the queue is looked at either way.
        let _ = self.events[0].read();
        self.serve();
    }
}
