//! A virtual processor: made, set up for boot, run in its own thread.

mod emulation;
mod exits;
pub mod state;
mod thread;

use std::io::Error;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use snapshot_fmt::state::vcpu::VcpuState;

use crate::arch::x86_64::cpuid::{self, CpuidConfig};
use crate::arch::x86_64::{msrs, regs};
use crate::kvm::{KvmError, call_failed};

pub use emulation::instruction_name;
pub use thread::{VcpuContext, VcpuThread};

use state::VcpuStateError;

/// Makes `cpus` processors, all of them as after a reset.
pub fn create(kvm: &Kvm, vm: &VmFd, cpus: u8, software: bool) -> Result<Vec<VcpuFd>, KvmError> {
    let cpuid = Cpuid::new(kvm, cpus, software)?;
    (0..cpus)
        .map(|id| create_one(vm, id, &cpuid.of(id)))
        .collect()
}

/// Makes the processors that were saved.
pub fn restore(
    kvm: &Kvm,
    vm: &VmFd,
    states: &[VcpuState],
    software: bool,
) -> Result<Vec<VcpuFd>, VcpuStateError> {
    let cpus = u8::try_from(states.len()).unwrap_or(u8::MAX);
    let cpuid = Cpuid::new(kvm, cpus, software)?;
    (0..cpus)
        .zip(states)
        .map(|(id, saved)| {
            let vcpu = vm
                .create_vcpu(u64::from(id))
                .map_err(call_failed("KVM_CREATE_VCPU"))?;
            state::restore(&vcpu, saved, &cpuid.of(id))?;
            Ok(vcpu)
        })
        .collect()
}

/// What the processors of a machine say of themselves.
struct Cpuid {
    supported: CpuId,
    config: CpuidConfig,
}

impl Cpuid {
    fn new(kvm: &Kvm, cpus: u8, software: bool) -> Result<Self, KvmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call_failed("KVM_GET_SUPPORTED_CPUID"))?;
        let config = CpuidConfig {
            cpus,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            software,
        };
        Ok(Self { supported, config })
    }

    fn of(&self, id: u8) -> Vec<kvm_cpuid_entry2> {
        cpuid::for_vcpu(self.supported.as_slice().to_vec(), id, self.config)
    }
}

fn create_one(vm: &VmFd, id: u8, cpuid: &[kvm_cpuid_entry2]) -> Result<VcpuFd, KvmError> {
    let vcpu = vm
        .create_vcpu(u64::from(id))
        .map_err(call_failed("KVM_CREATE_VCPU"))?;
    set_cpuid(&vcpu, cpuid)?;

    let boot_msrs = msrs::boot_msrs();
    let msrs = Msrs::from_entries(&boot_msrs)
        .map_err(|error| call_failed("KVM_SET_MSRS")(Error::other(format!("{error:?}"))))?;
    let set = vcpu.set_msrs(&msrs).map_err(call_failed("KVM_SET_MSRS"))?;
    if let Some(refused) = boot_msrs.get(set) {
        let why = format!("MSR {:#x} was refused", refused.index);
        return Err(call_failed("KVM_SET_MSRS")(Error::other(why)));
    }
    vcpu.set_fpu(&regs::entry_fpu())
        .map_err(call_failed("KVM_SET_FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(call_failed("KVM_GET_LAPIC"))?;
    regs::set_virtual_wire(&mut lapic);
    vcpu.set_lapic(&lapic)
        .map_err(call_failed("KVM_SET_LAPIC"))?;
    Ok(vcpu)
}

fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let cpuid = CpuId::from_entries(entries)
        .map_err(|error| call_failed("KVM_SET_CPUID2")(Error::other(format!("{error:?}"))))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(call_failed("KVM_SET_CPUID2"))
}

/// Sets the boot processor to enter the kernel at `entry`, a guest-physical address. The others wait to be started by it.
pub fn set_entry(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(call_failed("KVM_GET_SREGS"))?;
    regs::set_entry_sregs(&mut sregs);
    vcpu.set_sregs(&sregs)
        .map_err(call_failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs::entry_regs(entry))
        .map_err(call_failed("KVM_SET_REGS"))
}
