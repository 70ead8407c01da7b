//! The transport under a driver that behaves.

use crate::devices::bus::BusDevice;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, w};
use crate::devices::virtio::{F_EVENT_IDX, F_VERSION_1};

fn reset() -> FakeDriver<Rng> {
    FakeDriver::new(Rng::new().unwrap())
}

#[test]
fn identifies_itself() {
    let mut driver = reset();
    assert_eq!(driver.get(0), 0x7472_6976);
    assert_eq!([driver.get(4), driver.get(8), driver.get(0x70)], [2, 4, 0]);
    assert_eq!(driver.get(0x34), 8);
    // No shared memory: length and base are all ones.
    for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.get(offset), u32::MAX);
    }
}

#[test]
fn negotiates_in_order() {
    let mut driver = reset();
    assert_eq!(driver.negotiate(u64::MAX), F_VERSION_1 | F_EVENT_IDX);
    assert_eq!(driver.get(0x70), 0xb);
    driver.set_up_queue(0);
    assert_eq!(driver.get(0x44), 1);
    driver.driver_ok();
    assert_eq!(driver.get(0x70), 0xf);
}

#[test]
fn several_status_bits_may_come_at_once() {
    let mut driver = reset();
    driver.set(0x70, 3);
    driver.accept(F_VERSION_1);
    driver.set(0x70, 0xb);
    assert_eq!(driver.get(0x70), 0xb);
}

#[test]
fn interrupts_are_acknowledged_by_bit() {
    let mut driver = FakeDriver::started(Rng::new().unwrap());
    driver.request(0, &[w(BUFFERS, 4)]);
    assert_eq!(driver.get(0x60), 1);
    driver.set(0x64, 2);
    assert_eq!(driver.get(0x60), 1);
    driver.set(0x64, 1);
    assert_eq!(driver.get(0x60), 0);
}

#[test]
fn a_changed_configuration_has_a_new_generation() {
    let mut driver = FakeDriver::started(Rng::new().unwrap());
    assert_eq!(driver.get(0xfc), 0);
    driver.transport.signal().config_changed();
    assert_eq!(driver.get(0xfc), 1);
    assert_eq!(driver.get(0x60), 2);
    assert_eq!(driver.irq.count(), 1);
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = FakeDriver::started(Rng::new().unwrap());
    driver.request(0, &[w(BUFFERS, 4)]);
    driver.set(0x70, 0);
    for offset in [0x70, 0x60, 0x44] {
        assert_eq!(driver.get(offset), 0);
    }
    assert_eq!(driver.transport.save(), reset().transport.save());
    driver.restart();
    assert_eq!(driver.request(0, &[w(BUFFERS, 4)]), [(0, 4)]);
}

#[test]
fn a_stopped_queue_is_left_in_peace() {
    let mut driver = FakeDriver::started(Rng::new().unwrap());
    driver.set(0x44, 0);
    assert_eq!(driver.get(0x44), 0);
    assert_eq!(driver.request(0, &[w(BUFFERS, 4)]), []);
    assert!(!driver.needs_reset());
}

#[test]
fn queue_events_work_as_notifications() {
    let mut driver = FakeDriver::started(Rng::new().unwrap());
    driver.run();
    driver.add(0, &[w(BUFFERS, 4)]);
    driver.transport.queue_events()[0].write(1).unwrap();
    driver.run();
    assert_eq!(driver.used(0), [(0, 4)]);
}

#[test]
fn states_round_trip_at_every_step() {
    let mut driver = reset();
    for step in 0..4 {
        match step {
            1 => drop(driver.negotiate(u64::MAX)),
            2 => driver.set_up_queue(0),
            3 => driver.driver_ok(),
            _ => {}
        }
        let state = driver.transport.save();
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<_>(&json).ok(), Some(state.clone()));
        let again = FakeDriver::restored(Rng::new().unwrap(), &driver, &state);
        assert_eq!(again.transport.save(), state, "step {step}");
    }
}

#[test]
fn an_unacknowledged_interrupt_is_raised_again_by_a_restore() {
    let mut old = FakeDriver::started(Rng::new().unwrap());
    old.request(0, &[w(BUFFERS, 4)]);
    let state = old.transport.save();
    let mut driver = FakeDriver::restored(Rng::new().unwrap(), &old, &state);
    assert_eq!(driver.irq.count(), 1);
    assert_eq!(driver.get(0x60), 1);
}

#[test]
fn a_notification_that_nobody_saw_is_served_by_the_restored_device() {
    for features in [u64::MAX, !F_EVENT_IDX] {
        let mut old = reset();
        old.start_with(features);
        old.request(0, &[w(BUFFERS, 4)]);
        old.set(0x64, 1);
        old.add(0, &[w(BUFFERS, 4)]);
        old.transport.queue_events()[0].write(1).unwrap();
        let state = old.transport.save();

        let mut driver = FakeDriver::restored(Rng::new().unwrap(), &old, &state);
        assert_eq!(driver.irq.count(), 0);
        driver.run();
        assert_eq!(driver.used(0), [(1, 4)]);
        assert_eq!(driver.irq.count(), 1);
        // The old machine runs on, in memory of its own but for this test.
        assert_eq!(old.transport.save(), state);
    }
}

#[test]
fn interrupts_by_position_go_on_where_they_were() {
    let mut old = FakeDriver::started(Rng::new().unwrap());
    // Used, acknowledged and seen, and then one that the driver has not looked at.
    for _ in 0..5 {
        old.request(0, &[w(BUFFERS, 4)]);
    }
    old.add(0, &[w(BUFFERS, 4)]);
    old.kick(0);
    old.set(0x64, 1);
    let state = old.transport.save();

    let mut driver = FakeDriver::restored(Rng::new().unwrap(), &old, &state);
    driver.run();
    assert_eq!(driver.irq.count(), 0);
    // The driver wanted an interrupt for the one before: none until it has looked.
    driver.add(0, &[w(BUFFERS, 4)]);
    driver.kick(0);
    assert_eq!(driver.irq.count(), 0);
    assert_eq!(driver.used(0).len(), 2);
    for n in 1..4 {
        assert_eq!(driver.request(0, &[w(BUFFERS, 4)]).len(), 1);
        assert_eq!(driver.irq.count(), n);
    }
}

#[test]
fn a_device_that_has_failed_stays_so_until_its_driver_resets_it() {
    let mut old = FakeDriver::started(Rng::new().unwrap());
    old.transport.signal().config_changed();
    old.raw_avail_idx(0, 0x8000);
    old.kick(0);
    assert!(old.needs_reset());
    let state = old.transport.save();

    let mut driver = FakeDriver::restored(Rng::new().unwrap(), &old, &state);
    assert_eq!(driver.transport.save(), state);
    assert!(driver.needs_reset());
    assert_eq!((driver.get(0x60), driver.get(0xfc)), (2, 1));
    assert_eq!(driver.irq.count(), 1, "the news is told again");
    driver.kick(0);
    assert_eq!(driver.used(0), []);
    driver.restart();
    assert_eq!(driver.request(0, &[w(BUFFERS, 4)]), [(0, 4)]);
}

#[test]
fn configuration_space_answers_every_width() {
    let mut driver = FakeDriver::started(Rng::new().unwrap());
    for len in [1, 2, 4, 8] {
        let mut data = vec![9; len];
        driver.transport.read(0x100, &mut data);
        assert_eq!(data, vec![0; len]);
        driver.transport.write(0x100, &data);
    }
}
