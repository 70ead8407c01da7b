//! A guest with one device: carries out steps, and knows what memory the device may have written.

use std::sync::Arc;

use vm_memory::GuestAddress;
use vmm::devices::bus::BusDevice;
use vmm::devices::virtio::testing::{Desc, FakeDriver, HIGH, Subscriber, WRITE};
use vmm::devices::virtio::{F_EVENT_IDX, GuestMemory, VirtioDevice};

use crate::step::{Buffer, Step};

/// Length of the first region, which starts at 0.
pub const LOW_LEN: u64 = 0x2_0000;
/// Where buffers are, in the first region.
pub const BUFFERS: u64 = 0x1_0000;
/// Length of the second region, which starts at [`HIGH`].
pub const HIGH_LEN: u64 = 0x1_0000;
/// Where the rings of the three queues are that a device may have.
const RINGS: std::ops::Range<u64> = 0x1000..0x4000;
/// Most steps of one input, and most buffers of one chain.
pub const MAX_STEPS: usize = 64;
const INDIRECT: u16 = 4;

/// A guest.
pub struct Guest<D> {
    /// Its driver.
    pub driver: FakeDriver<D>,
    /// Both regions as the driver left them.
    shadow: Vec<u8>,
    /// What the device was told to write.
    named: Vec<(u64, u64)>,
    /// Whether we lost count of what the device was told.
    lost: bool,
    queues: usize,
}

impl<D: VirtioDevice + Subscriber> Guest<D> {
    /// A guest whose device is in the reset state.
    pub fn new(device: D) -> Self {
        let queues = device.queue_sizes().len();
        let ranges = [
            (GuestAddress(0), LOW_LEN as usize),
            (GuestAddress(HIGH), HIGH_LEN as usize),
        ];
        let memory = GuestMemory::from_ranges(&ranges).expect("memory");
        Self {
            driver: FakeDriver::in_memory(device, Arc::new(memory)),
            shadow: vec![0; (LOW_LEN + HIGH_LEN) as usize],
            named: Vec::new(),
            lost: false,
            queues,
        }
    }

    /// Goes on with another device, as it was saved with this one's registers. False where those cannot be, which the driver may have made so.
    pub fn go_on(&mut self, device: D) -> bool {
        let state = self.driver.transport.save();
        match FakeDriver::try_restored(device, &self.driver, &state) {
            Ok(driver) => {
                self.driver = driver;
                true
            }
            Err(_) => false,
        }
    }

    /// Does what the step says.
    pub fn step(&mut self, step: &Step) {
        match *step {
            Step::Set(register, value) => {
                self.watch(register.offset());
                self.driver.set(register.offset(), value);
            }
            Step::Write(offset, bytes, len) => {
                self.watch(offset.into());
                let len = usize::from(len % 9);
                self.driver
                    .transport
                    .write(u64::from(offset % 0x1000), &bytes[..len]);
            }
            Step::Read(offset, len) => {
                let mut bytes = vec![0xee; usize::from(len % 17)];
                self.driver
                    .transport
                    .read(u64::from(offset % 0x1000), &mut bytes);
            }
            Step::Restart(event_idx) => self.restart(event_idx),
            Step::Chain(queue, ref buffers) => {
                let chain: Vec<_> = buffers
                    .iter()
                    .take(16)
                    .map(|&buffer| desc(buffer))
                    .collect();
                self.offer(queue.into(), &chain);
            }
            Step::Fill(place, ref bytes) => {
                self.write(place.address(), bytes);
            }
            Step::Descriptor(queue, index, buffer, flags, next) => {
                let queue = usize::from(queue) % self.queues;
                let Desc { addr, len, .. } = desc(buffer);
                if flags & WRITE != 0 {
                    self.name(addr, len);
                }
                self.lost |= flags & INDIRECT != 0;
                // A table ends where the available ring begins.
                self.driver
                    .raw_desc(queue, index % 128, addr, len, flags, next);
            }
            Step::Head(queue, head) => {
                self.driver
                    .make_available(usize::from(queue) % self.queues, head);
            }
            Step::Index(queue, index) => {
                self.driver
                    .raw_avail_idx(usize::from(queue) % self.queues, index);
            }
            Step::Kick(queue) => self.driver.kick(queue.into()),
            Step::Run => self.driver.run(),
            Step::Save => assert_eq!(self.driver.transport.save(), self.driver.transport.save()),
        }
    }

