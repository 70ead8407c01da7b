//! The serial port, saved: the registers of a 16550 and what it has received.
//!
//! The values are the driver's own, except the received bytes, of which a reader takes at most what the port's queue
//! holds.

use serde::{Deserialize, Serialize};

/// A 16550A, register by register.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Low byte of the divisor latch.
    pub baud_divisor_low: u8,
    /// High byte of the divisor latch.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes received and not read yet, the oldest first; in loopback only, as the port has no other input.
    pub received: Vec<u8>,
}
