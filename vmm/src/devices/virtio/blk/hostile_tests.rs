//! The block device under a driver that breaks its rules.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::stack::Stack;
use super::tests::{
    DATA, HEADER, SECTORS, STATUS, config, disk, image, put_header, range, request,
};
use super::{Block, BlockConfig, Disk};
use crate::devices::virtio::testing::{Desc, FakeDriver, HIGH, LOW_END, NEXT, WRITE, r, w};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn requests_past_the_end_fail() {
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, 0x1_0200),
        (u64::MAX, 512),
        (u64::MAX - 1, 1024),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (1 << 63, 512),
        (SECTORS + 1, 0),
    ] {
        for (kind, data) in [(0, w(DATA, len)), (1, r(DATA, len))] {
            let (file, mut driver) = disk(false);
            let status = request(&mut driver, kind, sector, &[data]);
            assert_eq!(status, IOERR, "{kind} {sector} {len}");
            assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
            assert_eq!(request(&mut driver, 0, 0, &[w(DATA, 512)]), OK);
        }
    }
}

#[test]
fn parts_of_sectors_fail() {
    for len in [1, 511, 513, 1000] {
        let (_, mut driver) = disk(false);
        assert_eq!(request(&mut driver, 0, 0, &[w(DATA, len)]), IOERR);
        assert_eq!(request(&mut driver, 1, 0, &[r(DATA, len)]), IOERR);
    }
}

#[test]
fn a_read_only_disk_is_never_written() {
    let file = image();
    // Even if the file itself could be written.
    let mut driver = FakeDriver::started(Block::new(config(&file, true)).unwrap());
    driver.write(DATA, &[0xaa; 512]);
    assert_eq!(request(&mut driver, 1, 0, &[r(DATA, 512)]), IOERR);
    for kind in [11, 13] {
        driver.write(DATA, &range(1, 8, 0));
        assert_eq!(request(&mut driver, kind, 0, &[r(DATA, 16)]), UNSUPP);
    }
    let mut bytes = [0; 1024];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes[..], [[0; 512], [1; 512]].concat());
}

#[test]
fn unknown_requests_are_unsupported() {
    let (_, mut driver) = disk(false);
    for kind in [2, 3, 5, 7, 10, 12, 14, 0x100, 0x8000_0000, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[]), UNSUPP, "{kind}");
    }
}

#[test]
fn short_headers_fail() {
    for len in [0, 1, 15] {
        let (_, mut driver) = disk(false);
        put_header(&driver, 0, 0);
        let chain = [r(HEADER, len), w(DATA, 512), w(STATUS, 1)];
        assert_eq!(driver.request(0, &chain).len(), 1);
        assert_eq!(driver.read(STATUS, 1), [IOERR]);
        assert!(!driver.needs_reset());
    }
    // No readable buffer at all.
    let (_, mut driver) = disk(false);
    driver.request(0, &[w(DATA, 512), w(STATUS, 1)]);
    assert_eq!(driver.read(STATUS, 1), [IOERR]);
}

#[test]
fn directions_that_are_mixed_up_fail() {
    let (file, mut driver) = disk(false);
    // A read with only readable data has nowhere to put it.
    assert_eq!(request(&mut driver, 0, 0, &[r(DATA, 512)]), OK);
    assert_eq!(driver.read(DATA, 512), [0; 512]);
    // A write with only writable data writes nothing.
    driver.write(DATA, &[0xaa; 512]);
    assert_eq!(request(&mut driver, 1, 0, &[w(DATA, 512)]), OK);
    let mut bytes = [1; 512];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 512]);
}

#[test]
fn bad_range_lists_fail() {
    let sixteen = range(0, 1, 0).repeat(16);
    let four = range(0, 1, 0).repeat(4);
    let cases: [(u32, Vec<u8>, u8); 13] = [
        (11, vec![], IOERR),
        (11, range(0, 1, 0)[..15].to_vec(), IOERR),
        (11, [range(0, 1, 0), vec![0]].concat(), IOERR),
        (11, [&sixteen[..], &range(0, 1, 0)].concat(), IOERR),
        (13, [&four[..], &range(0, 1, 0)].concat(), IOERR),
        (11, range(SECTORS, 1, 0), IOERR),
        (13, range(SECTORS - 1, 2, 0), IOERR),
        (13, range(u64::MAX, 1, 0), IOERR),
        (11, range(0, u32::MAX, 0), IOERR),
        (11, range(0, 1, 1), UNSUPP),
        (11, range(0, 1, 2), UNSUPP),
        (13, range(0, 1, 2), UNSUPP),
        (13, range(0, 1, 0x8000_0001), UNSUPP),
    ];
    for (kind, list, want) in cases {
        let (_, mut driver) = disk(false);
        driver.write(DATA, &list);
        let len = u32::try_from(list.len()).unwrap();
        let status = request(&mut driver, kind, 0, &[r(DATA, len)]);
        assert_eq!(status, want, "{kind} {list:?}");
    }
}

