//! A driver for tests and fuzzers: sets up a device through its registers, builds descriptor chains in guest
//! memory, and runs the device's side of the event loop. No KVM. It panics where a test should fail.
//!
//! Other crates see it with the feature `testing`, which no build of the monitor has.
//!
//! Guest memory is 1 MiB at 0 and 1 MiB at 8 MiB. Queue `n` has its rings at `0x1000 * (n + 1)`; the
//! rest is for a test's buffers, from [`BUFFERS`] on.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use snapshot_fmt::state::virtio::VirtioMmioState;
use vm_memory::{Bytes, GuestAddress};

use super::mmio::{MmioTransport, TransportError};
use super::signal::status;
use super::{F_EVENT_IDX, F_VERSION_1, GuestMemory, VirtioDevice};
use crate::devices::bus::BusDevice;
use crate::devices::interrupt::Interrupt;

/// Where a test's buffers may be, up to [`LOW_END`].
pub const BUFFERS: u64 = 0x1_0000;
/// End of the first region.
pub const LOW_END: u64 = 0x10_0000;
/// Start of the second region, 1 MiB long.
pub const HIGH: u64 = 0x80_0000;

/// Descriptor flag: the chain goes on at `next` (section 2.7.5).
pub const NEXT: u16 = 1;
/// Descriptor flag: the buffer is for the device to write.
pub const WRITE: u16 = 2;

/// An interrupt that is counted.
#[derive(Default)]
pub struct CountingInterrupt(AtomicUsize);

impl CountingInterrupt {
    /// How often it was raised.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interrupt for CountingInterrupt {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// The memory of a test.
pub fn memory() -> Arc<GuestMemory> {
    let ranges = [
        (GuestAddress(0), 0x10_0000),
        (GuestAddress(HIGH), 0x10_0000),
    ];
    Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub write: bool,
}

/// A buffer that the device reads.
pub fn r(addr: u64, len: u32) -> Desc {
    let write = false;
    Desc { addr, len, write }
}

/// A buffer that the device writes.
pub fn w(addr: u64, len: u32) -> Desc {
    let write = true;
    Desc { addr, len, write }
}

struct Ring {
    size: u16,
    next_desc: u16,
    avail_idx: u16,
    used_idx: u16,
}

/// A driver of one device.
pub struct FakeDriver<D> {
    /// The device's registers.
    pub transport: MmioTransport,
    /// The device itself.
    pub device: Arc<Mutex<D>>,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The device's interrupt.
    pub irq: Arc<CountingInterrupt>,
    events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    rings: Vec<Ring>,
}

/// A device that the event loop serves.
pub trait Subscriber: MutEventSubscriber + 'static {}

impl<D: MutEventSubscriber + 'static> Subscriber for D {}

impl<D: VirtioDevice + Subscriber> FakeDriver<D> {
    /// A device in the reset state.
    pub fn new(device: D) -> Self {
        Self::in_memory(device, memory())
    }

    /// A device in the reset state, in memory of another size.
    pub fn in_memory(device: D, memory: Arc<GuestMemory>) -> Self {
        let made = Self::with(device, memory, |memory, irq, device| {
            Ok::<_, Infallible>(MmioTransport::new(memory, irq, device))
        });
        made.unwrap_or_else(|never| match never {})
    }

    /// A device as it was saved, with the rings that `old` had.
    pub fn restored<O>(device: D, old: &FakeDriver<O>, state: &VirtioMmioState) -> Self {
        Self::try_restored(device, old, state).unwrap()
    }

    /// As [`Self::restored`], where the driver may have made a state that cannot be.
    pub fn try_restored<O>(
        device: D,
        old: &FakeDriver<O>,
        state: &VirtioMmioState,
    ) -> Result<Self, TransportError> {
        let mut this = Self::with(device, old.memory.clone(), |memory, irq, device| {
            MmioTransport::restore(memory, irq, device, state)
        })?;
        for (ring, old) in this.rings.iter_mut().zip(&old.rings) {
            ring.next_desc = old.next_desc;
            ring.avail_idx = old.avail_idx;
            ring.used_idx = old.used_idx;
        }
        Ok(this)
    }

