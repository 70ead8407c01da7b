//! A processor saved, and made again from what was saved.
//!
//! The order of the calls is KVM's (Linux, Documentation/virt/kvm/api.rst): the multiprocessor state first when saving, because
//! asking for it settles events that wait; when restoring, the local APIC after the system registers, which say where it is, and
//! before the model-specific registers, one of which arms its timer.

use std::io;

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_mp_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use snapshot_fmt::state::vcpu::{CpuidEntry, VcpuState};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::Cpuid;
use crate::kvm::{self, KvmError, call_failed, structure};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Linux, Documentation/virt/kvm/x86/msr.rst.
const MSR_KVM_WALL_CLOCK: u32 = 0x11;
const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
/// Most entries that one call takes (KVM's MAX_IO_MSRS is 256).
const MSRS_PER_CALL: usize = 256;

/// Why a processor could not be saved or restored.
#[derive(Debug, Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The guest saw another processor than this host can show.
    #[error(
        "this host's processor differs from the one that the guest has seen: CPUID {function:#x}.{index:#x} is {here}, was {saved}; restore it on the host that it was made on, or one like it"
    )]
    Cpuid {
        /// The leaf.
        function: u32,
        /// The subleaf.
        index: u32,
        /// Its registers here, or that there is none.
        here: String,
        /// Its saved registers, or that there was none.
        saved: String,
    },
    /// A register would not take its value.
    #[error(
        "model-specific register {index:#x} does not take the saved value {value:#x} on this host"
    )]
    Msr {
        /// Which register.
        index: u32,
        /// What was saved.
        value: u64,
    },
}

/// What is the same for every processor of a machine, asked once.
#[derive(Debug)]
pub struct SaveContext {
    /// What the processors say of themselves. KVM would give what it made of that, which differs with what the guest does.
    cpuid: Vec<Vec<CpuidEntry>>,
    /// The registers that this KVM can save.
    msrs: Vec<u32>,
}

impl SaveContext {
    /// Asks KVM, for a machine of `cpus` processors.
    pub fn new(kvm: &Kvm, cpus: u8, software: bool) -> Result<Self, KvmError> {
        let cpuid = Cpuid::new(kvm, cpus, software)?;
        let entries = |id| cpuid.of(id).iter().map(saved_entry).collect();
        let list = kvm
            .get_msr_index_list()
            .map_err(call_failed("KVM_GET_MSR_INDEX_LIST"))?;
        let mut msrs = list.as_slice().to_vec();
        // They ask the host, whenever they are written, to say in the guest's memory what day it is: each copy would have a page of its own for what no guest reads but where it has just asked.
        msrs.retain(|index| ![MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW].contains(index));
        // The timer is armed once everything else is there, the counter that it waits for first of all.
        msrs.sort_by_key(|&index| match index {
            IA32_TSC => (0, 0),
            IA32_TSC_DEADLINE => (2, 0),
            other => (1, other),
        });
        Ok(Self {
            cpuid: (0..cpus).map(entries).collect(),
            msrs,
        })
    }
}

