//! The lane, between a guest that breaks its rules and a program of the host.
//!
//! As long as the guest keeps the rules, what either side says arrives, in order. Whatever it does, nothing outside the windows that it has named is
//! written to, the event loop comes to rest, and the guest can open a stream that works.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once};

use arbitrary::Arbitrary;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::SIGPIPE;
use signal_hook::flag;
use snapshot_fmt::state::lane::LaneState;
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::bus::BusDevice;
use vmm::devices::lane::{DOORBELL, Lane, LaneConfig};
use vmm::devices::virtio::GuestMemory;
use vmm::devices::virtio::testing::{CountingInterrupt, HIGH};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::MAX_STEPS;

/// Bytes of each of the two ranges of memory, at 0 and at [`HIGH`].
const RANGE: u64 = 0x4_0000;
const WINDOW_BYTES: u64 = 0x1_0000;
const PORT: u32 = 1024;

const FRAME: u64 = 0x08;
const CONNECT: u64 = 0x0c;

/// Words of the indices, where the bytes are, and how many (`docs/lane.md`).
const TO_GUEST: Ring = Ring(0x00, 0x44, 0x4000, 0x4000);
const TO_HOST: Ring = Ring(0x40, 0x04, 0x8000, 0x8000);
const HOST_WANTS: u64 = 0x08;
const HOST_STATE: u64 = 0x0c;
const GUEST_WANTS: u64 = 0x48;
const WANTS_DATA: u32 = 1;
const WANTS_ROOM: u32 = 2;

struct Ring(u64, u64, u64, u32);

/// Steps of the guest and of the host's program.
pub type Input = Vec<LaneStep>;

/// A word's value.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Value {
    /// So much more than it was.
    More(u16),
    /// So much less.
    Less(u16),
    /// Anything.
    Any(u32),
}

/// A step.
#[derive(Arbitrary, Clone, Debug)]
pub enum LaneStep {
    /// Puts in so many bytes, as far as there is room, and rings where the host wants it.
    Say(u16),
    /// Takes out what there is, so many bytes at most, and rings where the host wants it.
    Hear(u16),
    /// Opens a stream.
    Open,
    /// Ends it.
    Close,
    /// Names a page that may be a window's.
    Frame(u8),
    /// Says what it waits for.
    Wants(u8),
    /// The host's program says so many bytes.
    HostSay(u16),
    /// It reads what there is, so many bytes at most.
    HostHear(u16),
    /// It hangs up.
    HostClose,
    /// Rings the doorbell.
    Ring,
    /// Writes a word of the window.
    Word(u8, Value),
    /// Writes bytes of the window.
    Fill(u16, [u8; 16]),
    /// Writes a register, or anything anywhere among them.
    Write(u16, [u8; 8], u8),
    /// Reads.
    Read(u16, u8),
    /// The device is saved, and another goes on.
    GoOn,
    /// Or goes on from something else.
    GoOnFrom(u32, bool, bool),
}

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A guest, and the host's program.
struct World {
    memory: Arc<GuestMemory>,
    lane: Arc<Mutex<Lane>>,
    events: EventManager<Subscriber>,
    listener: UnixListener,
    socket: PathBuf,
    host: Option<UnixStream>,
    /// Frames that were a window's.
    windows: Vec<u32>,
    /// What either side has said and the other not heard, as long as the guest keeps the rules.
    under_way: Option<[VecDeque<u8>; 2]>,
    /// The next byte that somebody says.
    next: u8,
}

fn new_lane(memory: &Arc<GuestMemory>, socket: &Path) -> Lane {
    let config = LaneConfig {
        socket_path: socket.to_path_buf(),
        port: PORT,
    };
    let spoken = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let irq = Arc::new(CountingInterrupt::default());
    Lane::new(config, Arc::clone(memory), irq, spoken).expect("a lane")
}

impl World {
    fn new() -> Self {
        let ranges = [0, HIGH].map(|start| (GuestAddress(start), RANGE as usize));
        let memory = Arc::new(GuestMemory::from_ranges(&ranges).expect("memory"));
        let socket = std::env::temp_dir().join(format!("bough-fuzz-lane-{}", std::process::id()));
        let mut path = socket.clone().into_os_string();
        path.push(format!("_{PORT}"));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        let lane = Arc::new(Mutex::new(new_lane(&memory, &socket)));
        let mut this = Self {
            memory,
            events: EventManager::new().expect("an event loop"),
            lane: Arc::clone(&lane),
            listener,
            socket,
            host: None,
            windows: Vec::new(),
            under_way: None,
            next: 0,
        };
        this.events.add_subscriber(lane as Subscriber);
        this
    }

