//! A memory slot that is there to be moved: KVM forgets all its shadows of guest page tables when a slot goes (kvm_mmu_zap_all_fast).
//!
//! Where KVM shadows them, it learns of a change by the guest's own writes, which it intercepts. Memory that is exchanged under a guest is none, and there
//! is no call that says so. With nested paging there are no such shadows, and this is not needed.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{KvmError, call_failed, host_address};
use crate::arch::x86_64::layout;
use crate::memory::{self, GuestMemory};

const PAGE: u64 = 4096;

/// The slot, of one page. Declared before the machine's VM is dropped or after, it must be dropped later than that.
pub struct Decoy {
    slot: u32,
    /// Zeros, which a guest that looks there may change: nobody else reads them.
    memory: GuestMemory,
    /// Whether it is at the second of its two places.
    moved: bool,
}

impl Decoy {
    /// Makes it, in a free `slot`.
    pub fn new(vm: &VmFd, slot: u32) -> Result<Self, KvmError> {
        let memory = memory::create(&[(layout::DECOY_START, PAGE)]);
        let memory = memory.map_err(|error| {
            call_failed("KVM_SET_USER_MEMORY_REGION")(std::io::Error::other(error))
        })?;
        let decoy = Self {
            slot,
            memory,
            moved: false,
        };
        decoy.set(vm)?;
        Ok(decoy)
    }

    /// Has KVM forget its shadows. The processors are outside of KVM_RUN.
    pub fn forget_shadows(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        self.moved = !self.moved;
        self.set(vm)
    }

    fn set(&self, vm: &VmFd) -> Result<(), KvmError> {
        let Some(region) = self.memory.iter().next() else {
            return Ok(());
        };
        let slot = kvm_userspace_memory_region {
            slot: self.slot,
            flags: 0,
            guest_phys_addr: layout::DECOY_START + PAGE * u64::from(self.moved),
            memory_size: region.len(),
            userspace_addr: host_address(region),
        };
        // SAFETY: the range is one whole mapping, which outlives the VM: the machine drops the VM before this. Nothing in this process reads or writes it.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(call_failed("KVM_SET_USER_MEMORY_REGION"))
    }
}
