//! The transport under a driver that breaks its rules.

use std::sync::Arc;

use crate::devices::bus::BusDevice;
use crate::devices::virtio::mmio::{MmioTransport, TransportError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::testing::{
    BUFFERS, CountingInterrupt, FakeDriver, HIGH, LOW_END, ring_base, w,
};
use crate::devices::virtio::{F_EVENT_IDX, F_VERSION_1};
use snapshot_fmt::state::virtio::VirtioMmioState;

fn reset() -> FakeDriver<Rng> {
    FakeDriver::new(Rng::new().unwrap())
}

fn negotiated() -> FakeDriver<Rng> {
    let mut driver = reset();
    driver.negotiate(u64::MAX);
    driver
}

fn started() -> FakeDriver<Rng> {
    FakeDriver::started(Rng::new().unwrap())
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [
        0,
        F_EVENT_IDX,
        F_VERSION_1 | 1,
        F_VERSION_1 | 1 << 28,
        F_VERSION_1 | 1 << 33,
        u64::MAX,
    ] {
        let mut driver = reset();
        driver.set(0x70, 3);
        driver.accept(features);
        driver.set(0x70, 0xb);
        assert_eq!(driver.get(0x70), 3, "{features:#x}");
        driver.set_up_queue(0);
        driver.driver_ok();
        assert_eq!(driver.get(0x70) & 4, 0, "{features:#x}");
        assert_eq!(driver.request(0, &[w(BUFFERS, 4)]), []);
    }
}

#[test]
fn features_outside_of_negotiation_are_ignored() {
    let mut driver = reset();
    driver.accept(u64::MAX);
    assert_eq!(driver.transport.save().driver_features, 0);
    let mut driver = negotiated();
    driver.accept(0);
    assert_ne!(driver.transport.save().driver_features, 0);
    // Halves beyond the second do not exist.
    let mut driver = reset();
    driver.set(0x70, 3);
    driver.set(0x24, 2);
    driver.set(0x20, 7);
    driver.set(0x14, u32::MAX);
    assert_eq!(driver.get(0x10), 0);
    assert_eq!(driver.transport.save().driver_features, 0);
}

#[test]
fn status_steps_cannot_be_skipped_or_taken_back() {
    let mut driver = reset();
    for (value, want) in [
        (2, 0),
        (8, 0),
        (4, 0),
        (0xe, 0),
        (0x40, 0),
        (1, 1),
        (5, 1),
        (2, 1),
        (3, 3),
        (7, 3),
        (1, 3),
    ] {
        driver.set(0x70, value);
        assert_eq!(driver.get(0x70), want, "{value:#x}");
    }
}

#[test]
fn a_driver_cannot_set_or_clear_needs_reset() {
    let mut driver = started();
    driver.set(0x70, 0x4f);
    assert!(!driver.needs_reset());
    driver.transport.signal().fail("a test");
    driver.set(0x70, 0xf);
    assert!(driver.needs_reset());
    driver.set(0x70, 0);
    assert!(!driver.needs_reset());
}

#[test]
fn a_driver_that_gave_up_has_no_device() {
    let mut driver = started();
    driver.set(0x70, 0x8f);
    assert_eq!(driver.get(0x70), 0x8f);
    assert_eq!(driver.request(0, &[w(BUFFERS, 4)]), []);
    driver.restart();
    assert_eq!(driver.request(0, &[w(BUFFERS, 4)]), [(0, 4)]);
}

#[test]
fn queue_sizes_are_checked() {
    for size in [0, 3, 7, 9, 16, 0x8000, 0x1_0000, 0x1_0008, u32::MAX] {
        let mut driver = negotiated();
        driver.describe_queue(0, size, ring_base(0));
        driver.set(0x44, 1);
        assert!(driver.needs_reset(), "{size:#x}");
        assert_eq!(driver.get(0x44), 0);
        driver.driver_ok();
        assert_eq!(driver.get(0x70) & 4, 0);
    }
}

#[test]
fn queue_addresses_are_checked() {
    let good = [(0x80, 0x1000), (0x90, 0x1800), (0xa0, 0x1a00)];
    let bad = [
        (0x80, 0x1001),
        (0x80, 0x1008),
        (0x90, 0x1801),
        (0xa0, 0x1a02),
        (0x80, LOW_END - 0x70),
        (0x90, LOW_END - 2),
        (0xa0, LOW_END - 4),
        (0x80, LOW_END),
        (0x90, 0),
        (0xa0, HIGH + 0x10_0000),
        (0x80, !0xf),
        (0x90, !1),
        (0xa0, !3),
    ];
    for (register, addr) in bad {
        let mut driver = negotiated();
        driver.set(0x38, 8);
        for (offset, value) in good.into_iter().chain([(register, addr)]) {
            driver.set(offset, u32::try_from(value & 0xffff_ffff).unwrap());
            driver.set(offset + 4, u32::try_from(value >> 32).unwrap());
        }
        driver.set(0x44, 1);
        assert!(driver.needs_reset(), "{register:#x} {addr:#x}");
    }
}

#[test]
fn a_ready_or_running_queue_cannot_be_moved() {
    for start in [false, true] {
        let mut driver = negotiated();
        driver.set_up_queue(0);
        if start {
            driver.driver_ok();
        }
        let before = driver.transport.save();
        driver.describe_queue(0, 4, 0x2000);
        assert_eq!(driver.transport.save(), before);
    }
    let mut driver = started();
    driver.set(0x44, 0);
    driver.describe_queue(0, 4, 0x2000);
    driver.set(0x44, 1);
    assert_eq!(driver.get(0x44), 0, "enabled while running");
    let queue = &driver.transport.save().queues[0];
    assert_eq!((queue.size, queue.desc_table), (8, 0x1000));
}

#[test]
fn a_queue_before_features_is_not_enabled() {
    let mut driver = reset();
    driver.set_up_queue(0);
    assert_eq!(driver.get(0x44), 0);
    driver.set(0x44, 2);
    assert_eq!(driver.get(0x44), 0);
}

#[test]
fn queues_that_do_not_exist_read_zero() {
    let mut driver = negotiated();
    for queue in [1, 0x100, u32::MAX] {
        driver.set(0x30, queue);
        assert_eq!([driver.get(0x34), driver.get(0x44)], [0, 0]);
        for offset in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x50] {
            driver.set(offset, 1);
        }
    }
    driver.run();
    assert_eq!(driver.get(0x70), 0xb);
}

