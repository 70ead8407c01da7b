//! What this host can do, and what a software KVM needs from us.
//!
//! On hardware KVM nothing here changes anything.

use std::path::Path;

use crate::config::Limits;

/// What runs guest-kernel code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmKind {
    /// The processor's virtualization (VMX or SVM).
    Hardware,
    /// An instruction emulator with shadow paging: some thousand times slower at ring 0.
    Software,
}

impl KvmKind {
    /// Finds out which KVM serves `/dev/kvm`. It is a software one where the processor offers no
    /// virtualization, or where a software module is loaded and no hardware one is.
    pub fn detect() -> Self {
        let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        let software = loaded("kvm_pvm") && !loaded("kvm_intel") && !loaded("kvm_amd");
        if software || !cpu_has_virtualization() {
            Self::Software
        } else {
            Self::Hardware
        }
    }

    /// Words for the kernel's command line that this kind needs.
    ///
    /// A software KVM shows the guest most of the host's feature bits whatever CPUID it was given, and
    /// its emulator lacks the instructions behind some (X86_FEATURE numbers of Linux 6.1): popcnt 151,
    /// xsave 154, smap 308, fsgsbase 288, invpcid 298, rdpid 534; erms 297 and fsrm 580 are there, but
    /// a repeated byte copy takes one emulated step per byte.
    ///
    /// Without xsave the kernel does not preserve AVX registers from one process to the next, and programs see AVX
    /// all the same. GLIBC_TUNABLES ends up in init's environment, and the agent hands it on: the C library
    /// then keeps its hands off them.
    pub fn cmdline(self) -> &'static str {
        match self {
            Self::Hardware => "",
            Self::Software => {
                "rodata=off clearcpuid=151,154,308,288,298,534,297,580 \
                 GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-AVX_Fast_Unaligned_Load"
            }
        }
    }
}

/// The processor has VMX (CPUID 1, ECX bit 5) or SVM (CPUID 0x8000_0001, ECX bit 2).
pub fn cpu_has_virtualization() -> bool {
    use std::arch::x86_64::__cpuid;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    __cpuid(1).ecx & VMX != 0
        || (__cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & SVM != 0)
}

/// The bounds that this host and `kvm` set to a VM.
pub fn limits(kvm: &kvm_ioctls::Kvm) -> Limits {
    Limits {
        memory_mib: memory_bytes() >> 20,
        cpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
    }
}

/// Lets this process open as many files as it may: each vsock connection takes one.
pub fn raise_open_files_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // What was enough for the process to start is enough for a sandbox with few connections.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        );
    }
}

/// Processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Memory of this host, in bytes.
pub fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// Memory that this host could give without swapping, in bytes, if it tells (`/proc/meminfo`).
pub fn available_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    kib.checked_mul(1024)
}
