//! A virtual processor, saved.
//!
//! The registers are kept as KVM gives them: the structures of Linux's `asm/kvm.h` for x86-64, byte for byte. They are an
//! interface that the kernel keeps, and what is in them is checked by KVM itself when it takes them back.

use serde::{Deserialize, Serialize};

/// A leaf of CPUID as the guest sees it (`struct kvm_cpuid_entry2`, without its padding).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidEntry {
    /// EAX before the instruction.
    pub function: u32,
    /// ECX before the instruction, where it matters.
    pub index: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// EAX, EBX, ECX, EDX after it.
    pub registers: [u32; 4],
}

/// One processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// What the processor says of itself.
    pub cpuid: Vec<CpuidEntry>,
    /// How fast its time stamp counter is, in kHz; 0 where KVM did not say.
    pub tsc_khz: u32,
    /// `struct kvm_regs`.
    #[serde(with = "crate::bytes")]
    pub regs: Vec<u8>,
    /// `struct kvm_sregs`.
    #[serde(with = "crate::bytes")]
    pub sregs: Vec<u8>,
    /// `struct kvm_xsave`: the XSAVE area, 4096 bytes. What does not fit (AMX) is offered to no guest.
    #[serde(with = "crate::bytes")]
    pub xsave: Vec<u8>,
    /// `struct kvm_xcrs`.
    #[serde(with = "crate::bytes")]
    pub xcrs: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[serde(with = "crate::bytes")]
    pub debug_regs: Vec<u8>,
    /// `struct kvm_lapic_state`.
    #[serde(with = "crate::bytes")]
    pub lapic: Vec<u8>,
    /// `struct kvm_vcpu_events`.
    #[serde(with = "crate::bytes")]
    pub events: Vec<u8>,
    /// `KVM_MP_STATE_*`.
    pub mp_state: u32,
    /// Model-specific registers, index and value, in the order in which they are to be set.
    pub msrs: Vec<(u32, u64)>,
}
