//! The agent's end of the lane (`docs/lane.md`): a stream to the host in memory that both see.
//!
//! Bytes go without the kernel. The other side is told only where it says that it waits; so who is about to wait says so first, and looks
//! once more after that.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;

use crate::epoll::Watched;
use crate::window::Window;

/// The device.
const DEVICE: &str = "/dev/lane";

/// How long to look for what comes next before the kernel is asked to wait. To sleep and be woken is some 5,000 instructions of the kernel, 3 ms on a
/// software KVM: more than that is never worth it. A host that has the next thing to say says it within some hundred microseconds: with less, it would
/// find the agent asleep. And a hundred copies of a guest that spin at once keep each other waiting, so it is not more than it has to be.
const SPIN: Duration = Duration::from_millis(1);
/// How often the clock is not looked at in between.
const LOOKS: u32 = 64;
/// What so many looks take at most. Where the clock says more, the guest stood still for a snapshot, or goes on from one; that does not count.
const LOOKS_TAKE: Duration = Duration::from_micros(100);

/// A ring, and the words of its indices: how many bytes were ever put in, and taken out.
struct Ring {
    data: usize,
    bytes: usize,
    head: usize,
    tail: usize,
}

const TO_GUEST: Ring = Ring {
    data: 0x4000,
    bytes: 16 << 10,
    head: 0x00,
    tail: 0x44,
};
const TO_HOST: Ring = Ring {
    data: 0x8000,
    bytes: 32 << 10,
    head: 0x40,
    tail: 0x04,
};

/// Words with what the host and the guest wait for.
const HOST_WANTS: usize = 0x08;
const GUEST_WANTS: usize = 0x48;
/// To be told of bytes, or of room for them.
const WANTS_DATA: u32 = 1;
const WANTS_ROOM: u32 = 2;

/// The word with whether the stream goes on.
const HOST_STATE: usize = 0x0c;
/// The guest goes on from a snapshot, and the stream does not.
const LOST: u32 = 2;

/// The word with the state of the random bytes that the host gives to a guest that goes on from a snapshot, before that executes anything.
const SEED_STATE: usize = 0x80;
/// They are there: who draws a number next draws by them.
const SEED_NEW: u32 = 1;
/// They were there, and the kernel has taken them.
const SEED_TAKEN: u32 = 2;
/// They are there, and the kernel is taking them: whoever draws waits for it.
const SEED_BUSY: u32 = 3;
/// The kernel's word, which is 1 where it looks for them.
const SEED_WATCHED: usize = 0x84;

/// An open lane.
pub struct Lane(Window);

