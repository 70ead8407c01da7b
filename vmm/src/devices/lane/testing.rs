//! A guest for tests: the driver's registers and the program's rings, and somebody who listens on the host. No KVM.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{GUEST_WANTS, HOST_STATE, HOST_WANTS, WANTS_DATA, WANTS_ROOM};
use super::{Lane, LaneConfig};
use crate::devices::bus::BusDevice;
use crate::devices::virtio::testing::{CountingInterrupt, memory};
use crate::memory::GuestMemory;

/// Where the window is.
pub const WINDOW: u64 = 0x2_0000;
/// Its page.
pub const FRAME: u32 = 0x20;
pub const PORT: u32 = 1024;

/// Words of the indices, and bytes of the rings, of each direction.
pub const TO_GUEST: (u64, u64, u64, u32) = (0x00, 0x44, 0x4000, 0x4000);
pub const TO_HOST: (u64, u64, u64, u32) = (0x40, 0x04, 0x8000, 0x8000);

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

pub struct Guest {
    pub lane: Arc<Mutex<Lane>>,
    pub memory: Arc<GuestMemory>,
    pub irq: Arc<CountingInterrupt>,
    pub listener: UnixListener,
    pub dir: TempDir,
    events: EventManager<Subscriber>,
}

pub fn config(dir: &TempDir) -> LaneConfig {
    LaneConfig {
        socket_path: dir.path().join("s"),
        port: PORT,
    }
}

impl Guest {
    /// One whose driver is ready, and has opened nothing.
    pub fn new() -> Self {
        let (memory, irq) = (memory(), Arc::new(CountingInterrupt::default()));
        let dir = tempfile::tempdir().unwrap();
        let spoken = EventFd::new(EFD_NONBLOCK).unwrap();
        let irq_of_lane = Arc::clone(&irq) as _;
        let lane = Lane::new(config(&dir), Arc::clone(&memory), irq_of_lane, spoken).unwrap();
        let mut this = Self::with(lane, memory, irq, dir);
        this.set_register(0x08, FRAME);
        this
    }

    pub fn with(
        lane: Lane,
        memory: Arc<GuestMemory>,
        irq: Arc<CountingInterrupt>,
        dir: TempDir,
    ) -> Self {
        let lane = Arc::new(Mutex::new(lane));
        let mut events = EventManager::<Subscriber>::new().unwrap();
        events.add_subscriber(Arc::clone(&lane) as _);
        let path = dir.path().join(format!("s_{PORT}"));
        let _ = std::fs::remove_file(&path);
        Self {
            lane,
            memory,
            irq,
            listener: UnixListener::bind(path).unwrap(),
            dir,
            events,
        }
    }

    /// Opens the stream; gives the host's end of it.
    pub fn open(&mut self) -> UnixStream {
        self.set_register(0x0c, 1);
        assert_eq!(self.register(0x0c), 1);
        let (stream, _) = self.listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        self.run();
        stream
    }

    pub fn set_register(&mut self, offset: u64, value: u32) {
        let mut lane = self.lane.lock().unwrap();
        lane.write(offset, &value.to_le_bytes());
    }

    pub fn register(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.lane.lock().unwrap().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Runs the event loop until it is at rest.
    pub fn run(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    pub fn word(&self, offset: u64) -> u32 {
        self.memory.read_obj(GuestAddress(WINDOW + offset)).unwrap()
    }

    pub fn set_word(&self, offset: u64, value: u32) {
        let at = GuestAddress(WINDOW + offset);
        self.memory.write_obj(value, at).unwrap();
    }

    pub fn ring_doorbell(&mut self) {
        self.lane.lock().unwrap().doorbell().write(1).unwrap();
        self.run();
    }

    /// Puts in what there is room for, and rings where the host wants it; says how much.
    pub fn say(&mut self, bytes: &[u8]) -> usize {
        let (head, tail, data, size) = TO_HOST;
        let index = self.word(head);
        let room = size.saturating_sub(index.wrapping_sub(self.word(tail)));
        let bytes = &bytes[..bytes.len().min(room as usize)];
        for (n, byte) in (0..).zip(bytes) {
            let at = WINDOW + data + u64::from(index.wrapping_add(n) % size);
            self.memory.write_obj(*byte, GuestAddress(at)).unwrap();
        }
        self.set_word(
            head,
            index.wrapping_add(u32::try_from(bytes.len()).unwrap()),
        );
        if self.word(HOST_WANTS as u64) & WANTS_DATA != 0 {
            self.ring_doorbell();
        }
        bytes.len()
    }

    /// Takes out all there is, and rings where the host wants it.
    pub fn hear(&mut self) -> Vec<u8> {
        let (head, tail, data, size) = TO_GUEST;
        let (index, end) = (self.word(tail), self.word(head));
        let len = end.wrapping_sub(index);
        assert!(len <= size);
        let bytes = (0..len).map(|n| {
            let at = WINDOW + data + u64::from(index.wrapping_add(n) % size);
            self.memory.read_obj(GuestAddress(at)).unwrap()
        });
        let bytes = bytes.collect();
        self.set_word(tail, end);
        if self.word(HOST_WANTS as u64) & WANTS_ROOM != 0 {
            self.ring_doorbell();
        }
        bytes
    }

    pub fn want(&self, wants: u32) {
        self.set_word(GUEST_WANTS as u64, wants);
    }

    pub fn state(&self) -> u32 {
        self.word(HOST_STATE as u64)
    }
}
