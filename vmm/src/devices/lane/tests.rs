//! The lane between a guest that keeps the rules and a host.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use snapshot_fmt::state::lane::LaneState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{HOST_WANTS, WANTS_DATA, WANTS_ROOM};
use super::testing::{FRAME, Guest, config};
use super::{Lane, LaneError};
use crate::devices::virtio::testing::CountingInterrupt;

const ENDED: u32 = 1;
const LOST: u32 = 2;

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn it_says_what_it_is() {
    let mut guest = Guest::new();
    assert_eq!(guest.register(0), u32::from_le_bytes(*b"Lane"));
    assert_eq!((guest.register(4), guest.register(8)), (1, FRAME));
    assert_eq!((guest.register(0x0c), guest.register(0x14)), (0, 0));
}

#[test]
fn bytes_go_both_ways() {
    let mut guest = Guest::new();
    let mut host = guest.open();
    guest.say(b"hello");
    assert_eq!(read(&mut host, 5), b"hello");
    host.write_all(b"request").unwrap();
    guest.run();
    assert_eq!(guest.hear(), b"request");
    drop(host);
    guest.run();
    assert_eq!((guest.state(), guest.register(0x0c)), (ENDED, 0));
}

#[test]
fn interrupts_come_where_they_are_wanted() {
    let mut guest = Guest::new();
    let mut host = guest.open();
    host.write_all(b"a").unwrap();
    guest.run();
    assert_eq!(guest.irq.count(), 0);
    guest.want(WANTS_ROOM);
    host.write_all(b"b").unwrap();
    guest.run();
    assert_eq!(guest.irq.count(), 0);
    guest.want(WANTS_DATA);
    host.write_all(b"c").unwrap();
    guest.run();
    assert_eq!(guest.irq.count(), 1);
    assert_eq!(guest.hear(), b"abc");
    // The end is always told.
    guest.want(0);
    drop(host);
    guest.run();
    assert_eq!(guest.irq.count(), 2);
}

