//! What this host offers a monitor: found out by trying, not by guessing.
//!
//! Each finding says what its absence costs and how to mend it; [`crate::cli`] prints them.

use std::fs;
use std::io;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;

use crate::host::{self, KvmKind};
use crate::sandbox::runtime_dir;
use crate::sys::userfaultfd;
use crate::{confinement, kvm, sandbox};

/// `KVM_CAP_VM_TYPES`, and the bit in it for TDX (Linux uapi, asm/kvm.h).
const CAP_VM_TYPES: libc::c_ulong = 235;
const VM_TYPE_TDX: i32 = 1 << 5;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Something is slower or not to be had.
    Lacking,
    /// No sandbox can run.
    Fatal,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// How good it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What its absence costs; empty where nothing is absent.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub costs: &'static str,
    /// How to mend it; empty where nothing is to be mended.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Finding {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Good,
            found: found.into(),
            costs: "",
            remedy: String::new(),
        }
    }

    fn lacking(
        name: &'static str,
        found: impl Into<String>,
        costs: &'static str,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Lacking,
            costs,
            remedy: remedy.into(),
            ..Self::good(name, found)
        }
    }

    fn fatal(
        name: &'static str,
        found: impl Into<String>,
        costs: &'static str,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Fatal,
            ..Self::lacking(name, found, costs, remedy)
        }
    }
}

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let mut findings = Vec::new();
    match kvm::open() {
        Ok(kvm) => findings.extend(examine_kvm(&kvm)),
        Err(error) => {
            let message = error.to_string();
            let (found, remedy) = message.split_once(": ").unwrap_or((&message, ""));
            findings.push(Finding::fatal("kvm", found, "no sandbox can run", remedy));
        }
    }
    findings.push(examine_confinement());
    findings.push(examine_userfaultfd());
    findings.push(examine_thp());
    findings.push(examine_hugetlb());
    findings.push(examine_ksm());
    findings.push(Finding::good(
        "vsock",
        "in the monitor itself, over Unix sockets: needs nothing of the host",
    ));
    findings.push(examine_runtime_dir());
    findings.push(examine_open_files());
    findings.push(examine_memory());
    findings
}

fn examine_kvm(kvm: &Kvm) -> Vec<Finding> {
    let kind = match KvmKind::detect() {
        KvmKind::Hardware => Finding::good("kvm", "/dev/kvm, on hardware virtualization"),
        KvmKind::Software => Finding::lacking(
            "kvm",
            "/dev/kvm, a software KVM: guest-kernel code runs in an instruction emulator",
            "guest-kernel work takes some 1000 times as long; programs run at full speed; kernels that are not built for it may not boot",
            "run on a machine whose processor offers VMX or SVM to this system (bare metal, or a VM with nested virtualization)",
        ),
    };
    vec![kind, examine_capabilities(kvm), examine_tdx(kvm)]
}

/// Names the capabilities that are used if they are there.
fn examine_capabilities(kvm: &Kvm) -> Finding {
    const USED: [(Cap, &str); 7] = [
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::TscDeadlineTimer, "TSC deadline timer"),
        (Cap::AdjustClock, "clock adjustment"),
        (Cap::DirtyLogRing, "dirty ring"),
        (Cap::SplitIrqchip, "split irqchip"),
    ];
    let names = |present: bool| -> Vec<&str> {
        USED.iter()
            .filter(|(cap, _)| kvm.check_extension(*cap) == present)
            .map(|(_, name)| *name)
            .collect()
    };
    let (has, lacks) = (names(true).join(", "), names(false));
    let found = format!(
        "{has}; up to {} vCPUs and {} memory slots",
        kvm.get_max_vcpus(),
        kvm.get_nr_memslots()
    );
    if lacks.is_empty() {
        return Finding::good("kvm capabilities", found);
    }
    Finding::lacking(
        "kvm capabilities",
        format!("{found}; not there: {}", lacks.join(", ")),
        "slower timers, snapshots or pauses, according to what lacks",
        "update the host's kernel",
    )
}

fn examine_tdx(kvm: &Kvm) -> Finding {
    if kvm.check_extension_raw(CAP_VM_TYPES) & VM_TYPE_TDX != 0 {
        return Finding::good("tdx", "KVM offers trust domains");
    }
    Finding::lacking(
        "tdx",
        "KVM offers no trust domains",
        "no confidential guests; everything else works",
        "an Intel processor with TDX turned on in the firmware, Linux 6.16 or later, kvm_intel.tdx=1",
    )
}

fn examine_confinement() -> Finding {
    match confinement::try_out() {
        Ok(()) => Finding::good("confinement", "monitors are confined by seccomp filters"),
        Err(error) => Finding::fatal(
            "confinement",
            format!("a process cannot be confined: {error}"),
            "no sandbox can run",
            "a kernel with seccomp filters (CONFIG_SECCOMP_FILTER), and a container that lets them be set",
        ),
    }
}

