//! A machine as a manifest describes it, and back: what a restore must find again.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use snapshot_fmt::manifest::{CpuFingerprint, Drive, KernelFile, Machine, MemoryRange};

use super::SnapshotError;
use crate::arch::x86_64::layout;
use crate::config::{ConsoleConfig, DriveConfig, DriveInterface, VmConfig, VsockConfig};
use crate::devices::live::Disks;
use crate::devices::virtio::blk::{Disk, SECTOR};

const BLOCK: &str = "blk";
const PMEM: &str = "pmem";

/// Describes `config`, whose machine has the writable `disks`.
pub fn describe(config: &VmConfig, disks: &Disks) -> Result<Machine, SnapshotError> {
    let ranges = layout::ram_ranges(config.memory_mib << 20);
    Ok(Machine {
        cpus: config.cpus,
        memory: ranges
            .into_iter()
            .map(|(start, bytes)| MemoryRange { start, bytes })
            .collect(),
        kernel: KernelFile {
            path: text(&config.kernel),
            digest: None,
        },
        cmdline: config.cmdline.clone(),
        drives: config
            .drives
            .iter()
            .enumerate()
            .map(|(number, drive)| describe_drive(drive, disks.get(&number)))
            .collect::<Result<_, _>>()?,
        vsock_cid: config.vsock.as_ref().map(|vsock| vsock.cid),
        lane: config.lane,
    })
}

/// Of a disk that the guest may write to, the file is only where it came from: the content is in the snapshot.
fn describe_drive(drive: &DriveConfig, disk: Option<&Arc<Disk>>) -> Result<Drive, SnapshotError> {
    let path = &drive.path;
    let (bytes, mtime_ns) = match disk {
        Some(disk) => (disk.sectors() * SECTOR, 0),
        None => identity(path).map_err(|source| SnapshotError::Io {
            path: path.clone(),
            source,
        })?,
    };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
    Ok(Drive {
        path: text(&absolute),
        read_only: drive.read_only,
        interface: match drive.interface {
            DriveInterface::Block => BLOCK.to_owned(),
            DriveInterface::Pmem => PMEM.to_owned(),
        },
        bytes,
        mtime_ns,
        digest: None,
    })
}

/// Size of a disk's file or device in bytes, and when it was last written to.
fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let mut file = File::open(path)?;
    let meta = file.metadata()?;
    let bytes = file.seek(SeekFrom::End(0))?;
    let since = meta
        .mtime()
        .saturating_mul(1_000_000_000)
        .saturating_add(meta.mtime_nsec());
    Ok((bytes, u64::try_from(since).unwrap_or(0)))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The configuration of a machine that goes on as `machine` describes it, with its disks as they were.
pub fn config(
    machine: &Machine,
    vsock: Option<VsockConfig>,
    console: ConsoleConfig,
) -> Result<VmConfig, SnapshotError> {
    let wrong = |what: &str| SnapshotError::Description {
        what: what.to_owned(),
    };
    let bytes = machine
        .memory
        .iter()
        .try_fold(0u64, |sum, range| sum.checked_add(range.bytes))
        .filter(|bytes| bytes % (1 << 20) == 0)
        .ok_or_else(|| wrong("its memory is no number of MiB"))?;
    let ranges = machine
        .memory
        .iter()
        .map(|range| (range.start, range.bytes));
    if !layout::ram_ranges(bytes).into_iter().eq(ranges) {
        return Err(wrong("its memory is laid out otherwise"));
    }
    let drives = machine
        .drives
        .iter()
        .map(|drive| {
            let interface = match &*drive.interface {
                BLOCK => DriveInterface::Block,
                PMEM => DriveInterface::Pmem,
                _ => return Err(wrong("a drive is neither blk nor pmem")),
            };
            // The content of the others is in the snapshot.
            if drive.read_only {
                check_drive(drive)?;
            }
            Ok(DriveConfig {
                path: drive.path.clone().into(),
                read_only: drive.read_only,
                interface,
            })
        })
        .collect::<Result<_, _>>()?;
    if machine.vsock_cid.is_some() != vsock.is_some() {
        return Err(wrong(
            "it has no vsock device, without which nothing can be run in it",
        ));
    }
    Ok(VmConfig {
        cpus: machine.cpus,
        memory_mib: bytes >> 20,
        kernel: machine.kernel.path.clone().into(),
        cmdline: machine.cmdline.clone(),
        drives,
        vsock,
        lane: machine.lane,
        console,
    })
}