#[test]
fn ranges_that_overlap_are_done_one_by_one() {
    let (file, mut driver) = disk(false);
    for (kind, first) in [(11, 8), (13, 40)] {
        let list = [
            range(first, 8, 0),
            range(first + 4, 8, 0),
            range(first, 0, 0),
        ]
        .concat();
        driver.write(DATA, &list);
        assert_eq!(request(&mut driver, kind, 0, &[r(DATA, 48)]), OK);
        let mut bytes = vec![0xee; 14 * 512];
        file.read_exact_at(&mut bytes, (first - 1) * 512).unwrap();
        assert_eq!(bytes[0], u8::try_from(first - 1).unwrap());
        assert!(bytes[512..13 * 512].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[13 * 512], u8::try_from(first + 12).unwrap());
    }
}

#[test]
fn a_read_only_disk_is_flushed() {
    let (_, mut driver) = disk(true);
    for data in [&[][..], &[r(DATA, 512)], &[w(DATA, 512)]] {
        assert_eq!(request(&mut driver, 4, u64::MAX, data), OK);
    }
    assert_eq!(driver.read(DATA, 512), [0; 512]);
}

/// A disk that is large and sparse: one request could keep the event loop for minutes.
fn sparse() -> FakeDriver<Block> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    FakeDriver::started(Block::new(config(&file, false)).unwrap())
}

#[test]
fn a_request_is_bounded_whatever_its_buffers_come_to() {
    let mut driver = sparse();
    let mib = |write| Desc {
        addr: HIGH,
        len: 1 << 20,
        write,
    };
    for (kind, write) in [(0, true), (1, false)] {
        assert_eq!(request(&mut driver, kind, 0, &vec![mib(write); 65]), IOERR);
        assert_eq!(request(&mut driver, kind, 0, &vec![mib(write); 126]), IOERR);
    }
    assert_eq!(request(&mut driver, 0, 0, &vec![mib(true); 64]), OK);
}

#[test]
fn a_turn_of_the_event_loop_is_bounded() {
    let mut driver = sparse();
    put_header(&driver, 0, 0);
    // Eight requests of 10 MiB each, all at once.
    for _ in 0..8 {
        let mut chain = vec![r(HEADER, 16)];
        chain.extend([w(HIGH, 1 << 20); 10]);
        chain.push(w(STATUS, 1));
        driver.add(0, &chain);
    }
    driver.kick_once(0);
    assert_eq!(driver.used(0).len(), 2, "16 MiB and what began before");
    // It goes on by itself, when others had their turn.
    driver.run();
    assert_eq!(driver.used(0).len(), 6);
    assert!(!driver.needs_reset());
}

#[test]
fn no_range_is_done_if_one_is_bad() {
    let (file, mut driver) = disk(false);
    driver.write(DATA, &[range(1, 1, 0), range(SECTORS, 1, 0)].concat());
    assert_eq!(request(&mut driver, 13, 0, &[r(DATA, 32)]), IOERR);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 512).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn a_serial_number_needs_no_room() {
    let (_, mut driver) = disk(true);
    for len in [0, 1, 19, 4096] {
        assert_eq!(request(&mut driver, 8, 0, &[w(DATA, len)]), OK);
    }
}

#[test]
fn an_image_that_shrinks_fails_its_requests() {
    let (file, mut driver) = disk(true);
    file.set_len(512).unwrap();
    assert_eq!(request(&mut driver, 0, 0, &[w(DATA, 512)]), OK);
    assert_eq!(request(&mut driver, 0, 0, &[w(DATA, 1024)]), IOERR);
    assert_eq!(request(&mut driver, 0, 8, &[w(DATA, 512)]), IOERR);
    assert!(!driver.needs_reset());
}

#[test]
fn an_image_that_cannot_be_written_fails_its_requests() {
    let full = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let stack = Stack::file(full, SECTORS * 512);
    let block = Block::new(BlockConfig {
        disk: Arc::new(Disk::new(stack, false)),
        ..config(&image(), false)
    });
    let mut driver = FakeDriver::started(block.unwrap());
    assert_eq!(request(&mut driver, 1, 0, &[r(DATA, 512)]), IOERR);
}

