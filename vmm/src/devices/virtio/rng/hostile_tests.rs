//! The entropy device under a driver that breaks its rules.

use super::Rng;
use super::queue::MAX_REQUEST;
use super::tests::started;
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, HIGH, NEXT, WRITE, r, w};

#[test]
fn a_huge_request_gets_a_bounded_answer() {
    let mut driver = started();
    let len = u32::try_from(MAX_REQUEST).unwrap();
    let chain = [w(BUFFERS, 0x8_0000), w(HIGH, 0x10_0000)];
    assert_eq!(driver.request(0, &chain), [(0, len)]);
    assert_eq!(driver.read(HIGH, 16), [0; 16]);
}

#[test]
fn hostile_chains_stop_the_device() {
    /// Address, length, flags, next.
    type Raw = (u64, u32, u16, u16);
    let cases: [(&str, &[Raw]); 9] = [
        ("nothing to fill", &[(BUFFERS, 16, 0, 0)]),
        ("only an empty buffer", &[(BUFFERS, 0, WRITE, 0)]),
        ("outside of memory", &[(0x40_0000, 16, WRITE, 0)]),
        (
            "across the end of memory",
            &[(HIGH + 0xf_fff0, 32, WRITE, 0)],
        ),
        ("end of the address space", &[(u64::MAX - 3, 16, WRITE, 0)]),
        ("4 GiB", &[(BUFFERS, u32::MAX, WRITE, 0)]),
        ("a loop", &[(BUFFERS, 4, WRITE | NEXT, 0)]),
        (
            "next outside of the table",
            &[(BUFFERS, 4, WRITE | NEXT, 8)],
        ),
        (
            "readable after writable",
            &[(BUFFERS, 4, WRITE | NEXT, 1), (BUFFERS, 4, 0, 0)],
        ),
    ];
    for (name, descs) in cases {
        let mut driver = started();
        for (index, &(addr, len, flags, next)) in (0..).zip(descs) {
            driver.raw_desc(0, index, addr, len, flags, next);
        }
        driver.make_available(0, 0);
        driver.kick(0);
        assert!(driver.needs_reset(), "{name}");
        assert_eq!(driver.used(0), [], "{name}");
        // Until it is reset, nothing moves; afterwards everything does.
        driver.kick(0);
        assert_eq!(driver.used(0), [], "{name}");
    }
}

#[test]
fn hostile_rings_stop_the_device() {
    type Break = fn(&mut FakeDriver<Rng>);
    let cases: [(&str, Break); 4] = [
        ("more chains than the queue has", |d| d.raw_avail_idx(0, 9)),
        ("an index far ahead", |d| d.raw_avail_idx(0, 0x8000)),
        ("a head outside of the table", |d| d.make_available(0, 8)),
        ("the last head there is", |d| d.make_available(0, u16::MAX)),
    ];
    for (name, break_it) in cases {
        let mut driver = started();
        break_it(&mut driver);
        driver.kick(0);
        assert!(driver.needs_reset(), "{name}");
    }
}

#[test]
fn a_stopped_device_works_again_after_a_reset() {
    let mut driver = started();
    driver.request(0, &[r(BUFFERS, 4)]);
    assert!(driver.needs_reset());
    driver.restart();
    assert_eq!(driver.request(0, &[w(BUFFERS, 8)]), [(0, 8)]);
}

#[test]
fn a_doorbell_without_requests_does_nothing() {
    let mut driver = started();
    for queue in [0, 1, 7, u32::MAX] {
        for _ in 0..100 {
            driver.set(0x50, queue);
        }
        driver.run();
    }
    assert!(!driver.needs_reset());
    assert_eq!(driver.irq.count(), 0);
}

#[test]
fn the_same_head_many_times_is_served_as_often_as_asked() {
    let mut driver = started();
    driver.raw_desc(0, 0, BUFFERS, 16, WRITE, 0);
    for _ in 0..8 {
        driver.make_available(0, 0);
    }
    driver.kick(0);
    assert_eq!(driver.used(0), [(0, 16); 8]);
}
