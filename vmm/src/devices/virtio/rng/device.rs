//! The entropy device: one queue of buffers to fill.
//!
//! It has no state of its own: what is saved of it is its transport's.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use snapshot_fmt::state::virtio::VirtioDeviceState;
use thiserror::Error;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::queue::fill;
use crate::devices::virtio::queue::{Outcome, Served, serve};
use crate::devices::virtio::{
    Activation, F_EVENT_IDX, F_VERSION_1, VirtioDevice, device_type, new_queue_events, notify_all,
    watch_queues,
};

/// The driver posts one buffer at a time.
const QUEUE_SIZES: [u16; 1] = [8];

/// Why an entropy device could not be made.
#[derive(Debug, Error)]
pub enum RngError {
    /// No event for its queue.
    #[error("cannot make an eventfd for virtio-rng: {0}")]
    EventFd(#[source] io::Error),
}

/// An entropy device.
pub struct Rng {
    events: Arc<[EventFd]>,
    active: Option<Activation>,
}

impl Rng {
    /// A device in the reset state.
    pub fn new() -> Result<Self, RngError> {
        let events = new_queue_events(QUEUE_SIZES.len()).map_err(RngError::EventFd)?;
        Ok(Self {
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
        let queue = &mut active.queues[0];
        let served = serve(queue, memory, &active.signal, |chain| {
            fill(memory, chain).map(Outcome::Used)
        });
        match served {
            Ok(Served::All) => {}
            Ok(Served::More) => notify_all(&self.events),
            Err(error) => active.signal.fail(error),
        }
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> String {
        "virtio-rng".into()
    }

    fn device_type(&self) -> u32 {
        device_type::RNG
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

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
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
        VirtioDeviceState::Rng
    }
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        watch_queues(&self.events, ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // An empty counter is as good as a full one: the queue is looked at either way.
        let _ = self.events[0].read();
        self.serve();
    }
}
