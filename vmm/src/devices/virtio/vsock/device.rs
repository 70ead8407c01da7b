//! The socket device: three queues, the muxer, and one turn of work for whatever event comes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use snapshot_fmt::state::virtio::VirtioDeviceState;
use thiserror::Error;
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::muxer::Muxer;
use super::queue::{Reset, announce_reset, receive, transmit};
use crate::devices::virtio::queue::{QueueError, Served};
use crate::devices::virtio::{
    Activation, F_EVENT_IDX, F_VERSION_1, VirtioDevice, device_type, new_queue_events, notify_all,
    read_config_bytes, watch_queues,
};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// A driver fills the receive queue when it starts, a page and more for each buffer (our kernel eight), so
/// a long one costs boot time and memory. Linux posts eight event buffers.
pub(super) const QUEUE_SIZES: [u16; 3] = [16, 32, 8];
/// Event data of the muxer, after those of the queues.
const MUXER: u32 = 3;
/// Event data of what the lane tells.
const SPOKEN: u32 = 4;

/// A guest's sockets.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's context id: above 2, the host's, and below 2^32 - 1, everybody's.
    pub cid: u32,
    /// Where host clients connect. Must not exist, but for a socket on which nobody listens any more.
    pub socket_path: PathBuf,
    /// The host's port of the one connection that a restored guest keeps, where that is possible: the agent's.
    pub kept_port: u32,
}

/// Why a socket device could not be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// A context id that no guest can have.
    #[error("{0} is not a context id for a guest: choose one from 3 to 4294967294")]
    Cid(u32),
    /// No listening socket.
    #[error("cannot listen on {path}: {source}; XDG_RUNTIME_DIR can name another place")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A saved state that no device can have had.
    #[error("the saved virtio-vsock: {0}")]
    Saved(&'static str),
    /// No stream for the connection that goes on.
    #[error("cannot make a stream for the guest agent's connection: {0}")]
    Stream(#[source] io::Error),
    /// No events for its queues.
    #[error("cannot make eventfds for virtio-vsock: {0}")]
    EventFd(#[source] io::Error),
}

/// A socket device. Its Unix socket exists as long as it does.
pub struct Vsock {
    pub(super) cid: u32,
    pub(super) kept_port: u32,
    pub(super) muxer: Muxer,
    pub(super) reset: Reset,
    /// Where there is a lane: written to once a restored guest has said something on it.
    pub(super) spoken: Option<EventFd>,
    events: Arc<[EventFd]>,
    active: Option<Activation>,
}

impl Vsock {
    /// A device in the reset state that listens on its socket. Clients wait until a driver is ready.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        let VsockConfig {
            cid,
            socket_path,
            kept_port,
        } = config;
        if !(3..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let events = new_queue_events(QUEUE_SIZES.len()).map_err(VsockError::EventFd)?;
        let muxer = match Muxer::new(cid.into(), socket_path.clone()) {
            Ok(muxer) => muxer,
            Err(source) => {
                let path = socket_path;
                return Err(VsockError::Listen { path, source });
            }
        };
        Ok(Self {
            cid,
            kept_port,
            muxer,
            reset: Reset::Over,
            spoken: None,
            events,
            active: None,
        })
    }

    /// The same device beside a lane, which writes to `spoken` once a restored guest has said something there.
    pub fn beside_lane(self, spoken: EventFd) -> Self {
        Self {
            spoken: Some(spoken),
            ..self
        }
    }

    /// Moves packets both ways. One interrupt covers all queues.
    fn serve(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        if active.signal.has_failed() {
            return;
        }
        let mut interrupt = false;
        let result = move_packets(
            active,
            &mut self.muxer,
            &mut self.reset,
            &self.events,
            &mut interrupt,
        );
        if interrupt {
            active.signal.used_buffer();
        }
        if let Err(error) = result {
            active.signal.fail(error);
            // Nobody will answer the clients.
            self.muxer.reset();
        }
    }
}

fn move_packets(
    active: &mut Activation,
    muxer: &mut Muxer,
    reset: &mut Reset,
    events: &[EventFd],
    interrupt: &mut bool,
) -> Result<(), QueueError> {
    let (memory, signal) = (&*active.memory, &*active.signal);
    let queues = &mut active.queues;
    announce_reset(&mut queues[EVENT], memory, interrupt, reset)?;
    let sent = transmit(&mut queues[TX], memory, signal, interrupt, muxer)?;
    let held_up = !muxer.can_take();
    let received = receive(&mut queues[RX], memory, interrupt, muxer)?;
    // Last, for what was said may be what they wait for.
    if *reset == Reset::Over {
        muxer.accept_from_host(signal);
    }
    // The replies that made the guest's packets wait may be gone now.
    if sent == Served::More || held_up && muxer.can_take() {
        notify_all(&events[TX..=TX]);
    }
    if received == Served::More {
        notify_all(&events[RX..=RX]);
    }
    Ok(())
}

impl VirtioDevice for Vsock {
    fn name(&self) -> String {
        "virtio-vsock".into()
    }

    fn device_type(&self) -> u32 {
        device_type::VSOCK
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
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Some(activation);
    }

    fn reset(&mut self) {
        self.active = None;
        self.reset = Reset::Over;
        self.muxer.reset();
    }

    fn queues_mut(&mut self) -> &mut [Queue] {
        self.active.as_mut().map_or(&mut [], |a| &mut a.queues)
    }

    fn state(&self) -> VirtioDeviceState {
        VirtioDeviceState::Vsock(self.save())
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        watch_queues(&self.events, ops);
        if let Err(error) = ops.add(Events::with_data(&self.muxer, MUXER, EventSet::IN)) {
            log::error!("virtio-vsock: its sockets cannot be watched: {error:?}");
        }
        if let Some(spoken) = &self.spoken
            && let Err(error) = ops.add(Events::with_data(spoken, SPOKEN, EventSet::IN))
        {
            log::error!("virtio-vsock: the lane cannot be watched: {error:?}");
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match usize::try_from(events.data()).ok() {
            _ if events.data() == SPOKEN => {
                let _ = self.spoken.as_ref().map(EventFd::read);
                self.muxer.release(None);
            }
            Some(queue) if queue < self.events.len() => {
                // An empty counter is as good as a full one: the queue is looked at either way.
                let _ = self.events[queue].read();
            }
            _ => self.muxer.process(),
        }
        self.serve();
    }
}
