//! Everything that describes a VM, validated once.
//!
//! Pure: it asks the host nothing but what [`Limits`] hands in, so every refusal can be tested anywhere.

use std::path::PathBuf;

use serde::Deserialize;
use thiserror::Error;

/// Least guest memory, in MiB: below it no Linux gets to its first process.
pub const MEMORY_MIN_MIB: u64 = 32;
/// Most virtual processors.
pub const CPUS_MAX: u32 = 32;
/// The guest's vsock context id; 0 to 2 are taken by the hypervisor, loopback and the host.
pub const GUEST_CID: u32 = 3;

/// Why a configuration cannot work.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No processors, or too many.
    #[error("{cpus} CPUs: give --cpus a number from 1 to {max}")]
    Cpus {
        /// What was asked for.
        cpus: u32,
        /// What this host can do.
        max: u32,
    },
    /// Too little memory to boot in.
    #[error("{mib} MiB of memory: give --memory at least {MEMORY_MIN_MIB} MiB")]
    MemoryTooSmall {
        /// What was asked for.
        mib: u64,
    },
    /// More memory than the host has.
    #[error("{mib} MiB of memory: this host has {host_mib} MiB; give --memory less")]
    MemoryTooLarge {
        /// What was asked for.
        mib: u64,
        /// What there is.
        host_mib: u64,
    },
    /// Persistent memory that the guest may write to.
    #[error("{path} cannot be writable as pmem: make it read-only, or a block device")]
    WritablePmem {
        /// The drive's file.
        path: PathBuf,
    },
    /// One file, two disks, and the guest may write to it: two file systems of the guest would destroy each other.
    #[error(
        "{path} is given twice, and the guest may write to it: give it once, or read-only both times"
    )]
    DriveTwice {
        /// The drive's file.
        path: PathBuf,
    },
}

/// What the host sets bounds to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Memory of the host, in MiB.
    pub memory_mib: u64,
    /// Virtual processors that KVM allows for one VM.
    pub cpus: u32,
}

/// What a drive is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveInterface {
    /// A disk (virtio-blk), `/dev/vda` for the first.
    Block,
    /// Memory that it may only read (virtio-pmem), `/dev/pmem0` for the first. A file system that can do DAX is read where the host has it.
    Pmem,
}

/// A disk of the guest.
#[derive(Debug, Clone)]
pub struct DriveConfig {
    /// The file that backs it.
    pub path: PathBuf,
    /// The guest may not write to it, and the file is opened so.
    pub read_only: bool,
    /// What it is to the guest.
    pub interface: DriveInterface,
}

/// The vsock device.
#[derive(Debug, Clone)]
pub struct VsockConfig {
    /// Context id of the guest, at least 3.
    pub cid: u32,
    /// The Unix socket that hosts connect to (`CONNECT <port>`).
    pub socket: PathBuf,
}

/// Where the guest's console goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// Kept in memory alone; the last lines are shown if the guest fails.
    #[default]
    Kept,
    /// To the monitor's standard error, as well.
    Stderr,
    /// To a file, which is made anew, as well.
    File(PathBuf),
    /// To a file of bounded length, as well.
    Log(PathBuf),
}

/// A virtual machine.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Virtual processors.
    pub cpus: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
    /// The kernel: an uncompressed `vmlinux`, or a bzImage.
    pub kernel: PathBuf,
    /// Words that are added to the end of the kernel's command line.
    pub cmdline: String,
    /// The disks; the first holds the root file system.
    pub drives: Vec<DriveConfig>,
    /// The vsock device, if there is one.
    pub vsock: Option<VsockConfig>,
    /// Whether the guest's agent may call the host on the lane, which needs the vsock device's sockets.
    pub lane: bool,
    /// Where the guest's console goes.
    pub console: ConsoleConfig,
}

impl VmConfig {
    /// Checks the configuration against what the host can do.
    pub fn validate(&self, limits: Limits) -> Result<(), ConfigError> {
        let max = limits.cpus.min(CPUS_MAX);
        if self.cpus == 0 || self.cpus > max {
            return Err(ConfigError::Cpus {
                cpus: self.cpus,
                max,
            });
        }
        let (mib, host_mib) = (self.memory_mib, limits.memory_mib);
        if mib < MEMORY_MIN_MIB {
            return Err(ConfigError::MemoryTooSmall { mib });
        }
        if mib > host_mib {
            return Err(ConfigError::MemoryTooLarge { mib, host_mib });
        }
        let writable =
            |drive: &&DriveConfig| drive.interface == DriveInterface::Pmem && !drive.read_only;
        if let Some(drive) = self.drives.iter().find(writable) {
            let path = drive.path.clone();
            return Err(ConfigError::WritablePmem { path });
        }
        for (index, drive) in self.drives.iter().enumerate() {
            let again = |other: &&DriveConfig| {
                other.path == drive.path && !(other.read_only && drive.read_only)
            };
            if self
                .drives
                .iter()
                .skip(index + 1)
                .any(|other| again(&other))
            {
                let path = drive.path.clone();
                return Err(ConfigError::DriveTwice { path });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        memory_mib: 1024,
        cpus: 8,
    };

    fn config(cpus: u32, memory_mib: u64) -> VmConfig {
        VmConfig {
            cpus,
            memory_mib,
            kernel: "vmlinux".into(),
            cmdline: String::new(),
            drives: Vec::new(),
            vsock: None,
            lane: false,
            console: ConsoleConfig::Kept,
        }
    }

    #[test]
    fn bounds_are_inclusive() {
        for (cpus, memory) in [(1, 32), (8, 1024)] {
            assert_eq!(config(cpus, memory).validate(LIMITS), Ok(()));
        }
    }

    #[test]
    fn persistent_memory_is_read_only() {
        for (interface, read_only, good) in [
            (DriveInterface::Block, false, true),
            (DriveInterface::Block, true, true),
            (DriveInterface::Pmem, true, true),
            (DriveInterface::Pmem, false, false),
        ] {
            let mut config = config(1, 128);
            config.drives.push(DriveConfig {
                path: "image".into(),
                read_only,
                interface,
            });
            let result = config.validate(LIMITS);
            assert_eq!(result.is_ok(), good, "{result:?}");
        }
    }

    #[test]
    fn a_file_is_two_disks_only_if_nobody_writes() {
        for (first, second, good) in [
            (true, true, true),
            (true, false, false),
            (false, true, false),
            (false, false, false),
        ] {
            let mut config = config(1, 128);
            for read_only in [first, second] {
                config.drives.push(DriveConfig {
                    path: "disk".into(),
                    read_only,
                    interface: DriveInterface::Block,
                });
            }
            let result = config.validate(LIMITS);
            assert_eq!(result.is_ok(), good, "{result:?}");
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        for (cpus, memory, message) in [
            (0, 128, "0 CPUs: give --cpus a number from 1 to 8"),
            (1000, 128, "1000 CPUs: give --cpus a number from 1 to 8"),
            (1, 31, "31 MiB of memory: give --memory at least 32 MiB"),
            (1, u64::MAX, "this host has 1024 MiB; give --memory less"),
        ] {
            let error = config(cpus, memory)
                .validate(LIMITS)
                .unwrap_err()
                .to_string();
            assert!(error.contains(message), "{error}");
        }
        let many = Limits {
            cpus: 4096,
            ..LIMITS
        };
        let error = config(33, 128).validate(many).unwrap_err();
        assert_eq!(error, ConfigError::Cpus { cpus: 33, max: 32 });
    }
}
