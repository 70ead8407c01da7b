//! The entropy device under a driver that behaves.

use super::Rng;
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, HIGH, w};

pub(super) fn started() -> FakeDriver<Rng> {
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