/// Whether a disk is the one that the guest has seen: the pages of it that the guest keeps would be those of another.
fn check_drive(drive: &Drive) -> Result<(), SnapshotError> {
    let path = Path::new(&drive.path);
    let differs = |what: String| SnapshotError::OtherDrive {
        path: path.to_owned(),
        what,
    };
    let (bytes, mtime_ns) =
        identity(path).map_err(|error| differs(format!("is gone ({error})")))?;
    if bytes != drive.bytes {
        let was = drive.bytes;
        return Err(differs(format!("has {bytes} bytes instead of {was}")));
    }
    if mtime_ns != drive.mtime_ns {
        return Err(differs("was written to".to_owned()));
    }
    Ok(())
}

/// What this host's processor is.
pub fn cpu() -> CpuFingerprint {
    let leaf0 = __cpuid(0);
    let vendor = [leaf0.ebx, leaf0.edx, leaf0.ecx]
        .map(u32::to_le_bytes)
        .concat();
    let version = __cpuid(1).eax;
    let (family, model) = ((version >> 8) & 0xf, (version >> 4) & 0xf);
    let (more_family, more_model) = ((version >> 20) & 0xff, (version >> 16) & 0xf);
    // Intel SDM volume 2, CPUID: the extended fields count for the families that need them.
    let family = if family == 0xf {
        family + more_family
    } else {
        family
    };
    let model = if family == 6 || family >= 0xf {
        model | more_model << 4
    } else {
        model
    };
    CpuFingerprint {
        vendor: String::from_utf8_lossy(&vendor).into_owned(),
        model: format!("family {family} model {model} stepping {}", version & 0xf),
        features: features(),
    }
}

/// Bits that are a property of a moment or of one core, not of the processor: OSXSAVE (leaf 1, ECX), and leaf 1's EBX altogether.
const OSXSAVE: u32 = 1 << 27;

fn features() -> Vec<String> {
    let mut words = Vec::new();
    let mut add = |leaf: u32, subleaf: u32, register: &str, value: u32| {
        words.push(format!("{leaf:08x}.{subleaf}.{register}={value:08x}"));
    };
    let highest = __cpuid(0).eax;
    let leaf1 = __cpuid(1);
    add(1, 0, "ecx", leaf1.ecx & !OSXSAVE);
    add(1, 0, "edx", leaf1.edx);
    if highest >= 7 {
        let leaf7 = __cpuid_count(7, 0);
        add(7, 0, "ebx", leaf7.ebx);
        add(7, 0, "ecx", leaf7.ecx);
        add(7, 0, "edx", leaf7.edx);
    }
    if __cpuid(0x8000_0000).eax >= 0x8000_0001 {
        let extended = __cpuid(0x8000_0001);
        add(0x8000_0001, 0, "ecx", extended.ecx);
        add(0x8000_0001, 0, "edx", extended.edx);
    }
    words.sort();
    words
}