    /// Offers a chain, and lets the device work.
    pub fn offer(&mut self, queue: usize, chain: &[Desc]) {
        let queue = queue % self.queues;
        if chain.is_empty() {
            return;
        }
        for buffer in chain.iter().filter(|buffer| buffer.write) {
            self.name(buffer.addr, buffer.len);
        }
        self.driver.add(queue, chain);
        self.driver.kick(queue);
    }

    /// Offers one buffer for the device to write, without a word.
    pub fn post(&mut self, queue: usize, buffer: Desc) {
        self.name(buffer.addr, buffer.len);
        self.driver.add(queue, &[buffer]);
    }

    /// Resets the device and starts it again.
    pub fn restart(&mut self, event_idx: bool) {
        let mask = if event_idx { u64::MAX } else { !F_EVENT_IDX };
        self.driver.restart_with(mask);
    }

    /// Writes guest memory as a guest's processor does: where there is none, nothing happens.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        let Some(at) = index(addr, bytes.len()) else {
            return;
        };
        self.lost |= overlaps(addr, bytes.len() as u64, &RINGS);
        self.shadow[at..at + bytes.len()].copy_from_slice(bytes);
        self.driver.write(addr, bytes);
    }

    /// The device may write `len` bytes at `addr`.
    fn name(&mut self, addr: u64, len: u32) {
        self.lost |= overlaps(addr, len.into(), &RINGS);
        self.named.push((addr, addr.saturating_add(len.into())));
    }

    /// A write to a queue's addresses moves its rings.
    fn watch(&mut self, offset: u64) {
        self.lost |= (0x78..0xb0).contains(&(offset % 0x1000));
    }

    /// Checks that the device wrote nothing but what it was told to.
    pub fn check_memory(&mut self) {
        if self.lost {
            return;
        }
        let mut named = vec![(RINGS.start, RINGS.end)];
        named.append(&mut self.named);
        for (base, len, start) in [(0, LOW_LEN, 0), (HIGH, HIGH_LEN, LOW_LEN as usize)] {
            let memory = self.driver.read(base, len as usize);
            let shadow = &mut self.shadow[start..start + len as usize];
            for &(first, end) in &named {
                let first = first.clamp(base, base + len) - base;
                let end = end.clamp(base, base + len) - base;
                let range = first as usize..end as usize;
                shadow[range.clone()].copy_from_slice(&memory[range]);
            }
            if memory != shadow {
                let differs = memory.iter().zip(shadow).position(|(is, was)| is != was);
                let at = base + differs.unwrap_or(0) as u64;
                panic!("the device wrote to {at:#x}, which no buffer names");
            }
        }
    }
}

/// A step's buffer as a descriptor.
pub fn desc(buffer: Buffer) -> Desc {
    Desc {
        addr: buffer.place.address(),
        len: buffer.len.bytes(),
        write: buffer.write,
    }
}

/// Where `len` bytes at `addr` are in the shadow.
fn index(addr: u64, len: usize) -> Option<usize> {
    let end = addr.checked_add(len as u64)?;
    if end <= LOW_LEN {
        Some(addr as usize)
    } else if addr >= HIGH && end <= HIGH + HIGH_LEN {
        Some((addr - HIGH + LOW_LEN) as usize)
    } else {
        None
    }
}

fn overlaps(addr: u64, len: u64, range: &std::ops::Range<u64>) -> bool {
    addr < range.end && addr.saturating_add(len) > range.start
}
