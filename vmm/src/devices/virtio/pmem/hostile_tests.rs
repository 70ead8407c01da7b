//! The persistent memory device under a driver that breaks its rules.

use super::tests::{ANSWER, REQUEST, answer, config, started};
use crate::devices::virtio::testing::{Desc, HIGH, NEXT, WRITE, r, w};

#[test]
fn unknown_requests_fail() {
    for kind in [1, 2, 0x100, u32::MAX] {
        let mut driver = started();
        driver.write(REQUEST, &kind.to_le_bytes());
        assert_eq!(driver.request(0, &[r(REQUEST, 4), w(ANSWER, 4)]).len(), 1);
        assert_eq!(answer(&driver), 1, "{kind}");
        assert!(!driver.needs_reset());
    }
}

#[test]
fn short_requests_fail() {
    for request in [&[][..], &[r(REQUEST, 0)], &[r(REQUEST, 3)]] {
        let mut driver = started();
        let chain = [request, &[w(ANSWER, 4)]].concat();
        assert_eq!(driver.request(0, &chain).len(), 1);
        assert_eq!(answer(&driver), 1);
        assert!(!driver.needs_reset());
    }
}

#[test]
fn chains_that_cannot_be_answered_stop_the_device() {
    // The device's own memory is not for other requests either.
    let own = config().start;
    let cases: [(&str, &[Desc]); 8] = [
        ("no answer", &[r(REQUEST, 4)]),
        ("an empty answer", &[r(REQUEST, 4), w(ANSWER, 0)]),
        ("a short answer", &[r(REQUEST, 4), w(ANSWER, 3)]),
        ("answer first", &[w(ANSWER, 4), r(REQUEST, 4)]),
        ("request outside", &[r(0x40_0000, 4), w(ANSWER, 4)]),
        ("request in its own memory", &[r(own, 4), w(ANSWER, 4)]),
        ("answer into its own memory", &[r(REQUEST, 4), w(own, 4)]),
        (
            "answer across the end",
            &[r(REQUEST, 4), w(HIGH + 0xf_fffe, 4)],
        ),
    ];
    for (name, chain) in cases {
        let mut driver = started();
        assert_eq!(driver.request(0, chain), [], "{name}");
        assert!(driver.needs_reset(), "{name}");
        driver.restart();
        driver.write(REQUEST, &[0; 4]);
        assert_eq!(driver.request(0, &[r(REQUEST, 4), w(ANSWER, 4)]).len(), 1);
        assert_eq!(answer(&driver), 0, "{name}");
    }
}

#[test]
fn hostile_rings_stop_the_device() {
    let mut driver = started();
    driver.raw_avail_idx(0, 9);
    driver.kick(0);
    assert!(driver.needs_reset());
    let mut driver = started();
    driver.raw_desc(0, 0, ANSWER, 4, WRITE | NEXT, 0);
    driver.make_available(0, 0);
    driver.kick(0);
    assert!(driver.needs_reset());
}

#[test]
fn its_configuration_cannot_be_written() {
    let mut driver = started();
    driver.set(0x100, 0xffff_ffff);
    driver.set(0x108, 0xffff_ffff);
    assert_eq!(u64::from_le_bytes(driver.config(0)), config().start);
    assert_eq!(u64::from_le_bytes(driver.config(8)), config().size);
}
