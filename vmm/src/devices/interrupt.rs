//! How a device interrupts its guest.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An interrupt line of a device: edge-triggered, active high.
pub trait Interrupt: Send + Sync {
    /// Raises one interrupt.
    fn trigger(&self) -> io::Result<()>;
}

/// An eventfd that is registered with KVM as an irqfd.
impl Interrupt for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}
