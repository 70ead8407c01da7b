//! The lane under a guest that breaks its rules: the worst it can do is end its own stream.

use std::io::{Read, Write};

use vm_memory::{Bytes, GuestAddress};

use super::ring::WINDOW_BYTES;
use super::testing::{FRAME, Guest, TO_GUEST, TO_HOST, WINDOW};
use crate::devices::bus::BusDevice;
use crate::devices::virtio::testing::{HIGH, LOW_END};

const ENDED: u32 = 1;

/// What lies around the window.
fn outside(guest: &Guest) -> Vec<Vec<u8>> {
    let end = WINDOW + WINDOW_BYTES as u64;
    [(0, WINDOW), (end, LOW_END), (HIGH, HIGH + LOW_END)]
        .map(|(start, end)| {
            let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
            let start = GuestAddress(start);
            guest.memory.read_slice(&mut bytes, start).unwrap();
            bytes
        })
        .into()
}

#[test]
fn rings_that_cannot_be_end_the_stream() {
    let cases = [
        ("more than fits to the host", TO_HOST.0, TO_HOST.3 + 1),
        ("less than nothing to the host", TO_HOST.0, u32::MAX),
        ("half the world to the host", TO_HOST.0, 1 << 31),
        ("taken before it came", TO_GUEST.1, 1),
        ("more than fits to the guest", TO_GUEST.0, TO_GUEST.3 + 1),
        ("the host's own index to the host", TO_HOST.1, 1),
    ];
    for (what, word, value) in cases {
        let mut guest = Guest::new();
        let mut host = guest.open();
        let before = outside(&guest);
        guest.set_word(word, value);
        host.write_all(b"x").unwrap();
        guest.ring_doorbell();
        assert_eq!((guest.state(), guest.register(0x0c)), (ENDED, 0), "{what}");
        // Where the device has not read everything, it is a reset.
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)), "{what}");
        assert!(outside(&guest) == before, "{what}");
        // It stays so until another is opened, which works.
        guest.set_word(word, 0);
        guest.ring_doorbell();
        assert_eq!(guest.state(), ENDED, "{what}");
        let mut host = guest.open();
        guest.say(b"hello");
        host.read_exact(&mut [0; 5]).unwrap();
    }
}

#[test]
fn windows_that_cannot_be_are_none() {
    // Memory ends at 1 MiB, and has another piece at 8 MiB.
    let frames = [0, 0xf1, 0x100, 0x7f1, 0x8f1, 0x1000, u32::MAX];
    for frame in frames {
        let mut guest = Guest::new();
        guest.set_register(0x08, frame);
        assert_eq!(guest.register(0x08), 0, "{frame:#x}");
        guest.set_register(0x0c, 1);
        assert_eq!(guest.register(0x0c), 0, "{frame:#x}");
        guest.ring_doorbell();
    }
    for frame in [0x10, 0xf0, 0x800, 0x8f0] {
        let mut guest = Guest::new();
        guest.set_register(0x08, frame);
        assert_eq!(guest.register(0x08), frame);
    }
}

#[test]
fn a_window_that_moves_ends_the_stream() {
    let mut guest = Guest::new();
    let mut host = guest.open();
    guest.set_register(0x08, FRAME + 0x10);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.register(0x0c), 0);
}

#[test]
fn accesses_of_any_width_anywhere() {
    let guest = Guest::new();
    let mut lane = guest.lane.lock().unwrap();
    for width in [1, 2, 8] {
        for offset in (0..0x1000).step_by(4).chain([1, 0xffd, 0xfff]) {
            let mut data = vec![0xee; width];
            lane.write(offset, &data);
            lane.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0), "{offset:#x}, {width}");
        }
    }
    for offset in (0x14..0x1000).step_by(4) {
        let mut data = [0xee; 4];
        lane.write(offset, &data);
        lane.read(offset, &mut data);
        assert_eq!(data, [0; 4], "{offset:#x}");
    }
}

#[test]
fn whatever_a_guest_writes_stays_in_its_window() {
    let mut guest = Guest::new();
    let before = outside(&guest);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u32::try_from(state >> 32).unwrap()
    };
    let mut host = None;
    for step in 0..4000 {
        let value = match random() % 3 {
            0 => random(),
            1 => random() % 0x1_0000,
            _ => guest
                .word(u64::from(random() % 20) * 4)
                .wrapping_add(random() % 9),
        };
        match random() % 8 {
            0..4 => guest.set_word(u64::from(random() % 20) * 4, value),
            4 => guest.ring_doorbell(),
            5 => {
                let mut stream: std::os::unix::net::UnixStream = guest.open();
                stream.set_nonblocking(true).unwrap();
                let _ = stream.write(&[1; 5000]);
                host = Some(stream);
            }
            6 => {
                if let Some(host) = &mut host {
                    let _ = host.write(&[2; 3000]);
                    let _ = host.read(&mut [0; 70000]);
                }
                guest.run();
            }
            _ => {
                guest.say(&[3; 100]);
            }
        }
        assert!(step % 64 != 0 || outside(&guest) == before, "step {step}");
    }
    drop(host);
    let mut host = guest.open();
    guest.say(b"hello");
    host.read_exact(&mut [0; 5]).unwrap();
    assert!(outside(&guest) == before);
}
