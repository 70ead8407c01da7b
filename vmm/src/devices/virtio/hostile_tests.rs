//! Every device under every way to break the rules of rings and of the transport.
//!
//! The same table for all devices: a driver that breaks a rule stops its device, which writes to none of the guest's
//! memory but its own used ring, tells the driver, and works again after a reset. What is particular to a device's
//! requests is in its own `hostile_tests`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::blk::{Block, BlockConfig, Disk};
use super::pmem::{Pmem, PmemConfig};
use super::queue::{Outcome, Served, serve};
use super::rng::Rng;
use super::testing::{
    BUFFERS, FakeDriver, HIGH, LOW_END, NEXT, Subscriber, WRITE, r, ring_base, w,
};
use super::vsock::{Vsock, VsockConfig};
use super::{F_EVENT_IDX, VirtioDevice};
use crate::event_loop::{self, EventLoop};
use crate::exit::ExitLatch;

const INDIRECT: u16 = 4;
/// Between the two regions.
const HOLE: u64 = 0x40_0000;
const HIGH_END: u64 = HIGH + 0x10_0000;
/// Where a table of indirect descriptors is.
const TABLE: u64 = HIGH + 0x1000;

/// A device under attack.
struct Target<D> {
    /// Makes one in the reset state.
    make: fn() -> D,
    /// The queue that is attacked.
    queue: usize,
    /// Flags of the buffer with which a chain begins, and of one that is of no use alone.
    right: u16,
    wrong: u16,
    /// Whether a chain needs a second buffer, for the device to write.
    answer: bool,
    /// Whether a good request is served.
    works: fn(&mut FakeDriver<D>) -> bool,
}

const RNG: Target<Rng> = Target {
    make: || Rng::new().unwrap(),
    queue: 0,
    right: WRITE,
    wrong: 0,
    answer: false,
    works: |driver| driver.request(0, &[w(BUFFERS, 8)]) == [(0, 8)],
};

const PMEM: Target<Pmem> = Target {
    make: || {
        let (id, start, size) = ("test".into(), 1 << 32, 1 << 21);
        Pmem::new(PmemConfig { id, start, size }).unwrap()
    },
    queue: 0,
    right: 0,
    wrong: 0,
    answer: true,
    works: |driver| {
        driver.write(BUFFERS, &[0; 4]);
        driver.request(0, &[r(BUFFERS, 4), w(BUFFERS + 8, 4)]) == [(0, 4)]
    },
};

const BLOCK: Target<Block> = Target {
    make: || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = Disk::of_file(file, "test".as_ref(), false).unwrap();
        Block::new(BlockConfig {
            disk: Arc::new(disk),
            path: "test".into(),
            id: "test".into(),
        })
        .unwrap()
    },
    queue: 0,
    right: 0,
    wrong: 0,
    answer: true,
    works: |driver| {
        driver.write(BUFFERS, &[0; 16]);
        let chain = [
            r(BUFFERS, 16),
            w(BUFFERS + 0x1000, 512),
            w(BUFFERS + 0x2000, 1),
        ];
        driver.request(0, &chain) == [(0, 513)]
    },
};

const VSOCK: Target<Vsock> = Target {
    make: || {
        // The listener's socket is unlinked by its own name when it goes, the directory with it here.
        let dir = tempfile::tempdir().unwrap();
        let (cid, socket_path) = (52, dir.path().join("vsock"));
        Vsock::new(VsockConfig {
            cid,
            socket_path,
            kept_port: 1024,
        })
        .unwrap()
    },
    queue: 1,
    right: 0,
    wrong: WRITE,
    answer: false,
    works: |driver| {
        // A packet without a connection is answered with a reset.
        driver.write(BUFFERS, &[0; 44]);
        driver.add(0, &[w(HIGH, 4096)]);
        driver.request(1, &[r(BUFFERS, 44)]) == [(0, 0)] && driver.used(0) == [(0, 44)]
    },
};