#[test]
fn chains_that_cannot_be_answered_stop_the_device() {
    let cases: [(&str, &[Desc]); 12] = [
        ("no status", &[r(HEADER, 16)]),
        ("an empty status", &[r(HEADER, 16), w(STATUS, 0)]),
        ("status outside", &[r(HEADER, 16), w(0x40_0000, 1)]),
        ("header outside", &[r(0x40_0000, 16), w(STATUS, 1)]),
        ("header across", &[r(LOW_END - 8, 16), w(STATUS, 1)]),
        ("header wraps", &[r(u64::MAX - 7, 16), w(STATUS, 1)]),
        (
            "data outside",
            &[r(HEADER, 16), w(u64::MAX - 511, 512), w(STATUS, 1)],
        ),
        (
            "data across",
            &[r(HEADER, 16), w(HIGH + 0x10_0000 - 256, 512), w(STATUS, 1)],
        ),
        ("4 GiB", &[r(HEADER, 16), w(DATA, u32::MAX), w(STATUS, 1)]),
        (
            "more than 4 GiB",
            &[
                r(HEADER, 16),
                w(DATA, 1 << 31),
                w(DATA, 1 << 31),
                w(STATUS, 1),
            ],
        ),
        (
            "readable after writable",
            &[r(HEADER, 16), w(STATUS, 1), r(DATA, 512)],
        ),
        ("status first", &[w(STATUS, 1), r(HEADER, 16)]),
    ];
    for (name, chain) in cases {
        let (_, mut driver) = disk(false);
        put_header(&driver, 0, 0);
        assert_eq!(driver.request(0, chain), [], "{name}");
        assert!(driver.needs_reset(), "{name}");
        assert_eq!(driver.request(0, chain), [], "{name}");
        driver.restart();
        assert_eq!(request(&mut driver, 0, 0, &[w(DATA, 512)]), OK, "{name}");
    }
}

#[test]
fn chains_that_do_not_end_stop_the_device() {
    for next in [0, 1, 128, u16::MAX] {
        let (_, mut driver) = disk(false);
        driver.raw_desc(0, 0, HEADER, 16, NEXT, 1);
        driver.raw_desc(0, 1, DATA, 1, WRITE | NEXT, next);
        driver.make_available(0, 0);
        driver.kick(0);
        assert!(driver.needs_reset(), "{next}");
    }
}

#[test]
fn indirect_tables_are_bounded() {
    const INDIRECT: u16 = 4;
    // A table in guest memory, of many descriptors that lead on to the next.
    for (count, odd) in [(65535u32, 0), (65536, 0), (0, 0), (1, 8)] {
        let (_, mut driver) = disk(false);
        for n in 0..1000u16 {
            let mut desc = [0; 16];
            desc[..8].copy_from_slice(&DATA.to_le_bytes());
            desc[8] = 1;
            desc[12..14].copy_from_slice(&NEXT.to_le_bytes());
            desc[14..].copy_from_slice(&(n + 1).to_le_bytes());
            driver.write(HIGH + 16 * u64::from(n), &desc);
        }
        let len = count.wrapping_mul(16) + odd;
        driver.raw_desc(0, 0, HIGH, len, INDIRECT, 0);
        driver.make_available(0, 0);
        driver.kick(0);
        assert!(driver.needs_reset(), "{count}");
    }
}

#[test]
fn overlapping_buffers_only_hurt_the_guest() {
    let (_, mut driver) = disk(false);
    put_header(&driver, 0, 3);
    // Data over the header, and the status within the data.
    let chain = [r(HEADER, 16), w(HEADER, 512), w(HEADER + 7, 1)];
    assert_eq!(driver.request(0, &chain).len(), 1);
    assert_eq!(driver.read(HEADER, 8), [3, 3, 3, 3, 3, 3, 3, 0]);
    // Data over the rings themselves.
    put_header(&driver, 0, 3);
    driver.request(0, &[r(HEADER, 16), w(0x1000, 4096), w(STATUS, 1)]);
    driver.restart();
    assert_eq!(request(&mut driver, 0, 3, &[w(DATA, 512)]), OK);
}

#[test]
fn a_long_id_is_cut_off() {
    let file = image();
    let block = Block::new(BlockConfig {
        id: "x".repeat(1000),
        ..config(&file, true)
    });
    let mut driver = FakeDriver::started(block.unwrap());
    assert_eq!(request(&mut driver, 8, 0, &[w(DATA, 64)]), OK);
    assert_eq!(driver.read(DATA, 21), [&[b'x'; 20][..], &[0]].concat());
}