#[test]
fn doorbells_are_wanted_for_what_the_device_waits_for() {
    let mut guest = Guest::new();
    let mut host = guest.open();
    let wants = |guest: &Guest| guest.word(HOST_WANTS as u64);
    assert_eq!(wants(&guest), WANTS_DATA);
    // More for the guest than it has room for.
    host.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(count) = host.write(&[7; 4096]) {
        written += count;
        guest.run();
    }
    assert_eq!(wants(&guest), WANTS_DATA | WANTS_ROOM);
    let mut heard = 0;
    while heard < written {
        let bytes = guest.hear();
        assert!(!bytes.is_empty() && bytes.iter().all(|&byte| byte == 7));
        heard += bytes.len();
    }
    assert_eq!((heard, wants(&guest)), (written, WANTS_DATA));
    // More for the host than it takes: the device waits for its socket.
    let mut said = 0;
    loop {
        let count = guest.say(&[9; 4096]);
        said += count;
        if count == 0 {
            break;
        }
    }
    assert_eq!(wants(&guest), 0);
    guest.want(WANTS_ROOM);
    let mut scratch = [0; 4096];
    let mut taken = 0;
    while taken < said {
        match host.read(&mut scratch) {
            Ok(count) => taken += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.run();
    }
    assert_eq!((taken, wants(&guest)), (said, WANTS_DATA));
    assert!(guest.irq.count() > 0);
}

#[test]
fn indices_wrap() {
    let mut guest = Guest::new();
    let mut host = guest.open();
    for word in [0x00, 0x44, 0x40, 0x04] {
        guest.set_word(word, u32::MAX - 2);
    }
    let text: Vec<u8> = (0..=255).collect();
    for _ in 0..200 {
        assert_eq!(guest.say(&text), text.len());
        assert_eq!(read(&mut host, text.len()), text);
        host.write_all(&text).unwrap();
        guest.run();
        assert_eq!(guest.hear(), text);
    }
}

#[test]
fn nobody_listens_or_the_guest_hangs_up() {
    let mut guest = Guest::new();
    let mut host = guest.open();
    guest.set_word(0x40, 3);
    guest.set_register(0x0c, 0);
    // What it had said goes out.
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!((rest.len(), guest.register(0x0c)), (3, 0));
    // Another stream begins with nothing.
    let _host = guest.open();
    assert_eq!((guest.word(0x40), guest.word(0x04)), (0, 0));
    std::fs::remove_file(guest.dir.path().join("s_1024")).unwrap();
    guest.set_register(0x0c, 1);
    assert_eq!(guest.register(0x0c), 0);
}

/// The guest in another process; the host's end of what was kept; what is told when it speaks.
fn restored(old: Guest, state: &LaneState) -> (Guest, Option<UnixStream>, EventFd) {
    let irq = Arc::new(CountingInterrupt::default());
    let spoken = EventFd::new(EFD_NONBLOCK).unwrap();
    let told = spoken.try_clone().unwrap();
    let Guest { memory, dir, .. } = old;
    let irq_of_lane = Arc::clone(&irq) as _;
    let mut lane = Lane::new(config(&dir), Arc::clone(&memory), irq_of_lane, told).unwrap();
    let host = lane.load(state).unwrap();
    assert_eq!(&lane.save(), state);
    lane.give_seed().unwrap();
    let mut guest = Guest::with(lane, memory, irq, dir);
    guest.run();
    (guest, host, spoken)
}

fn saved(guest: &Guest) -> LaneState {
    guest.lane.lock().unwrap().save()
}

#[test]
fn a_stream_at_rest_goes_on_unnoticed() {
    let mut old = Guest::new();
    let mut old_host = old.open();
    old.say(b"hello");
    read(&mut old_host, 5);
    old_host.write_all(b"ab").unwrap();
    old.run();
    old.hear();
    let state = saved(&old);
    assert!(state.open && state.kept);
    let (mut guest, host, spoken) = restored(old, &state);
    let mut host = host.unwrap();
    assert_eq!((guest.irq.count(), guest.state()), (0, 0));
    host.write_all(b"request").unwrap();
    guest.run();
    assert_eq!(guest.hear(), b"request");
    assert!(spoken.read().is_err());
    guest.say(b"answer");
    assert_eq!(read(&mut host, 6), b"answer");
    assert_eq!(spoken.read().unwrap(), 1);
    drop(host);
    guest.run();
    assert_eq!(guest.state(), ENDED);
}

#[test]
fn each_copy_finds_another_seed() {
    let seed = |guest: &Guest| {
        assert_eq!(guest.word(0x80), 1);
        let words = (0..8).map(|word| guest.word(0xc0 + 8 * word));
        words.collect::<Vec<_>>()
    };
    let mut guest = Guest::new();
    guest.open();
    assert_eq!(guest.word(0x80), 0);
    let mut seeds = Vec::new();
    for _ in 0..2 {
        let state = saved(&guest);
        (guest, _, _) = restored(guest, &state);
        seeds.push(seed(&guest));
        // A new stream leaves it alone.
        guest.open();
        assert_eq!(seeds.last(), Some(&seed(&guest)));
    }
    assert_ne!(seeds[0], seeds[1]);
    // Without a driver nothing is written.
    guest.set_register(0x08, 0);
    let state = saved(&guest);
    let (guest, _, _) = restored(guest, &state);
    assert_eq!(Some(&seed(&guest)), seeds.last());
}

#[test]
fn a_stream_with_something_on_its_way_is_lost() {
    type Busy = fn(&mut Guest, &mut UnixStream);
    let cases: [(&str, Busy); 4] = [
        ("in the ring to the guest", |guest, host| {
            host.write_all(b"x").unwrap();
            guest.run();
        }),
        ("in the ring to the host", |guest, _| {
            guest.set_word(0x40, 1)
        }),
        ("in the socket to the guest", |_, host| {
            host.write_all(b"x").unwrap();
        }),
        ("in the socket to the host", |guest, _| {
            guest.say(b"x");
        }),
    ];
    for (what, make_busy) in cases {
        let mut old = Guest::new();
        let mut old_host = old.open();
        make_busy(&mut old, &mut old_host);
        let state = saved(&old);
        assert!(state.open && !state.kept, "{what}");
        let (mut guest, host, _) = restored(old, &state);
        assert!(host.is_none(), "{what}");
        assert_eq!((guest.state(), guest.irq.count()), (LOST, 1), "{what}");
        // It may call again.
        guest.set_register(0x0c, 0);
        let mut host = guest.open();
        guest.say(b"hello");
        assert_eq!(read(&mut host, 5), b"hello", "{what}");
    }
}

#[test]
fn what_no_lane_can_have_been_is_refused() {
    let guest = Guest::new();
    let good = saved(&guest);
    assert!(!good.open && !good.kept);
    let states = [
        (0x100, false, false),
        (u32::MAX, true, true),
        (0, true, false),
        (FRAME, false, true),
    ];
    for (frame, open, kept) in states {
        let spoken = EventFd::new(EFD_NONBLOCK).unwrap();
        let state = LaneState { frame, open, kept };
        let memory = Arc::clone(&guest.memory);
        let irq = Arc::clone(&guest.irq) as _;
        let mut lane = Lane::new(config(&guest.dir), memory, irq, spoken).unwrap();
        let result = lane.load(&state);
        assert!(matches!(result, Err(LaneError::Saved(_))), "{state:?}");
    }
}
