//! What a virtual processor says of itself.
//!
//! KVM offers what the host has; this makes it true for the guest: one package with `cpus` cores of one thread
//! each, no performance counters, and on a software KVM none of the instructions that it cannot run at ring 0.
//! Sources: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// What the guest's processors should look like.
#[derive(Debug, Clone, Copy)]
pub struct CpuidConfig {
    /// Virtual processors, 1 to 32.
    pub cpus: u8,
    /// KVM has KVM_CAP_TSC_DEADLINE_TIMER.
    pub tsc_deadline: bool,
    /// A software KVM, whose emulator lacks some instructions at ring 0.
    pub software: bool,
}

/// KVM's paravirtual features, and those in EAX that need no hypercall: kvmclock old and new, no delay after
/// port I/O, end of interrupt by memory, a stable clock (bits 0, 3, 1, 6, 24).
const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
const KVM_CLOCK_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 24;

/// CPUID leaf 1, ECX.
mod leaf1_ecx {
    pub const CX16: u32 = 1 << 13;
    pub const POPCNT: u32 = 1 << 23;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const XSAVE: u32 = 1 << 26;
    pub const OSXSAVE: u32 = 1 << 27;
    pub const AVX: u32 = 1 << 28;
    pub const HYPERVISOR: u32 = 1 << 31;
}

/// CPUID leaf 7, subleaf 0.
mod leaf7 {
    pub const EBX_FSGSBASE: u32 = 1;
    pub const EBX_ERMS: u32 = 1 << 9;
    pub const EBX_INVPCID: u32 = 1 << 10;
    pub const EBX_SMAP: u32 = 1 << 20;
    pub const ECX_RDPID: u32 = 1 << 22;
    pub const EDX_FSRM: u32 = 1 << 4;
}

/// Bits of an APIC id that tell the cores of the package apart.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

/// Changes KVM's supported entries to those of the processor whose APIC id is `id`.
pub fn for_vcpu(
    mut entries: Vec<kvm_cpuid_entry2>,
    id: u8,
    config: CpuidConfig,
) -> Vec<kvm_cpuid_entry2> {
    let apic_id = u32::from(id);
    let cpus = u32::from(config.cpus);
    let last = cpus - 1;
    for entry in &mut entries {
        match entry.function {
            0x1 => leaf_1(entry, apic_id, config),
            // Deterministic cache parameters: levels 1 and 2 belong to a core, level 3 to the package.
            0x4 => {
                let sharing = if (entry.eax >> 5) & 7 >= 3 { last } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (last << 26);
            }
            0x7 if entry.index == 0 && config.software => {
                entry.ebx &=
                    !(leaf7::EBX_FSGSBASE | leaf7::EBX_ERMS | leaf7::EBX_INVPCID | leaf7::EBX_SMAP);
                entry.ecx &= !leaf7::ECX_RDPID;
                entry.edx &= !leaf7::EDX_FSRM;
            }
            // Hypercalls for interrupts, yielding and the like never return from the emulator.
            KVM_CPUID_FEATURES if config.software => entry.eax &= KVM_CLOCK_FEATURES,
            // Performance counters would be the host's.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => {
                const CMP_LEGACY: u32 = 1 << 1;
                entry.ecx &= !CMP_LEGACY;
            }
            0x8000_0008 => entry.ecx = (core_bits(config.cpus) << 12) | last,
            0x8000_001d => {
                let sharing = if (entry.eax >> 5) & 7 >= 3 { last } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
            }
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
            _ => {}
        }
    }
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    if let Some(highest) = entries.iter().find(|e| e.function == 0).map(|e| e.eax) {
        let leaves = [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= highest);
        entries.extend(leaves.flat_map(|leaf| topology(leaf, apic_id, config.cpus)));
    }
    entries
}

fn leaf_1(entry: &mut kvm_cpuid_entry2, apic_id: u32, config: CpuidConfig) {
    const CLFLUSH_MASK: u32 = 0xff00;
    const HTT: u32 = 1 << 28;
    let cpus = u32::from(config.cpus);
    entry.ebx = (entry.ebx & CLFLUSH_MASK) | (apic_id << 24) | (cpus << 16);
    entry.ecx |= leaf1_ecx::HYPERVISOR;
    if config.tsc_deadline {
        entry.ecx |= leaf1_ecx::TSC_DEADLINE;
    }
    entry.edx = if cpus > 1 {
        entry.edx | HTT
    } else {
        entry.edx & !HTT
    };
    if config.software {
        use leaf1_ecx::{AVX, CX16, OSXSAVE, POPCNT, XSAVE};
        entry.ecx &= !(CX16 | POPCNT | XSAVE | OSXSAVE | AVX);
    }
}

/// Leaves 0xb and 0x1f: a level of threads (one per core), a level of cores.
fn topology(function: u32, apic_id: u32, cpus: u8) -> [kvm_cpuid_entry2; 3] {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: (kind << 8) | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, 0, 1, SMT),
        level(1, core_bits(cpus), u32::from(cpus), CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ecx,
            ..Default::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    const CONFIG: CpuidConfig = CpuidConfig {
        cpus: 3,
        tsc_deadline: true,
        software: false,
    };

    #[test]
    fn each_processor_knows_its_id_and_siblings() {
        let entries = for_vcpu(
            vec![entry(0, 0xd, 0), entry(1, 0, 0), entry(0xb, 9, 9)],
            2,
            CONFIG,
        );
        assert_eq!(find(&entries, 1, 0).ebx >> 16, 0x0203);
        let core = find(&entries, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert!(
            !entries.iter().any(|e| e.function == 0x1f),
            "above the highest leaf"
        );
    }

    #[test]
    fn software_hides_what_its_emulator_lacks() {
        let all = || vec![entry(1, 0, u32::MAX)];
        let config = CpuidConfig {
            software: true,
            ..CONFIG
        };
        let software = find(&for_vcpu(all(), 0, config), 1, 0).ecx;
        let hardware = find(&for_vcpu(all(), 0, CONFIG), 1, 0).ecx;
        assert_eq!(hardware, u32::MAX);
        assert_eq!(!software, 1 << 13 | 1 << 23 | 1 << 26 | 1 << 27 | 1 << 28);
    }
}
