//! The entropy device under a driver that behaves, and under one that does not.

use super::Rng;
use super::queue::MAX_REQUEST;
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, HIGH, NEXT, WRITE, r, w};

fn started() -> FakeDriver<Rng> {
    FakeDriver::started(Rng::new().unwrap())
}

#[test]
fn fills_a_buffer() {
    let mut driver = started();
    assert_eq!(driver.request(0, &[w(BUFFERS, 64)]), [(0, 64)]);
    let bytes = driver.read(BUFFERS, 128);
    assert_ne!(bytes[..64], [0; 64]);
    assert_eq!(bytes[64..], [0; 64]);
    assert_eq!(driver.irq.count(), 1);
}

#[test]
fn fills_scattered_buffers_with_different_bytes() {
    let mut driver = started();
    let chain = [w(BUFFERS, 1500), w(BUFFERS + 0x1000, 1), w(HIGH, 1500)];
    assert_eq!(driver.request(0, &chain), [(0, 3001)]);
    let (a, b) = (driver.read(BUFFERS, 1500), driver.read(HIGH, 1500));
    assert_ne!(a, b);
    assert_ne!(a[..700], a[700..1400]);
}

#[test]
fn a_batch_is_one_interrupt() {
    for mut driver in [started(), FakeDriver::started_plain(Rng::new().unwrap())] {
        for n in 0..8 {
            driver.add(0, &[w(BUFFERS + 64 * n, 64)]);
        }
        driver.kick(0);
        assert_eq!(driver.used(0).len(), 8);
        assert_eq!(driver.irq.count(), 1);
    }
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut driver = FakeDriver::started_plain(Rng::new().unwrap());
    driver.write(0x1800, &[1, 0]);
    assert_eq!(driver.request(0, &[w(BUFFERS, 64)]).len(), 1);
    assert_eq!(driver.irq.count(), 0);
}

#[test]
fn a_notification_before_activation_is_not_lost() {
    let mut driver = FakeDriver::new(Rng::new().unwrap());
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0);
    driver.add(0, &[w(BUFFERS, 64)]);
    driver.kick(0);
    assert_eq!(driver.used(0), []);
    driver.driver_ok();
    driver.run();
    assert_eq!(driver.used(0), [(0, 64)]);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mut old = started();
    old.request(0, &[w(BUFFERS, 64)]);
    // One more is available that the old device never saw.
    old.add(0, &[w(BUFFERS + 0x1000, 32)]);
    let state = old.transport.save();
    let mut driver = FakeDriver::restored(Rng::new().unwrap(), &old, &state);
    assert_eq!(driver.transport.save(), state);
    driver.run();
    assert_eq!(driver.used(0), [(1, 32)]);
}

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