    fn with<E>(
        device: D,
        memory: Arc<GuestMemory>,
        transport: impl FnOnce(
            Arc<GuestMemory>,
            Arc<dyn Interrupt>,
            Arc<Mutex<dyn VirtioDevice>>,
        ) -> Result<MmioTransport, E>,
    ) -> Result<Self, E> {
        let rings = device.queue_sizes().iter().map(|&size| Ring {
            size,
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
        });
        let rings = rings.collect();
        let device = Arc::new(Mutex::new(device));
        let irq = Arc::new(CountingInterrupt::default());
        let mut events = EventManager::new().unwrap();
        let subscriber: Arc<Mutex<dyn MutEventSubscriber + Send>> = device.clone();
        events.add_subscriber(subscriber);
        Ok(Self {
            transport: transport(memory.clone(), irq.clone(), device.clone())?,
            device,
            memory,
            irq,
            events,
            rings,
        })
    }

    /// A device whose driver is ready, with all queues and features.
    pub fn started(device: D) -> Self {
        let mut this = Self::new(device);
        this.start();
        this
    }

    /// Without EVENT_IDX.
    pub fn started_plain(device: D) -> Self {
        let mut this = Self::new(device);
        this.start_with(!F_EVENT_IDX);
        this
    }

    /// Makes the driver ready, with all queues and features.
    pub fn start(&mut self) {
        self.start_with(u64::MAX);
    }

    /// Resets the device, forgets the rings, and starts again.
    pub fn restart(&mut self) {
        self.restart_with(u64::MAX);
    }

    /// As [`FakeDriver::restart`], with the features in `mask`.
    pub fn restart_with(&mut self, mask: u64) {
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            (ring.next_desc, ring.avail_idx, ring.used_idx) = (0, 0, 0);
            let rings = GuestAddress(ring_base(queue));
            self.memory.write_slice(&[0; 0x1000], rings).unwrap();
        }
        self.start_with(mask);
    }

    /// Makes the driver ready, with all queues and the features in `mask`.
    pub fn start_with(&mut self, mask: u64) {
        let offered = self.negotiate(mask);
        assert_ne!(offered & F_VERSION_1, 0);
        for queue in 0..self.rings.len() {
            self.set_up_queue(queue);
        }
        self.driver_ok();
    }

    /// Goes as far as FEATURES_OK, with the offered features that are in `mask`.
    pub fn negotiate(&mut self, mask: u64) -> u64 {
        self.set(0x70, 0);
        self.set(0x70, status::ACKNOWLEDGE);
        self.set(0x70, status::ACKNOWLEDGE | status::DRIVER);
        let mut features = 0;
        for half in [0, 1] {
            self.set(0x14, half);
            features |= u64::from(self.get(0x10)) << (32 * half);
        }
        self.accept(features & mask);
        self.set(0x70, 0xb);
        features
    }

    /// Writes the features that the driver accepts.
    pub fn accept(&mut self, features: u64) {
        let bytes = features.to_le_bytes();
        for (half, bytes) in [(0, &bytes[..4]), (1, &bytes[4..])] {
            self.set(0x24, half);
            self.set(0x20, u32::from_le_bytes(bytes.try_into().unwrap()));
        }
    }

    /// Gives a queue its rings and enables it.
    pub fn set_up_queue(&mut self, queue: usize) {
        let base = ring_base(queue);
        self.describe_queue(queue, self.rings[queue].size.into(), base);
        self.set(0x44, 1);
    }

