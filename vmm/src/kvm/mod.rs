//! KVM itself: opening it, and the calls that `kvm-ioctls` leaves unsafe.

#![allow(unsafe_code)]

pub mod boot_processor;
pub mod decoy;
mod kick;
pub mod platform;

use std::io;

use kvm_bindings::{
    KVM_API_VERSION, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_config, kvm_run, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::arch::x86_64::layout::KVM_TSS_START;
use crate::memory::GuestMemory;
use crate::sys::file_mapping::FileMapping;

pub use kick::{Kick, install_kick_handler};

/// The device that KVM is reached by.
pub const DEVICE: &str = "/dev/kvm";

/// Why KVM could not be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// There is no KVM.
    #[error(
        "no {DEVICE}: load KVM (modprobe kvm_intel or kvm_amd), turn on virtualization in the firmware, or pass the device into this container"
    )]
    Missing,
    /// The user may not open it.
    #[error(
        "no permission for {DEVICE}: add this user to the group kvm (usermod -aG kvm NAME) and log in again"
    )]
    Permission,
    /// It cannot be opened for another reason.
    #[error("cannot open {DEVICE}: {0}")]
    Open(io::Error),
    /// It is no KVM, or one from before 2007.
    #[error("{DEVICE} speaks KVM API version {0}, not {KVM_API_VERSION}: is it KVM?")]
    ApiVersion(i32),
    /// It lacks what this monitor needs.
    #[error("this KVM lacks {0}, which bough needs: update the host's kernel")]
    Capability(&'static str),
    /// A saved structure has another size than KVM's.
    #[error(
        "the saved {what} has {len} bytes, KVM's has {want}: the snapshot is damaged, or of another architecture"
    )]
    Structure {
        /// Which structure.
        what: &'static str,
        /// Its saved size.
        len: usize,
        /// What KVM takes.
        want: usize,
    },
    /// A call failed.
    #[error("KVM call {call} failed: {source}")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// For `map_err`: says which call of KVM failed.
pub fn call_failed<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> KvmError {
    move |error| KvmError::Call {
        call,
        source: error.into(),
    }
}

/// KVM's structure `what` out of saved bytes.
pub fn structure<T: zerocopy::FromBytes>(what: &'static str, bytes: &[u8]) -> Result<T, KvmError> {
    T::read_from_bytes(bytes).map_err(|_| KvmError::Structure {
        what,
        len: bytes.len(),
        want: size_of::<T>(),
    })
}

/// Opens KVM and checks that it has what a sandbox needs.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|errno| {
        let error = io::Error::from(errno);
        match error.kind() {
            io::ErrorKind::NotFound => KvmError::Missing,
            io::ErrorKind::PermissionDenied => KvmError::Permission,
            // No driver behind the device node.
            _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
                KvmError::Missing
            }
            _ => KvmError::Open(error),
        }
    })?;
    let version = kvm.get_api_version();
    if i64::from(version) != i64::from(KVM_API_VERSION) {
        return Err(KvmError::ApiVersion(version));
    }
    for (cap, name) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Capability(name));
        }
    }
    Ok(kvm)
}

/// Makes a VM with its interrupt controllers and timer in the kernel.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let vm = kvm.create_vm().map_err(call_failed("KVM_CREATE_VM"))?;
    vm.set_tss_address(KVM_TSS_START)
        .map_err(call_failed("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(call_failed("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit)
        .map_err(call_failed("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

/// Shows `memory` to the guest, one slot per region.
///
/// The caller keeps `memory` mapped for as long as the VM lives: [`crate::machine::Machine`] holds both and drops the VM first.
pub fn register_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host_address(region),
        };
        // SAFETY: the range is one whole mapping of `region`, which outlives the VM (see above); no
        // Rust reference into it exists, since all access goes through volatile reads and writes.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(call_failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Shows `files`, each with its guest physical address, to the guest for reading, in the slots from `first` on. A guest's write leaves
/// KVM_RUN as an access to a device that is not there.
///
/// The caller keeps the mappings for as long as the VM lives, as [`crate::machine::Machine`] does.
pub fn register_files<'a>(
    vm: &VmFd,
    first: u32,
    files: impl Iterator<Item = (u64, &'a FileMapping)>,
) -> Result<(), KvmError> {
    for (slot, (start, mapping)) in (first..).zip(files) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: start,
            memory_size: mapping.size() as u64,
            userspace_addr: mapping.address() as u64,
        };
        // SAFETY: the range is one whole mapping, which outlives the VM (see above), and which nothing in this process reads or writes.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(call_failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Restores the XSAVE area.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), KvmError> {
    // SAFETY: KVM reads more than the structure only where this process has asked for features whose state is larger
    // (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM), which nothing in it does.
    unsafe { vcpu.set_xsave(xsave) }.map_err(call_failed("KVM_SET_XSAVE"))
}

fn host_address(region: &GuestRegionMmap) -> u64 {
    region.get_mmap().as_ptr() as u64
}

/// What KVM_EXIT_INTERNAL_ERROR left in `run`: the suberror and, for an emulation failure, the
/// instruction's bytes if KVM gives them (KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES).
pub fn internal_error(run: &kvm_run) -> (u32, Option<Vec<u8>>) {
    // SAFETY: every bit pattern is valid for these plain integers, and after this exit it is this
    // member of the union that KVM has filled in.
    let (failure, instruction) = unsafe {
        let failure = run.__bindgen_anon_1.emulation_failure;
        (failure, failure.__bindgen_anon_1.__bindgen_anon_1)
    };
    let has_bytes = failure.suberror == KVM_INTERNAL_ERROR_EMULATION
        && failure.ndata >= 1
        && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
    (
        failure.suberror,
        has_bytes.then(|| instruction.insn_bytes[..len].to_vec()),
    )
}

#[cfg(test)]
mod tests {
    use super::structure;

    #[test]
    fn a_structure_of_another_size_is_refused() {
        let error = structure::<kvm_bindings::kvm_regs>("kvm_regs", &[0; 7]).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("kvm_regs has 7 bytes, KVM's has 144"),
            "{error}"
        );
    }
}
