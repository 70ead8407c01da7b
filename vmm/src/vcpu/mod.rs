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

/// A processor that shows this host's CPUID to its guest, and has no state yet.
pub struct NewVcpu {
    vcpu: VcpuFd,
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// Makes `cpus` processors.
pub fn create(kvm: &Kvm, vm: &VmFd, cpus: u8, software: bool) -> Result<Vec<NewVcpu>, KvmError> {
    let cpuid = Cpuid::new(kvm, cpus, software)?;
    let one = |id| {
        let vcpu = vm
            .create_vcpu(u64::from(id))
            .map_err(call_failed("KVM_CREATE_VCPU"))?;
        let cpuid = cpuid.of(id);
        set_cpuid(&vcpu, &cpuid)?;
        Ok(NewVcpu { vcpu, cpuid })
    };
    (0..cpus).map(one).collect()
}

impl NewVcpu {
    /// The processor as it is before a boot.
    pub fn for_boot(self) -> Result<VcpuFd, KvmError> {
        let vcpu = self.vcpu;
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

    /// The processor that was saved, but for its model-specific registers.
    pub fn restore(self, saved: &VcpuState) -> Result<VcpuFd, VcpuStateError> {
        state::restore(&self.vcpu, saved, &self.cpuid)?;
        Ok(self.vcpu)
    }
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