/// Everything about the processor `id` that is outside the guest.
pub fn save(vcpu: &VcpuFd, id: u8, context: &SaveContext) -> Result<VcpuState, VcpuStateError> {
    let mp_state = vcpu
        .get_mp_state()
        .map_err(call_failed("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(call_failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(call_failed("KVM_GET_SREGS"))?;
    let xsave = vcpu.get_xsave().map_err(call_failed("KVM_GET_XSAVE"))?;
    let xcrs = vcpu.get_xcrs().map_err(call_failed("KVM_GET_XCRS"))?;
    let debug_regs = vcpu
        .get_debug_regs()
        .map_err(call_failed("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(call_failed("KVM_GET_LAPIC"))?;
    let msrs = get_msrs(vcpu, &context.msrs)?;
    let events = vcpu
        .get_vcpu_events()
        .map_err(call_failed("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        cpuid: context
            .cpuid
            .get(usize::from(id))
            .cloned()
            .unwrap_or_default(),
        // Where KVM cannot say, the guest measures for itself and nothing can be scaled.
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        regs: regs.as_bytes().to_vec(),
        sregs: sregs.as_bytes().to_vec(),
        xsave: xsave.as_bytes().to_vec(),
        xcrs: xcrs.as_bytes().to_vec(),
        debug_regs: debug_regs.as_bytes().to_vec(),
        lapic: lapic.as_bytes().to_vec(),
        events: events.as_bytes().to_vec(),
        mp_state: mp_state.mp_state,
        msrs,
    })
}

/// Gives a new processor the saved state, all but its model-specific registers. It shows the guest the CPUID `host`; the guest has seen the saved one, so both must agree.
pub(super) fn restore(
    vcpu: &VcpuFd,
    state: &VcpuState,
    host: &[kvm_cpuid_entry2],
) -> Result<(), VcpuStateError> {
    check_cpuid(&state.cpuid, host)?;
    if state.tsc_khz != 0 && vcpu.get_tsc_khz().is_ok_and(|khz| khz != state.tsc_khz) {
        vcpu.set_tsc_khz(state.tsc_khz)
            .map_err(call_failed("KVM_SET_TSC_KHZ"))?;
    }
    load(vcpu, state)
}

/// Gives a processor that shows the guest the saved CPUID the rest of the saved state, all but its model-specific registers.
fn load(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    let mp_state = state.mp_state;
    vcpu.set_mp_state(kvm_mp_state { mp_state })
        .map_err(call_failed("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&structure("kvm_regs", &state.regs)?)
        .map_err(call_failed("KVM_SET_REGS"))?;
    vcpu.set_sregs(&structure("kvm_sregs", &state.sregs)?)
        .map_err(call_failed("KVM_SET_SREGS"))?;
    kvm::set_xsave(vcpu, &structure("kvm_xsave", &state.xsave)?)?;
    vcpu.set_xcrs(&structure("kvm_xcrs", &state.xcrs)?)
        .map_err(call_failed("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&structure("kvm_debugregs", &state.debug_regs)?)
        .map_err(call_failed("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(&structure("kvm_lapic_state", &state.lapic)?)
        .map_err(call_failed("KVM_SET_LAPIC"))?;
    vcpu.set_vcpu_events(&structure("kvm_vcpu_events", &state.events)?)
        .map_err(call_failed("KVM_SET_VCPU_EVENTS"))?;
    Ok(())
}

/// Takes a processor that has run back to the saved state, which is of the same machine.
pub fn rewind(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    load(vcpu, state)?;
    restore_msrs(vcpu, state)
}

fn saved_entry(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}

fn check_cpuid(saved: &[CpuidEntry], host: &[kvm_cpuid_entry2]) -> Result<(), VcpuStateError> {
    let here: Vec<_> = host.iter().map(saved_entry).collect();
    if saved == here {
        return Ok(());
    }
    let text = |entries: &[CpuidEntry], of: &CpuidEntry| {
        let same = |e: &&CpuidEntry| (e.function, e.index) == (of.function, of.index);
        entries
            .iter()
            .find(same)
            .map_or("missing".to_owned(), |entry| {
                let [a, b, c, d] = entry.registers;
                format!("{a:08x} {b:08x} {c:08x} {d:08x}")
            })
    };
    let differs = |entry: &&CpuidEntry| text(&here, entry) != text(saved, entry);
    match saved.iter().chain(&here).find(differs) {
        None => Ok(()),
        Some(entry) => Err(VcpuStateError::Cpuid {
            function: entry.function,
            index: entry.index,
            here: text(&here, entry),
            saved: text(saved, entry),
        }),
    }
}

/// Restores the model-specific registers. Some hold addresses of guest memory, which KVM has to know by now; and the timer runs from
/// here on.
pub fn restore_msrs(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    set_msrs(vcpu, &state.msrs)
}

/// KVM stops at the first register that it cannot read: some of its list need a feature that the guest has not.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(MSRS_PER_CALL)];
        let mut msrs = msr_list(now.iter().map(|&index| (index, 0)), "KVM_GET_MSRS")?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(call_failed("KVM_GET_MSRS"))?;
        values.extend(
            msrs.as_slice()[..read]
                .iter()
                .map(|msr| (msr.index, msr.data)),
        );
        // Past the one that was refused, if any was.
        rest = &rest[(read + usize::from(read < now.len()))..];
    }
    Ok(values)
}

/// A register that is refused may be one that cannot be written but has its value already.
fn set_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), VcpuStateError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(MSRS_PER_CALL)];
        let list = msr_list(now.iter().copied(), "KVM_SET_MSRS")?;
        let written = vcpu.set_msrs(&list).map_err(call_failed("KVM_SET_MSRS"))?;
        if let Some(&(index, value)) = now.get(written)
            && get_msrs(vcpu, &[index])? != [(index, value)]
        {
            return Err(VcpuStateError::Msr { index, value });
        }
        rest = &rest[(written + usize::from(written < now.len()))..];
    }
    Ok(())
}

fn msr_list(
    values: impl Iterator<Item = (u32, u64)>,
    call: &'static str,
) -> Result<Msrs, KvmError> {
    let entries: Vec<_> = values
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries)
        .map_err(|error| call_failed(call)(io::Error::other(format!("{error:?}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_processor_is_refused_by_the_leaf_that_differs() {
        let entry = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let saved: Vec<_> = [entry(0, 1), entry(7, 2)].iter().map(saved_entry).collect();
        check_cpuid(&saved, &[entry(0, 1), entry(7, 2)]).unwrap();
        for (host, says) in [
            (
                vec![entry(0, 1), entry(7, 3)],
                "CPUID 0x7.0x0 is 00000003 00000000 00000000 00000000, was 00000002",
            ),
            (vec![entry(0, 1)], "CPUID 0x7.0x0 is missing"),
            (
                vec![entry(0, 1), entry(7, 2), entry(9, 0)],
                "CPUID 0x9.0x0 is 00000000 00000000 00000000 00000000, was missing",
            ),
        ] {
            let error = check_cpuid(&saved, &host).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