/// How a driver breaks the rules of a ring.
enum Attack {
    /// The first buffer of an otherwise good chain is at this address, of this length.
    Buffer(u64, u32),
    /// Good buffers, each with the flag NEXT, that lead on to these, in a queue of so many.
    Nexts(fn(u16) -> Vec<u16>),
    /// Good addresses, with these flags.
    Flags(&'static [u16]),
    /// One buffer of the wrong direction.
    Wrong,
    /// A head, in a queue of so many.
    Head(fn(u16) -> u16),
    /// An available index, in a queue of so many.
    Index(fn(u16) -> u16),
    /// A table of indirect descriptors at this address, said to be so long: flags and next of each.
    Indirect(u64, u32, &'static [(u16, u16)]),
}

use Attack::{Buffer, Flags, Head, Index, Indirect, Nexts, Wrong};

const ATTACKS: [(&str, Attack); 29] = [
    ("a loop of one", Nexts(|_| vec![0])),
    ("a loop of two", Nexts(|_| vec![1, 0])),
    ("a loop that is entered later", Nexts(|_| vec![1, 2, 1])),
    (
        "a loop of all",
        Nexts(|size| (0..size).map(|n| (n + 1) % size).collect()),
    ),
    ("a next past the table", Nexts(|size| vec![size])),
    ("the last next there is", Nexts(|_| vec![u16::MAX])),
    ("in the hole", Buffer(HOLE, 64)),
    ("across the end of a region", Buffer(LOW_END - 8, 64)),
    ("from the hole into a region", Buffer(HIGH - 8, 64)),
    ("across the end of memory", Buffer(HIGH_END - 8, 64)),
    ("up to the end of addresses", Buffer(u64::MAX - 63, 64)),
    ("wraps around", Buffer(u64::MAX - 3, 64)),
    ("4 GiB", Buffer(BUFFERS, u32::MAX)),
    ("4 GiB that wrap around", Buffer(u64::MAX, u32::MAX)),
    ("all between the regions", Buffer(LOW_END - 1, 0x70_0002)),
    ("wrong direction", Wrong),
    ("readable after writable", Flags(&[WRITE, 0])),
    ("readable between writable", Flags(&[0, WRITE, 0, WRITE])),
    ("a head past the table", Head(|size| size)),
    ("the last head there is", Head(|_| u16::MAX)),
    ("an index one too far", Index(|size| size + 1)),
    ("an index half way round", Index(|_| 0x8000)),
    ("an index that runs backwards", Index(|_| u16::MAX)),
    ("a table in the hole", Indirect(HOLE, 16, &[])),
    (
        "a table that wraps around",
        Indirect(u64::MAX - 15, 32, &[]),
    ),
    ("an empty table", Indirect(TABLE, 0, &[])),
    ("a table of 4 GiB", Indirect(TABLE, u32::MAX, &[(0, 0)])),
    (
        "an indirect loop",
        Indirect(TABLE, 32, &[(NEXT, 1), (NEXT, 0)]),
    ),
    ("a table in a table", Indirect(TABLE, 16, &[(INDIRECT, 0)])),
];

impl<D: VirtioDevice + Subscriber> Target<D> {
    fn attack(&self, driver: &mut FakeDriver<D>, attack: &Attack) {
        let (queue, size) = (self.queue, (self.make)().queue_sizes()[self.queue]);
        let mut head = 0;
        match *attack {
            Buffer(addr, len) => {
                let next = if self.answer { NEXT } else { 0 };
                driver.raw_desc(queue, 0, addr, len, self.right | next, 1);
                driver.raw_desc(queue, 1, BUFFERS + 0x100, 64, WRITE, 0);
            }
            Nexts(nexts) => {
                for (index, next) in (0..).zip(nexts(size)) {
                    driver.raw_desc(queue, index, BUFFERS, 64, self.right | NEXT, next);
                }
            }
            Flags(flags) => {
                for (index, &flags) in (0..).zip(flags) {
                    driver.raw_desc(queue, index, BUFFERS, 64, flags | NEXT, index + 1);
                }
                let last = u16::try_from(flags.len()).unwrap();
                driver.raw_desc(queue, last, BUFFERS, 64, WRITE, 0);
            }
            Wrong => driver.raw_desc(queue, 0, BUFFERS, 64, self.wrong, 0),
            Head(which) => head = which(size),
            Index(index) => return driver.raw_avail_idx(queue, index(size)),
            Indirect(at, len, descs) => {
                for (&(flags, next), at) in descs.iter().zip((at..).step_by(16)) {
                    let mut desc = [0; 16];
                    desc[..8].copy_from_slice(&BUFFERS.to_le_bytes());
                    desc[8] = 64;
                    desc[12..14].copy_from_slice(&(self.right | flags).to_le_bytes());
                    desc[14..].copy_from_slice(&next.to_le_bytes());
                    driver.write(at, &desc);
                }
                driver.raw_desc(queue, 0, at, len, INDIRECT, 0);
            }
        }
        driver.make_available(queue, head);
    }

    /// All of guest memory but the used rings.
    fn memory(&self, driver: &FakeDriver<D>) -> Vec<u8> {
        let mut memory = driver.read(0, usize::try_from(LOW_END).unwrap());
        for queue in 0..3 {
            let used = usize::try_from(ring_base(queue) + 0xa00).unwrap();
            memory[used..used + 0x600].fill(0);
        }
        memory.extend(driver.read(HIGH, 0x10_0000));
        memory
    }

    fn rings(&self) {
        for (name, attack) in &ATTACKS {
            for features in [u64::MAX, !F_EVENT_IDX] {
                let mut driver = FakeDriver::new((self.make)());
                driver.start_with(features);
                self.attack(&mut driver, attack);
                let before = self.memory(&driver);
                driver.kick(self.queue);
                assert!(driver.needs_reset(), "{name}");
                assert_eq!(driver.get(0x60) & 2, 2, "{name}: the driver is not told");
                assert_eq!(driver.irq.count(), 1, "{name}");
                assert_eq!(driver.used(self.queue), [], "{name}");
                assert!(self.memory(&driver) == before, "{name}: memory was written");
                // Nothing more happens until it is reset, whatever the doorbell.
                for _ in 0..100 {
                    driver.kick(self.queue);
                }
                assert_eq!(driver.irq.count(), 1, "{name}");
                driver.restart();
                assert!((self.works)(&mut driver), "{name}: dead after a reset");
            }
        }
    }

    /// Queues that a driver sets up wrongly: size, and where its rings are.
    fn queues(&self) {
        let max = u32::from((self.make)().queue_sizes()[self.queue]);
        let base = ring_base(self.queue);
        let cases = [
            ("size 0", 0, base),
            ("size 3", 3, base),
            ("one less than the largest size", max - 1, base),
            ("one more than the largest size", max + 1, base),
            ("twice the largest size", 2 * max, base),
            ("size 32768", 0x8000, base),
            ("size 65536", 0x1_0000, base),
            ("a size whose low half is good", 0x1_0000 + max, base),
            ("size 2^32 - 1", u32::MAX, base),
            ("misaligned rings", max, base + 1),
            ("half-aligned rings", max, base + 8),
            ("rings in the hole", max, HOLE),
            ("rings across the end of a region", max, LOW_END - 0x810),
            ("rings from the hole into a region", max, HIGH - 0x10),
            ("rings across the end of memory", max, HIGH_END - 0xa10),
            ("rings that wrap around", max, u64::MAX - 0xa0f),
        ];
        for (name, size, base) in cases {
            let mut driver = FakeDriver::new((self.make)());
            driver.negotiate(u64::MAX);
            driver.describe_queue(self.queue, size, base);
            driver.set(0x44, 1);
            assert!(driver.needs_reset(), "{name}");
            assert_eq!(driver.get(0x44), 0, "{name}");
            driver.driver_ok();
            assert_eq!(driver.get(0x70) & 4, 0, "{name}");
            driver.kick(self.queue);
            driver.restart();
            assert!((self.works)(&mut driver), "{name}: dead after a reset");
        }
    }

    /// A running device whose driver meddles with its registers: it goes on as if nothing were.
    fn meddling(&self) {
        type Meddle<D> = fn(&mut FakeDriver<D>, usize);
        let cases: [(&str, Meddle<D>); 10] = [
            ("moves the queue", |d, q| d.describe_queue(q, 4, 0x8_0000)),
            ("enables it again", |d, q| d.set_up_queue(q)),
            ("accepts other features", |d, _| d.accept(0)),
            ("accepts all features", |d, _| d.accept(u64::MAX)),
            ("takes back status bits", |d, _| d.set(0x70, 3)),
            ("asks for its own reset", |d, _| d.set(0x70, 0x4f)),
            ("acknowledges all interrupts", |d, _| d.set(0x64, u32::MAX)),
            ("writes its configuration", |d, _| {
                (0x100..0x200).step_by(4).for_each(|at| d.set(at, u32::MAX));
            }),
            ("writes what is reserved", |d, _| {
                let reserved = [
                    0x00, 0x18, 0x28, 0x3c, 0x40, 0x48, 0x54, 0x68, 0x74, 0xb0, 0xf8,
                ];
                reserved.into_iter().for_each(|at| d.set(at, u32::MAX));
            }),
            ("rings doorbells that are not there", |d, _| {
                for queue in [3, 4, 127, 0x8000, 0x1_0000, u32::MAX] {
                    d.set(0x50, queue);
                }
            }),
        ];
        for (name, meddle) in cases {
            let mut driver = FakeDriver::started((self.make)());
            meddle(&mut driver, self.queue);
            driver.run();
            assert!(!driver.needs_reset(), "{name}");
            assert!((self.works)(&mut driver), "{name}");
        }
        // A queue that is taken away stays away.
        let mut driver = FakeDriver::started((self.make)());
        driver.set(0x30, u32::try_from(self.queue).unwrap());
        driver.set(0x44, 0);
        self.attack(&mut driver, &Index(|_| u16::MAX));
        driver.kick(self.queue);
        driver.set(0x44, 1);
        driver.kick(self.queue);
        assert_eq!(driver.get(0x44), 0);
        assert!(!driver.needs_reset());
        driver.restart();
        assert!((self.works)(&mut driver));
    }
}

#[test]
fn rings_that_break_the_rules_stop_their_device() {
    RNG.rings();
    PMEM.rings();
    BLOCK.rings();
    VSOCK.rings();
}

#[test]
fn queues_that_cannot_be_are_refused() {
    RNG.queues();
    PMEM.queues();
    BLOCK.queues();
    VSOCK.queues();
}

#[test]
fn a_running_device_is_not_for_meddling() {
    RNG.meddling();
    PMEM.meddling();
    BLOCK.meddling();
    VSOCK.meddling();
}

#[test]
fn a_driver_that_adds_as_fast_as_it_is_served_gets_one_turn() {
    for features in [u64::MAX, !F_EVENT_IDX] {
        let mut driver = FakeDriver::new((RNG.make)());
        driver.start_with(features);
        driver.raw_desc(0, 0, BUFFERS, 8, WRITE, 0);
        driver.make_available(0, 0);
        let (memory, signal) = (driver.memory.clone(), driver.transport.signal().clone());
        let device = driver.device.clone();
        let mut device = device.lock().unwrap();
        let mut turns = 0;
        let served = serve(&mut device.queues_mut()[0], &memory, &signal, |_| {
            driver.make_available(0, 0);
            turns += 1;
            Ok(Outcome::Used(0))
        });
        assert_eq!(served.unwrap(), Served::More);
        assert_eq!(turns, 9, "its queue holds eight");
        assert_eq!(driver.irq.count(), 1);
    }
}

#[test]
fn a_doorbell_in_a_loop_leaves_other_devices_their_turn() {
    let mut loud = FakeDriver::started((RNG.make)());
    let mut quiet = FakeDriver::started((PMEM.make)());
    let exit = ExitLatch::new().unwrap();
    let devices: Vec<event_loop::Subscriber> = vec![loud.device.clone(), quiet.device.clone()];
    let event_loop = EventLoop::start(devices, exit.clone()).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ringing = scope.spawn(|| {
            // It keeps the queue full, and rings all the time.
            let (mut served, mut waiting) = (0, 0);
            loud.raw_desc(0, 0, BUFFERS, 4096, WRITE, 0);
            let deadline = Instant::now() + Duration::from_secs(10);
            // The other thread may be through before this one has begun.
            while !stop.load(Ordering::Relaxed) || (served == 0 && Instant::now() < deadline) {
                while waiting < 8 {
                    loud.make_available(0, 0);
                    waiting += 1;
                }
                loud.set(0x50, 0);
                let used = loud.used(0).len();
                (served, waiting) = (served + used, waiting - used);
            }
            (served, loud.needs_reset())
        });
        quiet.write(BUFFERS, &[0; 4]);
        for _ in 0..200 {
            quiet.add(0, &[r(BUFFERS, 4), w(BUFFERS + 8, 4)]);
            quiet.set(0x50, 0);
            let deadline = Instant::now() + Duration::from_secs(10);
            while quiet.used(0).is_empty() {
                assert!(Instant::now() < deadline, "the other device starves");
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        let (served, stopped) = ringing.join().unwrap();
        assert!(served > 0 && !stopped);
    });
    drop(event_loop);
    assert_eq!(exit.get(), None);
}