#[test]
fn reserved_registers_and_odd_widths_are_ignored() {
    let mut driver = negotiated();
    let before = driver.transport.save();
    for offset in 0..0x100 {
        let known = [
            0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0,
            0xa4,
        ];
        // An access across a page's end arrives in two parts of any width.
        for len in (0..=9).chain([16, 4096]) {
            if len == 4 && known.contains(&offset) {
                continue;
            }
            driver.transport.write(offset, &vec![0xff; len]);
            let mut data = vec![0xee; len];
            driver.transport.read(offset, &mut data);
            if len != 4 {
                assert_eq!(data, vec![0; len], "{offset:#x}");
            }
        }
    }
    for offset in [0x100, 0x108, 0xff8, 0xfff] {
        driver.transport.write(offset, &[0xff; 8]);
    }
    assert_eq!(driver.transport.save(), before);
}

#[test]
fn a_device_without_queues_does_nothing() {
    let mut driver = negotiated();
    driver.driver_ok();
    driver.kick(0);
    assert_eq!(driver.get(0x70), 0xf);
    assert_eq!(driver.used(0), []);
}

#[test]
fn every_register_with_every_bit_leaves_a_device_that_can_be_reset() {
    for value in [0, 1, 2, 3, 0xb, 0xf, 0x7f, 0x80, 0x8000_0000, u32::MAX] {
        for first in (0..0x100).step_by(4) {
            let mut driver = started();
            driver.set(first, value);
            for offset in (0..0x100).step_by(4).filter(|&offset| offset != 0x70) {
                driver.set(offset, value);
                driver.get(offset);
            }
            driver.run();
            driver.restart();
            assert_eq!(driver.request(0, &[w(BUFFERS, 4)]), [(0, 4)]);
        }
    }
}

#[test]
fn hostile_states_are_refused() {
    fn bend(f: impl FnOnce(&mut VirtioMmioState)) -> Result<MmioTransport, TransportError> {
        let old = FakeDriver::started(Rng::new().unwrap());
        let mut state = old.transport.save();
        f(&mut state);
        let irq = Arc::new(CountingInterrupt::default());
        let device = Arc::new(std::sync::Mutex::new(Rng::new().unwrap()));
        MmioTransport::restore(old.memory.clone(), irq, device, &state)
    }
    assert!(bend(|_| {}).is_ok());
    let error = bend(|s| s.device_type = 2).err();
    assert!(matches!(error, Some(TransportError::DeviceType { .. })));
    let error = bend(|s| s.driver_features |= 1).err();
    assert!(matches!(error, Some(TransportError::Features { .. })));
    // Bits out of order, bits without a meaning, and a driver that accepted nothing.
    for f in [
        |s: &mut VirtioMmioState| s.status = 0xd,
        |s: &mut VirtioMmioState| s.status = 4,
        |s: &mut VirtioMmioState| s.status |= 0x20,
        |s: &mut VirtioMmioState| s.status |= 0x100,
        |s: &mut VirtioMmioState| s.driver_features = 0,
    ] {
        let error = bend(f).err();
        assert!(matches!(error, Some(TransportError::Status { .. })));
    }
    let error = bend(|s| s.queues.clear()).err();
    assert!(matches!(error, Some(TransportError::QueueCount { .. })));
    for f in [
        |s: &mut VirtioMmioState| s.queues[0].size = 0,
        |s: &mut VirtioMmioState| s.queues[0].size = 0x1_0008,
        |s: &mut VirtioMmioState| s.queues[0].desc_table = u64::MAX,
        |s: &mut VirtioMmioState| s.queues[0].avail_ring = u64::MAX - 1,
        |s: &mut VirtioMmioState| s.queues[0].used_ring = 0x40_0000,
    ] {
        let error = bend(f).err();
        assert!(matches!(error, Some(TransportError::Queue { .. })));
    }
}
