//! How a device reaches its driver: the interrupt and device status registers and the interrupt line.
//!
//! The transport (on a vCPU's thread) and the device (on the event loop) share one [`Signal`]. It is
//! atomic throughout, so a driver that reads or acknowledges its interrupt never waits for a device
//! that is busy with a request.
//!
//! A guest can provoke any message in here as often as it likes, so only the first few of each
//! device are logged.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::devices::interrupt::Interrupt;

/// `InterruptStatus` bit: the device has used a buffer (Virtio 1.2, section 4.2.2).
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit: the device's configuration or status has changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// Device status bits (Virtio 1.2, section 2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u32 = 8;
    /// The device met an error that only a reset mends.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// How many messages a device may log in its life.
const MAX_MESSAGES: u32 = 32;

/// The line from a device to its driver.
pub struct Signal {
    name: String,
    irq: Arc<dyn Interrupt>,
    status: AtomicU32,
    interrupt_status: AtomicU32,
    config_generation: AtomicU32,
    messages: AtomicU32,
}

impl Signal {
    /// A line in the reset state. `name` is for messages.
    pub fn new(name: impl Into<String>, irq: Arc<dyn Interrupt>) -> Self {
        Self {
            name: name.into(),
            irq,
            status: AtomicU32::new(0),
            interrupt_status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            messages: AtomicU32::new(0),
        }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    /// Asks for a reset: nothing more can be done with this device until the driver resets it
    /// (Virtio 1.2, section 2.1.2).
    pub fn fail(&self, reason: impl fmt::Display) {
        self.warn(format_args!("stopped until it is reset: {reason}"));
        let before = self
            .status
            .fetch_or(status::DEVICE_NEEDS_RESET, Ordering::SeqCst);
        if before & status::DRIVER_OK != 0 {
            self.raise(INTERRUPT_CONFIG);
        }
    }

    /// Whether the device has failed since its last reset.
    pub fn has_failed(&self) -> bool {
        self.status() & status::DEVICE_NEEDS_RESET != 0
    }

    /// Logs what a driver did wrong, the first few times.
    pub fn warn(&self, message: impl fmt::Display) {
        let before = self
            .messages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n <= MAX_MESSAGES).then_some(n + 1)
            });
        match before {
            Ok(MAX_MESSAGES) => log::warn!("{}: further messages are suppressed", self.name),
            Ok(_) => log::warn!("{}: {message}", self.name),
            Err(_) => {}
        }
    }

    /// Raises the interrupt again for what is unacknowledged: an edge may be lost by a restore.
    pub fn resend(&self) {
        if self.interrupt_status() != 0 {
            self.trigger();
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn add_status(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.interrupt_status.store(0, Ordering::SeqCst);
    }

    pub(super) fn load(&self, status: u32, interrupt_status: u32, config_generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.interrupt_status
            .store(interrupt_status, Ordering::SeqCst);
        self.config_generation
            .store(config_generation, Ordering::SeqCst);
    }

    fn raise(&self, bit: u32) {
        self.interrupt_status.fetch_or(bit, Ordering::SeqCst);
        self.trigger();
    }

    fn trigger(&self) {
        if let Err(error) = self.irq.trigger() {
            self.warn(format_args!("cannot raise its interrupt: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::CountingInterrupt;

    #[test]
    fn bits_stay_until_acknowledged() {
        let irq = Arc::new(CountingInterrupt::default());
        let signal = Signal::new("test", irq.clone());
        signal.used_buffer();
        signal.config_changed();
        assert_eq!(signal.interrupt_status(), 3);
        assert_eq!(irq.count(), 2);
        signal.acknowledge(INTERRUPT_USED_BUFFER);
        assert_eq!(signal.interrupt_status(), INTERRUPT_CONFIG);
        assert_eq!(signal.config_generation(), 1);
    }

    #[test]
    fn failing_interrupts_a_running_driver_only() {
        let irq = Arc::new(CountingInterrupt::default());
        let signal = Signal::new("test", irq.clone());
        signal.fail("early");
        assert_eq!(irq.count(), 0);
        signal.reset();
        assert!(!signal.has_failed());
        signal.add_status(status::DRIVER_OK);
        signal.fail("late");
        assert!(signal.has_failed());
        assert_eq!(irq.count(), 1);
    }

    #[test]
    fn messages_are_bounded() {
        let signal = Signal::new("test", Arc::new(CountingInterrupt::default()));
        for n in 0..10_000 {
            signal.warn(n);
        }
        assert_eq!(signal.messages.load(Ordering::Relaxed), MAX_MESSAGES + 1);
    }
}
