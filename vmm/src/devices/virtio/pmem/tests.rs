//! The persistent memory device under a driver that behaves.

use super::{Pmem, PmemConfig, PmemError};
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, r, w};

/// Where the tests put a request and its answer.
pub(super) const REQUEST: u64 = BUFFERS;
pub(super) const ANSWER: u64 = BUFFERS + 0x1000;

pub(super) fn config() -> PmemConfig {
    PmemConfig {
        id: "root".into(),
        start: 0x1_0000_0000,
        size: 0x20_0000,
    }
}

pub(super) fn started() -> FakeDriver<Pmem> {
    FakeDriver::started(Pmem::new(config()).unwrap())
}

/// What the device answers; at first there is something else.
pub(super) fn answer(driver: &FakeDriver<Pmem>) -> u32 {
    u32::from_le_bytes(driver.read(ANSWER, 4).try_into().unwrap())
}

#[test]
fn says_where_its_memory_is() {
    let mut driver = started();
    assert_eq!(driver.get(8), 27);
    assert_eq!(u64::from_le_bytes(driver.config(0)), 0x1_0000_0000);
    assert_eq!(u64::from_le_bytes(driver.config(8)), 0x20_0000);
    assert_eq!(driver.config(16), [0; 4]);
}

#[test]
fn flushes() {
    let mut driver = started();
    driver.write(REQUEST, &[0; 4]);
    for _ in 0..20 {
        driver.write(ANSWER, &[0xee; 5]);
        let used = driver.request(0, &[r(REQUEST, 4), w(ANSWER, 4)]);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].1, 4);
        assert_eq!(driver.read(ANSWER, 5), [0, 0, 0, 0, 0xee]);
    }
    assert_eq!(driver.irq.count(), 20);
}

#[test]
fn any_framing_will_do() {
    let mut driver = started();
    driver.write(REQUEST, &[0; 4]);
    let chain = [
        r(REQUEST, 1),
        r(REQUEST, 3),
        w(ANSWER, 2),
        w(ANSWER + 2, 16),
    ];
    driver.write(ANSWER, &[0xee; 4]);
    assert_eq!(driver.request(0, &chain).len(), 1);
    assert_eq!(answer(&driver), 0);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mut old = started();
    old.write(REQUEST, &[0; 4]);
    old.request(0, &[r(REQUEST, 4), w(ANSWER, 4)]);
    let transport = old.transport.save();
    let state = old.device.lock().unwrap().save();
    let pmem = Pmem::restore(config(), &state).unwrap();
    assert_eq!(pmem.save(), state);
    let mut driver = FakeDriver::restored(pmem, &old, &transport);
    assert_eq!(driver.transport.save(), transport);
    driver.write(ANSWER, &[0xee; 4]);
    assert_eq!(driver.request(0, &[r(REQUEST, 4), w(ANSWER, 4)]).len(), 1);
    assert_eq!(answer(&driver), 0);
}

#[test]
fn another_place_is_refused_at_restore() {
    let state = started().device.lock().unwrap().save();
    for (start, size) in [(0x1_0800_0000, 0x20_0000), (0x1_0000_0000, 0x40_0000)] {
        let elsewhere = PmemConfig {
            start,
            size,
            ..config()
        };
        let error = Pmem::restore(elsewhere, &state).err().unwrap();
        assert!(matches!(error, PmemError::SavedPlace { .. }), "{error}");
    }
}
