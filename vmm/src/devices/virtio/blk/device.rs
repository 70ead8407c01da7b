//! The block device: configuration space, one queue, one disk.

use std::path::PathBuf;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use snapshot_fmt::state::virtio::VirtioDeviceState;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::BlockError;
use super::disk::Disk;
use super::queue::{
    MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS, Target,
};
use crate::devices::virtio::queue::{Outcome, Served, serve};
use crate::devices::virtio::{
    Activation, F_EVENT_IDX, F_VERSION_1, VirtioDevice, device_type, new_queue_events, notify_all,
    read_config_bytes, watch_queues,
};

/// A driver initialises every descriptor, so a long queue costs boot time.
const QUEUE_SIZES: [u16; 1] = [128];

/// After so many bytes the event loop's other devices have their turn: 16 MiB.
pub(super) const TURN: u64 = 16 << 20;

/// Features (section 5.2.3).
pub(super) mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Size in bytes of `struct virtio_blk_config` as far as it is used (section 5.2.4).
const CONFIG_SIZE: usize = 60;

/// A disk for the guest.
pub struct BlockConfig {
    /// Its content. Locking the file that it is in is the caller's.
    pub disk: Arc<Disk>,
    /// Where that is; for messages only.
    pub path: PathBuf,
    /// Serial number that the guest reads, in `/sys/block/vda/serial`; cut off after 20 bytes.
    pub id: String,
}

/// A block device.
pub struct Block {
    pub(super) path: PathBuf,
    pub(super) target: Target,
    pub(super) id: String,
    config: [u8; CONFIG_SIZE],
    events: Arc<[EventFd]>,
    active: Option<Activation>,
}

impl Block {
    /// A device in the reset state.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let BlockConfig { disk, path, id } = config;
        let events = match new_queue_events(QUEUE_SIZES.len()) {
            Ok(events) => events,
            Err(source) => return Err(BlockError::EventFd { path, source }),
        };
        Ok(Self {
            path,
            config: config_space(disk.sectors(), disk.read_only()),
            target: Target {
                disk,
                serial: serial(&id),
            },
            id,
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
        let (target, memory, signal) = (&self.target, &*active.memory, &*active.signal);
        let (mut moved, mut put_off) = (0, false);
        let served = serve(&mut active.queues[0], memory, signal, |chain| {
            if moved >= TURN {
                put_off = true;
                return Ok(Outcome::Later);
            }
            target
                .request(memory, chain, signal, &mut moved)
                .map(Outcome::Used)
        });
        match served {
            Ok(Served::All) if !put_off => {}
            Ok(_) => notify_all(&self.events),
            Err(error) => signal.fail(error),
        }
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> String {
        format!("virtio-blk {} ({})", self.id, self.path.display())
    }

    fn device_type(&self) -> u32 {
        device_type::BLOCK
    }

    fn features(&self) -> u64 {
        let common =
            F_VERSION_1 | F_EVENT_IDX | feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        if self.target.disk.read_only() {
            common | feature::RO
        } else {
            common | feature::DISCARD | feature::WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> Arc<[EventFd]> {
        self.events.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
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
        VirtioDeviceState::Block(self.save())
    }
}

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        watch_queues(&self.events, ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // An empty counter is as good as a full one: the queue is looked at either way.
        let _ = self.events[0].read();
        self.serve();
    }
}

/// `struct virtio_blk_config`.
fn config_space(sectors: u64, read_only: bool) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    // Header and status take a descriptor each.
    put(12, &(u32::from(QUEUE_SIZES[0]) - 2).to_le_bytes());
    put(20, &512u32.to_le_bytes());
    if !read_only {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // In sectors: what a file system can give back.
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_ZEROES_RANGES.to_le_bytes());
        put(56, &[1]);
    }
    config
}

fn serial(id: &str) -> [u8; 20] {
    let mut serial = [0; 20];
    let len = id.len().min(serial.len());
    serial[..len].copy_from_slice(&id.as_bytes()[..len]);
    serial
}
