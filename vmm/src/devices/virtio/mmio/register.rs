//! Where the registers are (Virtio 1.2, section 4.2.2), and the halves that 64-bit values have there.

use crate::devices::virtio::signal::status;

pub(super) const MAGIC_VALUE: u64 = 0x00;
pub(super) const VERSION: u64 = 0x04;
pub(super) const DEVICE_ID: u64 = 0x08;
pub(super) const VENDOR_ID: u64 = 0x0c;
pub(super) const DEVICE_FEATURES: u64 = 0x10;
pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
pub(super) const DRIVER_FEATURES: u64 = 0x20;
pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
pub(super) const QUEUE_SEL: u64 = 0x30;
pub(super) const QUEUE_NUM_MAX: u64 = 0x34;
pub(super) const QUEUE_NUM: u64 = 0x38;
pub(super) const QUEUE_READY: u64 = 0x44;
pub(super) const QUEUE_NOTIFY: u64 = 0x50;
pub(super) const INTERRUPT_STATUS: u64 = 0x60;
pub(super) const INTERRUPT_ACK: u64 = 0x64;
pub(super) const STATUS: u64 = 0x70;
pub(super) const QUEUE_DESC_LOW: u64 = 0x80;
pub(super) const QUEUE_DESC_HIGH: u64 = 0x84;
pub(super) const QUEUE_DRIVER_LOW: u64 = 0x90;
pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x94;
pub(super) const QUEUE_DEVICE_LOW: u64 = 0xa0;
pub(super) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
/// Shared memory regions: we have none, which reads as all ones.
pub(super) const SHM_FIRST: u64 = 0xb0;
pub(super) const SHM_LAST: u64 = 0xbc;
pub(super) const CONFIG_GENERATION: u64 = 0xfc;
pub(super) const CONFIG: u64 = 0x100;

/// `virt`, little-endian.
pub(super) const MAGIC: u32 = 0x7472_6976;
pub(super) const VENDOR: u32 = u32::from_le_bytes(*b"BOUG");
/// The status bits that a driver may set.
pub(super) const DRIVER_BITS: u32 =
    status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK | status::FEATURES_OK | status::FAILED;

/// Whether a device can have this status: each step of section 3.1.1 only on top of the one before, and no bit without a
/// meaning.
pub(super) fn is_reachable(value: u32) -> bool {
    let steps = value & DRIVER_BITS & !status::FAILED;
    let order = [
        0,
        status::ACKNOWLEDGE,
        status::ACKNOWLEDGE | status::DRIVER,
        status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
        status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
    ];
    order.contains(&steps) && value & !(DRIVER_BITS | status::DEVICE_NEEDS_RESET) == 0
}

/// The low (0) or high (1) half of `value`; others do not exist and are zero.
pub(super) fn half(value: u64, which: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match which {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// Sets the low (0) or high (1) half of `value`; others do not exist.
pub(super) fn set_half(value: &mut u64, which: u32, bits: u32) {
    match which {
        0 => *value = *value & !u64::from(u32::MAX) | u64::from(bits),
        1 => *value = *value & u64::from(u32::MAX) | u64::from(bits) << 32,
        _ => {}
    }
}