fn examine_userfaultfd() -> Finding {
    /// Features that lazy restores and snapshots build on.
    const NEEDED: [(u64, &str); 4] = [
        (1, "write protection"),
        (1 << 5, "shared memory"),
        (1 << 10, "minor faults"),
        (1 << 12, "write protection of shared memory"),
    ];
    const COSTS: &str =
        "snapshots cannot be restored lazily by faults, nor memory written out while the VM runs";
    match userfaultfd::features() {
        Ok(features) => {
            let lacks: Vec<&str> = NEEDED
                .iter()
                .filter(|(bit, _)| features & bit == 0)
                .map(|(_, name)| *name)
                .collect();
            if lacks.is_empty() {
                return Finding::good("userfaultfd", format!("there, features {features:#x}"));
            }
            let found = format!("there, but without {}", lacks.join(", "));
            Finding::lacking(
                "userfaultfd",
                found,
                COSTS,
                "update the host's kernel (5.19 or later)",
            )
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::lacking(
            "userfaultfd",
            "not for this user",
            COSTS,
            "sysctl -w vm.unprivileged_userfaultfd=1, or give this user access to /dev/userfaultfd",
        ),
        Err(error) => Finding::lacking(
            "userfaultfd",
            error.to_string(),
            COSTS,
            "a host kernel with CONFIG_USERFAULTFD",
        ),
    }
}

/// The word in brackets, as in `always [madvise] never`.
fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?
        .1
        .split_once(']')
        .map(|(word, _)| word)
}

fn examine_thp() -> Finding {
    let read =
        |name| fs::read_to_string(Path::new("/sys/kernel/mm/transparent_hugepage").join(name));
    let (Ok(anonymous), Ok(shared)) = (read("enabled"), read("shmem_enabled")) else {
        return Finding::lacking(
            "huge pages (transparent)",
            "not there",
            "more TLB misses and page faults in large guests",
            "a host kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        );
    };
    let shared = chosen(&shared).unwrap_or("unknown").to_owned();
    let found = format!(
        "{} for private memory, {shared} for shared",
        chosen(&anonymous).unwrap_or("unknown")
    );
    if matches!(shared.as_str(), "never" | "deny" | "unknown") {
        return Finding::lacking(
            "huge pages (transparent)",
            found,
            "guest memory, which is shared memory, is mapped by 4 KiB pages: more page faults and TLB misses",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        );
    }
    Finding::good("huge pages (transparent)", found)
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn examine_hugetlb() -> Finding {
    match read_number("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages") {
        Some(0) | None => Finding::good("huge pages (reserved)", "none; nothing uses them yet"),
        Some(pages) => Finding::good(
            "huge pages (reserved)",
            format!("{pages} of 2 MiB; nothing uses them yet"),
        ),
    }
}

fn examine_ksm() -> Finding {
    match read_number("/sys/kernel/mm/ksm/run") {
        Some(1) => Finding::good("ksm", "runs: it may merge equal private pages of sandboxes"),
        Some(_) => Finding::good(
            "ksm",
            "there, not running; sandboxes share what they can without it, and merging leaks timing between tenants",
        ),
        None => Finding::good("ksm", "not there; not needed"),
    }
}

fn examine_runtime_dir() -> Finding {
    let dir = runtime_dir();
    match sandbox::SandboxDir::create(None) {
        Ok(_) => Finding::good("runtime directory", format!("{} is usable", dir.display())),
        Err(error) => Finding::fatal(
            "runtime directory",
            error.to_string(),
            "no sandbox can run",
            "set XDG_RUNTIME_DIR to a directory of this user",
        ),
    }
}

fn examine_open_files() -> Finding {
    /// What one sandbox takes without connections, and room for some.
    const WANTED: u64 = 1024;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    match limit.current {
        Some(current) if current < WANTED => Finding::lacking(
            "open files",
            format!("at most {current}"),
            "a sandbox with many vsock connections runs out of descriptors",
            "ulimit -n 4096, or LimitNOFILE= in the service",
        ),
        Some(current) => Finding::good("open files", format!("at most {current}")),
        None => Finding::good("open files", "not limited"),
    }
}

fn examine_memory() -> Finding {
    let total = host::memory_bytes() >> 20;
    let found = match host::available_memory_bytes() {
        Some(bytes) => format!("{total} MiB, {} MiB of it available", bytes >> 20),
        None => format!("{total} MiB"),
    };
    match rustix::process::getrlimit(rustix::process::Resource::As).current {
        Some(limit) => Finding::lacking(
            "memory",
            format!("{found}; this process may map {} MiB", limit >> 20),
            "guests larger than that cannot start",
            "ulimit -v unlimited",
        ),
        None => Finding::good("memory", found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_is_the_one_in_brackets() {
        assert_eq!(chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(chosen("nothing"), None);
    }

    #[test]
    fn whatever_lacks_says_what_it_costs_and_how_to_mend_it() {
        for finding in examine() {
            let mended = !finding.costs.is_empty() && !finding.remedy.is_empty();
            assert_eq!(finding.verdict != Verdict::Good, mended, "{finding:?}");
        }
    }
}
