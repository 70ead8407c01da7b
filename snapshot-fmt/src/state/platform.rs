//! What the processors share, saved: interrupt controllers, timer, clock. Kept as KVM gives it, like the processors.

use serde::{Deserialize, Serialize};

/// The parts of the machine that KVM has in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformState {
    /// `struct kvm_irqchip` of the first PIC.
    #[serde(with = "crate::bytes")]
    pub pic_master: Vec<u8>,
    /// `struct kvm_irqchip` of the second PIC.
    #[serde(with = "crate::bytes")]
    pub pic_slave: Vec<u8>,
    /// `struct kvm_irqchip` of the IOAPIC.
    #[serde(with = "crate::bytes")]
    pub ioapic: Vec<u8>,
    /// `struct kvm_pit_state2`.
    #[serde(with = "crate::bytes")]
    pub pit: Vec<u8>,
    /// The guest's kvmclock, in nanoseconds. It goes on from here when the machine does, so the guest's monotonic time does not
    /// see how long it was not there.
    pub clock_ns: u64,
}