/// Whether a guest that ran on `saved` can go on here. The processor that it has seen is compared leaf by leaf later; this says in
/// few words why that would fail.
pub fn check_cpu(saved: &CpuFingerprint, here: &CpuFingerprint) -> Result<(), SnapshotError> {
    let refuse = |what: String| Err(SnapshotError::OtherCpu { what });
    if saved.vendor != here.vendor {
        return refuse(format!("{} instead of {}", saved.vendor, here.vendor));
    }
    let lacking = saved.features.iter().find_map(|word| {
        let (name, bits) = word.split_once('=')?;
        let bits = u32::from_str_radix(bits, 16).ok()?;
        let found = here
            .features
            .iter()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let found = found
            .and_then(|bits| u32::from_str_radix(bits, 16).ok())
            .unwrap_or(0);
        (bits & !found != 0).then(|| format!("bits {:08x} of {name}", bits & !found))
    });
    match lacking {
        None => Ok(()),
        Some(what) => refuse(format!(
            "this one ({}) lacks CPUID {what}, that one ({}) had them",
            here.model, saved.model
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(path: &Path) -> VmConfig {
        VmConfig {
            cpus: 2,
            memory_mib: 128,
            kernel: "vmlinux".into(),
            cmdline: "quiet".to_owned(),
            drives: vec![DriveConfig {
                path: path.to_owned(),
                read_only: true,
                interface: DriveInterface::Pmem,
            }],
            vsock: Some(VsockConfig {
                cid: 3,
                socket: "vsock".into(),
            }),
            lane: true,
            console: ConsoleConfig::Kept,
        }
    }

    #[test]
    fn a_description_makes_the_same_machine() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let config = machine(image.path());
        let description = describe(&config, &Disks::new()).unwrap();
        let again = super::config(&description, config.vsock.clone(), ConsoleConfig::Kept).unwrap();
        assert_eq!(format!("{config:?}"), format!("{again:?}"));
    }

    #[test]
    fn a_disk_that_changed_is_refused() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let config = machine(image.path());
        let description = describe(&config, &Disks::new()).unwrap();
        let again = || {
            let vsock = config.vsock.clone();
            super::config(&description, vsock, ConsoleConfig::Kept)
                .unwrap_err()
                .to_string()
        };
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9);
        image.as_file().set_modified(later).unwrap();
        assert!(again().contains("was written to"), "{}", again());
        image.as_file().set_len(8192).unwrap();
        assert!(
            again().contains("has 8192 bytes instead of 4096"),
            "{}",
            again()
        );
        drop(image);
        assert!(again().contains("is gone"), "{}", again());
    }

    #[test]
    fn the_file_of_a_disk_that_is_written_to_is_not_needed_again() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096 + 700).unwrap();
        let disk = Disk::of_file(image.reopen().unwrap(), image.path(), false);
        // The number of another drive is not its own.
        let disks = Disks::from([(1, Arc::new(disk.unwrap()))]);
        let mut config = machine(image.path());
        config.drives.push(DriveConfig {
            path: "/somewhere/else".into(),
            read_only: false,
            interface: DriveInterface::Block,
        });
        let description = describe(&config, &disks).unwrap();
        let drive = &description.drives[1];
        assert_eq!((drive.bytes, drive.mtime_ns), (4096 + 512, 0));
        let again = super::config(&description, config.vsock.clone(), ConsoleConfig::Kept).unwrap();
        assert_eq!(format!("{config:?}"), format!("{again:?}"));
    }

    #[test]
    fn another_processor_is_refused_by_what_it_lacks() {
        let here = cpu();
        check_cpu(&here, &here).unwrap();
        let more = CpuFingerprint {
            features: vec!["00000001.0.ecx=ffffffff".to_owned()],
            ..here.clone()
        };
        let error = check_cpu(&more, &here).unwrap_err().to_string();
        assert!(error.contains("lacks CPUID bits"), "{error}");
        check_cpu(
            &here,
            &CpuFingerprint {
                features: vec!["x".to_owned()],
                ..here.clone()
            },
        )
        .unwrap_err();
        let other = CpuFingerprint {
            vendor: "Other".to_owned(),
            ..here.clone()
        };
        let error = check_cpu(&other, &here).unwrap_err().to_string();
        assert!(error.contains("Other instead of"), "{error}");
    }
}