impl Lane {
    /// Calls the host.
    ///
    /// # Errors
    /// There is no lane, somebody has it open, or nobody answers.
    pub fn open() -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = open(Path::new(DEVICE), flags, Mode::empty())?;
        Ok(Self(Window::map(device.into())?))
    }

    /// What tells when there is something for who sleeps.
    pub fn device(&self) -> &Watched<File> {
        self.0.device()
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.0.word(offset)
    }

    fn state(&self) -> u32 {
        self.word(HOST_STATE).load(Ordering::Acquire)
    }

    /// How many bytes are in a ring. More than it can hold is the host's mistake, and none.
    fn filled(&self, ring: &Ring) -> usize {
        let head = self.word(ring.head).load(Ordering::Acquire);
        let tail = self.word(ring.tail).load(Ordering::Acquire);
        let filled = usize::try_from(head.wrapping_sub(tail)).unwrap_or(usize::MAX);
        if filled > ring.bytes { 0 } else { filled }
    }

    /// Moves up to `len` bytes from where `word` says on, in the at most two pieces that they are; says how many. The other side learns of
    /// it where it wants to, for `news`.
    fn pass(
        &self,
        ring: &Ring,
        word: usize,
        len: usize,
        news: u32,
        mut piece: impl FnMut(usize, std::ops::Range<usize>),
    ) -> usize {
        let word = self.word(word);
        let index = word.load(Ordering::Relaxed);
        let at = usize::try_from(index).unwrap_or(0) % ring.bytes;
        let first = len.min(ring.bytes - at);
        piece(ring.data + at, 0..first);
        if first < len {
            piece(ring.data, first..len);
        }
        // A ring has far less than 2^32 bytes.
        let moved = u32::try_from(len).unwrap_or(0);
        word.store(index.wrapping_add(moved), Ordering::Release);
        fence(Ordering::SeqCst);
        if self.word(HOST_WANTS).load(Ordering::Acquire) & news != 0 {
            self.0.ring_doorbell();
        }
        len
    }

    /// Takes what has come. 0 where the host has ended the stream.
    ///
    /// # Errors
    /// `AGAIN` where nothing has come, `CONNRESET` where the stream was lost.
    pub fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        // Before the ring: what the host said before it ended is in there.
        let state = self.state();
        let len = self.filled(&TO_GUEST).min(into.len());
        match state {
            LOST => Err(Errno::CONNRESET),
            0 if len == 0 => Err(Errno::AGAIN),
            _ if len == 0 => Ok(0),
            _ => Ok(
                self.pass(&TO_GUEST, TO_GUEST.tail, len, WANTS_ROOM, |at, range| {
                    self.0.read(at, into.get_mut(range).unwrap_or_default());
                }),
            ),
        }
    }

    /// Says what there is room for.
    ///
    /// # Errors
    /// `AGAIN` where there is none, `PIPE` where the host has ended the stream, `CONNRESET` where it was lost.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.state() {
            0 => {}
            LOST => return Err(Errno::CONNRESET),
            _ => return Err(Errno::PIPE),
        }
        let room = TO_HOST.bytes - self.filled(&TO_HOST);
        let len = room.min(bytes.len());
        if len == 0 {
            return Err(Errno::AGAIN);
        }
        Ok(
            self.pass(&TO_HOST, TO_HOST.head, len, WANTS_DATA, |at, range| {
                self.0.write(at, bytes.get(range).unwrap_or_default());
            }),
        )
    }

    /// Whether the stream was lost, rather than ended.
    pub fn is_lost(&self) -> bool {
        self.state() == LOST
    }

    /// Whether the host has given the guest random bytes since this was asked last, so that no number is drawn that a copy of it draws.
    pub fn take_seeded(&self) -> bool {
        let state = self.word(SEED_STATE);
        // Not in two steps: between them the guest may have been copied, and the copy have a new one.
        let (taken, next) = (Ordering::AcqRel, Ordering::Acquire);
        match state.compare_exchange(SEED_TAKEN, 0, taken, next) {
            Ok(_) => true,
            Err(SEED_NEW | SEED_BUSY) => self.word(SEED_WATCHED).load(Ordering::Relaxed) == 1,
            Err(_) => false,
        }
    }

    /// Which of `wanted` could be done now.
    pub fn ready(&self, wanted: PollFlags) -> PollFlags {
        let mut ready = PollFlags::empty();
        let has_ended = self.state() != 0;
        let has_data = has_ended || self.filled(&TO_GUEST) > 0;
        let has_room = has_ended || self.filled(&TO_HOST) < TO_HOST.bytes;
        ready.set(PollFlags::IN, has_data);
        ready.set(PollFlags::OUT, has_room);
        ready & wanted
    }

    /// Looks for one of `wanted` for a while, without the kernel.
    pub fn spin(&self, wanted: PollFlags) -> PollFlags {
        let mut left = SPIN;
        let mut last = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let ready = self.ready(wanted);
                if !ready.is_empty() {
                    return ready;
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            left = left.saturating_sub((now - last).min(LOOKS_TAKE));
            last = now;
            if left.is_zero() {
                return PollFlags::empty();
            }
        }
    }

    /// The host is to interrupt for one of `wanted`; says which can be done already. [`Self::awake`] takes it back.
    pub fn sleep(&self, wanted: PollFlags) -> PollFlags {
        let mut wants = 0;
        if wanted.contains(PollFlags::IN) {
            wants |= WANTS_DATA;
        }
        if wanted.contains(PollFlags::OUT) {
            wants |= WANTS_ROOM;
        }
        self.word(GUEST_WANTS).store(wants, Ordering::Release);
        fence(Ordering::SeqCst);
        self.ready(wanted)
    }

    /// The host need not interrupt.
    pub fn awake(&self) {
        self.word(GUEST_WANTS).store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    /// A lane whose host is the test.
    fn lane() -> Lane {
        let memory = memfd_create("lane", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, 17 * 4096).unwrap();
        Lane(Window::map(memory.into()).unwrap())
    }

    impl Lane {
        fn set(&self, word: usize, value: u32) {
            self.word(word).store(value, Ordering::SeqCst);
        }

        fn get(&self, word: usize) -> u32 {
            self.word(word).load(Ordering::SeqCst)
        }

        fn rung(&self) -> bool {
            let mut register = [0; 4];
            rustix::io::pread(self.0.device(), &mut register, 64 * 1024 + 0x10).unwrap();
            rustix::io::pwrite(self.0.device(), &[0; 4], 64 * 1024 + 0x10).unwrap();
            register != [0; 4]
        }
    }

    #[test]
    fn bytes_go_round_the_ends_of_the_rings() {
        let lane = lane();
        for word in [TO_GUEST.head, TO_GUEST.tail, TO_HOST.head, TO_HOST.tail] {
            lane.set(word, u32::MAX - 2);
        }
        assert_eq!(lane.write(b"question"), Ok(8));
        assert_eq!(lane.get(TO_HOST.head), 5);
        let mut there = [0; 8];
        let (end, rest) = there.split_at_mut(3);
        lane.0.read(TO_HOST.data + TO_HOST.bytes - 3, end);
        lane.0.read(TO_HOST.data, rest);
        assert_eq!(&there, b"question");

        lane.0.write(TO_GUEST.data + TO_GUEST.bytes - 3, b"ans");
        lane.0.write(TO_GUEST.data, b"wer");
        lane.set(TO_GUEST.head, 3);
        let mut bytes = [0; 4];
        assert_eq!(lane.read(&mut bytes), Ok(4));
        assert_eq!(&bytes, b"answ");
        assert_eq!(lane.read(&mut bytes), Ok(2));
        assert_eq!(&bytes, b"ersw");
        assert_eq!(lane.read(&mut bytes), Err(Errno::AGAIN));
        assert_eq!(lane.get(TO_GUEST.tail), 3);
    }

    #[test]
    fn a_full_ring_takes_no_more() {
        let lane = lane();
        let bytes = vec![1; TO_HOST.bytes + 1];
        assert_eq!(lane.write(&bytes), Ok(TO_HOST.bytes));
        assert_eq!(lane.write(&bytes), Err(Errno::AGAIN));
        assert_eq!(lane.ready(PollFlags::OUT), PollFlags::empty());
        lane.set(TO_HOST.tail, 7);
        assert_eq!(lane.ready(PollFlags::OUT), PollFlags::OUT);
        assert_eq!(lane.write(&bytes), Ok(7));
    }

    #[test]
    fn a_seed_is_taken_once() {
        let lane = lane();
        lane.set(SEED_STATE, SEED_NEW);
        // This kernel does not know of it.
        assert!(!lane.take_seeded());
        lane.set(SEED_WATCHED, 1);
        assert!(lane.take_seeded());
        lane.set(SEED_STATE, SEED_TAKEN);
        assert!(lane.take_seeded());
        assert!(!lane.take_seeded());
    }

    #[test]
    fn the_doorbell_rings_for_who_waits() {
        let lane = lane();
        lane.write(b"a").unwrap();
        assert!(!lane.rung());
        lane.set(HOST_WANTS, WANTS_ROOM);
        lane.write(b"b").unwrap();
        assert!(!lane.rung());
        lane.set(TO_GUEST.head, 1);
        lane.read(&mut [0]).unwrap();
        assert!(lane.rung());
        lane.set(HOST_WANTS, WANTS_DATA);
        lane.write(b"c").unwrap();
        assert!(lane.rung());
    }

    #[test]
    fn who_sleeps_says_so_and_looks_again() {
        let lane = lane();
        let both = PollFlags::IN | PollFlags::OUT;
        assert_eq!(lane.sleep(PollFlags::IN), PollFlags::empty());
        assert_eq!(lane.get(GUEST_WANTS), WANTS_DATA);
        assert_eq!(lane.sleep(both), PollFlags::OUT);
        assert_eq!(lane.get(GUEST_WANTS), WANTS_DATA | WANTS_ROOM);
        lane.awake();
        assert_eq!(lane.get(GUEST_WANTS), 0);
        assert_eq!(lane.spin(PollFlags::IN), PollFlags::empty());
        lane.set(TO_GUEST.head, 1);
        assert_eq!(lane.spin(PollFlags::IN), PollFlags::IN);
    }

    #[test]
    fn an_end_comes_behind_what_was_said_and_a_loss_at_once() {
        let lane = lane();
        lane.0.write(TO_GUEST.data, b"x");
        lane.set(TO_GUEST.head, 1);
        lane.set(HOST_STATE, 1);
        assert_eq!(lane.ready(PollFlags::IN), PollFlags::IN);
        assert_eq!(lane.read(&mut [0; 9]), Ok(1));
        assert_eq!(lane.read(&mut [0; 9]), Ok(0));
        assert_eq!(lane.write(b"x"), Err(Errno::PIPE));
        assert!(!lane.is_lost());
        lane.set(HOST_STATE, LOST);
        lane.set(TO_GUEST.head, 2);
        assert_eq!(lane.read(&mut [0; 9]), Err(Errno::CONNRESET));
        assert_eq!(lane.write(b"x"), Err(Errno::CONNRESET));
        assert!(lane.is_lost());
    }
}