    /// Everything but the ready bit.
    pub fn describe_queue(&mut self, queue: usize, size: u32, base: u64) {
        self.set(0x30, u32::try_from(queue).unwrap());
        self.set(0x38, size);
        for (offset, addr) in [(0x80, base), (0x90, base + 0x800), (0xa0, base + 0xa00)] {
            self.set(offset, u32::try_from(addr & 0xffff_ffff).unwrap());
            self.set(offset + 4, u32::try_from(addr >> 32).unwrap());
        }
    }

    /// The last step of a start.
    pub fn driver_ok(&mut self) {
        self.set(0x70, 0xf);
    }

    /// Reads a register.
    pub fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Reads from the configuration space.
    pub fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    /// Puts a chain in the queue; does not notify.
    pub fn add(&mut self, queue: usize, chain: &[Desc]) -> u16 {
        let head = self.rings[queue].next_desc;
        let size = self.rings[queue].size;
        for (n, desc) in chain.iter().enumerate() {
            let index = self.rings[queue].next_desc;
            let next = (index + 1) % size;
            let mut flags = if n + 1 < chain.len() { NEXT } else { 0 };
            if desc.write {
                flags |= WRITE;
            }
            self.raw_desc(queue, index, desc.addr, desc.len, flags, next);
            self.rings[queue].next_desc = next;
        }
        self.make_available(queue, head);
        head
    }

    /// Writes one descriptor as it is.
    pub fn raw_desc(
        &mut self,
        queue: usize,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = GuestAddress(ring_base(queue) + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Adds a head to the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let avail = ring_base(queue) + 0x800;
        let at = avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        let idx = ring.avail_idx;
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        self.raw_avail_idx(queue, idx);
    }

    /// Writes the available index as it is.
    pub fn raw_avail_idx(&mut self, queue: usize, idx: u16) {
        let at = GuestAddress(ring_base(queue) + 0x802);
        self.memory.write_obj(idx, at).unwrap();
    }

    /// Notifies and lets the device work.
    pub fn kick(&mut self, queue: usize) {
        self.set(0x50, u32::try_from(queue).unwrap());
        self.run();
    }

    /// Lets the event loop run until it is idle.
    pub fn run(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device keeps the event loop busy");
    }

    /// Notifies, and lets the event loop make one turn.
    pub fn kick_once(&mut self, queue: usize) {
        self.set(0x50, u32::try_from(queue).unwrap());
        self.events.run_with_timeout(0).unwrap();
    }

    /// Lets the event loop wait for an event first.
    pub fn run_for(&mut self, milliseconds: i32) {
        self.events.run_with_timeout(milliseconds).unwrap();
        self.run();
    }

    /// Chains that were used since last time: head and length.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let used = ring_base(queue) + 0xa00;
        let idx: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let ring = &mut self.rings[queue];
        let mut list = Vec::new();
        while ring.used_idx != idx {
            let at = used + 4 + 8 * u64::from(ring.used_idx % ring.size);
            let id = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            list.push((id, len));
            ring.used_idx = ring.used_idx.wrapping_add(1);
        }
        // Ask for an interrupt for the next one, as a driver with EVENT_IDX does.
        let event = ring_base(queue) + 0x804 + 2 * u64::from(ring.size);
        self.memory
            .write_obj(ring.used_idx, GuestAddress(event))
            .unwrap();
        list
    }

    /// Puts a chain in the queue, lets the device work, and says what was used.
    pub fn request(&mut self, queue: usize, chain: &[Desc]) -> Vec<(u32, u32)> {
        self.add(queue, chain);
        self.kick(queue);
        self.used(queue)
    }

    /// Writes guest memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(addr))
            .unwrap();
        bytes
    }

    /// Whether the device has stopped.
    pub fn needs_reset(&mut self) -> bool {
        self.get(0x70) & status::DEVICE_NEEDS_RESET != 0
    }
}

/// Where the rings of `queue` are.
pub fn ring_base(queue: usize) -> u64 {
    0x1000 * (u64::try_from(queue).unwrap() + 1)
}