    fn run(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).expect("an event loop") == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.lane.lock().expect("a lane").write(offset, data);
        self.look();
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.lane.lock().expect("a lane").read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Notes a new window, and takes a stream that was opened.
    fn look(&mut self) {
        let frame = self.get(FRAME);
        if frame != 0 && !self.windows.contains(&frame) {
            self.windows.push(frame);
        }
        while let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).expect("a socket");
            self.host = Some(stream);
            self.under_way = Some(Default::default());
        }
        if self.get(CONNECT) == 0 {
            self.under_way = None;
        }
    }

    fn address(&self, offset: u64) -> Option<GuestAddress> {
        let frame = self.get(FRAME);
        (frame != 0).then(|| GuestAddress((u64::from(frame) << 12) + offset))
    }

    fn word(&self, offset: u64) -> u32 {
        let at = self.address(offset);
        at.map_or(0, |at| {
            self.memory.read_obj(at).expect("a word of the window")
        })
    }

    fn set_word(&self, offset: u64, value: u32) {
        if let Some(at) = self.address(offset) {
            self.memory
                .write_obj(value, at)
                .expect("a word of the window");
        }
    }

    fn bytes(&mut self, len: u16) -> Vec<u8> {
        let bytes = (0..len).map(|n| self.next.wrapping_add(n as u8)).collect();
        self.next = self.next.wrapping_add(len as u8);
        bytes
    }

    fn ring_if(&mut self, wanted: u32) {
        if self.word(HOST_WANTS) & wanted != 0 {
            self.set(DOORBELL, 1);
        }
    }

    fn say(&mut self, len: u16) {
        let Ring(head, tail, data, size) = TO_HOST;
        let index = self.word(head);
        let room = size.saturating_sub(index.wrapping_sub(self.word(tail)));
        let len = u32::from(len).min(room);
        let bytes = self.bytes(len as u16);
        for (n, byte) in (0..).zip(&bytes) {
            let at = data + u64::from(index.wrapping_add(n) % size);
            if let Some(at) = self.address(at) {
                self.memory
                    .write_obj(*byte, at)
                    .expect("a byte of the window");
            }
        }
        self.set_word(head, index.wrapping_add(len));
        if let Some([to_host, _]) = &mut self.under_way {
            to_host.extend(&bytes);
        }
        self.ring_if(WANTS_DATA);
    }

    fn hear(&mut self, most: u16) {
        let Ring(head, tail, data, size) = TO_GUEST;
        let index = self.word(tail);
        let filled = self.word(head).wrapping_sub(index);
        let len = filled.min(most.into());
        let window = self.address(0);
        if let Some([_, to_guest]) = &mut self.under_way {
            assert!(filled <= size, "more than the ring has room for");
            for n in 0..len {
                let at = data + u64::from(index.wrapping_add(n) % size);
                let at = GuestAddress(window.expect("a window").0 + at);
                let byte: u8 = self.memory.read_obj(at).expect("a byte of the window");
                assert_eq!(to_guest.pop_front(), Some(byte));
            }
        }
        self.set_word(tail, index.wrapping_add(len));
        self.ring_if(WANTS_ROOM);
    }

    fn host_say(&mut self, len: u16) {
        let bytes = self.bytes(len);
        let Some(host) = &mut self.host else { return };
        let said = host.write(&bytes).unwrap_or(0);
        // What was not taken is said the next time.
        self.next = self.next.wrapping_sub((bytes.len() - said) as u8);
        if let Some([_, to_guest]) = &mut self.under_way {
            to_guest.extend(&bytes[..said]);
        }
    }

    fn host_hear(&mut self, most: u16) {
        let Some(host) = &mut self.host else { return };
        let mut bytes = vec![0; most.into()];
        let len = host.read(&mut bytes).unwrap_or(0);
        if let Some([to_host, _]) = &mut self.under_way {
            for byte in &bytes[..len] {
                assert_eq!(to_host.pop_front(), Some(*byte));
            }
        }
    }

    /// Goes on from `state`, in a new device.
    fn go_on(&mut self, state: &LaneState) -> bool {
        let mut lane = new_lane(&self.memory, &self.socket);
        let Ok(host) = lane.load(state) else {
            return false;
        };
        assert_eq!(host.is_some(), state.kept);
        lane.give_seed().expect("random bytes");
        let lane = Arc::new(Mutex::new(lane));
        self.events = EventManager::new().expect("an event loop");
        self.events.add_subscriber(Arc::clone(&lane) as Subscriber);
        self.lane = lane;
        if !state.kept {
            self.under_way = None;
        }
        self.host = host.inspect(|host| host.set_nonblocking(true).expect("a socket"));
        self.look();
        self.run();
        if state.open && !state.kept {
            assert_eq!((self.word(HOST_STATE), self.get(CONNECT)), (2, 0));
        }
        true
    }

    fn take(&mut self, step: &LaneStep) {
        match *step {
            LaneStep::Say(len) => self.say(len),
            LaneStep::Hear(len) => self.hear(len),
            LaneStep::Open => self.set(CONNECT, 1),
            LaneStep::Close => self.set(CONNECT, 0),
            LaneStep::Frame(frame) => {
                let high = (HIGH >> 12) as u32;
                let frame = u32::from(frame);
                self.set(
                    FRAME,
                    if frame % 2 == 0 {
                        frame / 2
                    } else {
                        high + frame / 2
                    },
                );
            }
            LaneStep::Wants(wants) => self.set_word(GUEST_WANTS, wants.into()),
            LaneStep::HostSay(len) => self.host_say(len),
            LaneStep::HostHear(len) => self.host_hear(len),
            LaneStep::HostClose => {
                self.host = None;
                self.under_way = None;
            }
            LaneStep::Ring => self.set(DOORBELL, 1),
            LaneStep::Word(word, value) => {
                self.under_way = None;
                let offset = 4 * u64::from(word % 32);
                let was = self.word(offset);
                let value = match value {
                    Value::More(more) => was.wrapping_add(more.into()),
                    Value::Less(less) => was.wrapping_sub(less.into()),
                    Value::Any(value) => value,
                };
                self.set_word(offset, value);
            }
            LaneStep::Fill(offset, bytes) => {
                self.under_way = None;
                let offset = u64::from(offset).min(WINDOW_BYTES - 16);
                if let Some(at) = self.address(offset) {
                    self.memory
                        .write_slice(&bytes, at)
                        .expect("bytes of the window");
                }
            }
            LaneStep::Write(offset, bytes, len) => {
                self.write(offset.into(), &bytes[..usize::from(len % 9)]);
            }
            LaneStep::Read(offset, len) => {
                let mut bytes = [0xee; 16];
                let bytes = &mut bytes[..usize::from(len % 17)];
                self.lane.lock().expect("a lane").read(offset.into(), bytes);
            }
            LaneStep::GoOn => {
                let state = self.lane.lock().expect("a lane").save();
                if let Some([to_host, to_guest]) = self.under_way.as_ref().filter(|_| state.kept) {
                    assert!(to_host.is_empty() && to_guest.is_empty());
                }
                assert!(self.go_on(&state), "what was saved is refused");
            }
            LaneStep::GoOnFrom(frame, open, kept) => {
                self.under_way = None;
                self.go_on(&LaneState { frame, open, kept });
            }
        }
    }

    /// Nothing but windows was written to.
    fn check_memory(&self) {
        let pages = RANGE >> 12;
        let mut bytes = [0; 4096];
        for page in (0..pages).chain((HIGH >> 12)..(HIGH >> 12) + pages) {
            let is_named = |&frame: &u32| {
                let frame = u64::from(frame);
                (frame..frame + (WINDOW_BYTES >> 12)).contains(&page)
            };
            if self.windows.iter().any(is_named) {
                continue;
            }
            let at = GuestAddress(page << 12);
            self.memory.read_slice(&mut bytes, at).expect("a page");
            assert!(bytes == [0; 4096], "the device wrote to page {page:#x}");
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{PORT}"));
        let _ = std::fs::remove_file(path);
    }
}

/// Runs the device between both.
pub fn run(steps: &Input) {
    // As in the monitor, whose main function is Rust's: who writes to nobody gets an error.
    static PIPE: Once = Once::new();
    PIPE.call_once(|| {
        flag::register(SIGPIPE, Arc::default()).expect("a handler");
    });
    let mut world = World::new();
    world.set(FRAME, 1);
    world.set(CONNECT, 1);
    for step in steps.iter().take(MAX_STEPS) {
        world.take(step);
        world.run();
    }
    world.check_memory();
    // Whatever was before, another stream works.
    world.set(FRAME, 1);
    world.set(CONNECT, 1);
    world.run();
    world.say(300);
    world.run();
    world.host_hear(300);
    world.host_say(300);
    world.run();
    world.hear(300);
    let under_way = world.under_way.as_ref().expect("a stream");
    assert!(under_way.iter().all(VecDeque::is_empty));
}
