//! What the flags and the file of `--config` say of a VM, put together: the only place that knows which of them counts, and
//! what counts where neither says anything.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::CliError;
use super::vm_args::{DriveArg, ImageAs, VmArgs};
use crate::agent::{EnvVar, WarmRequest};
use crate::config::{DriveConfig, DriveInterface};
use crate::config_file::VmFile;
use crate::sandbox::budget::Budget;
use crate::snapshot::restore::Saved;
use crate::warm::WarmRuntime;

/// Guest memory where nobody says how much, in MiB.
const MEMORY_MIB: u64 = 128;

/// A VM as its user wants it. What is still open is where the kernel and the image are, if nobody named them.
#[derive(Debug, Clone, PartialEq)]
pub struct VmSpec {
    /// The sandbox's name, if the file has one.
    pub name: Option<String>,
    /// The user's own words.
    pub labels: BTreeMap<String, String>,
    /// What its tree may have together.
    pub budget: Budget,
    /// How many children its guest may have made that are alive.
    pub guest_branch: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Guest memory, in MiB.
    pub memory: u64,
    /// The kernel that was named.
    pub kernel: Option<PathBuf>,
    /// The image that was named.
    pub image: Option<PathBuf>,
    /// What the image is to the guest.
    pub image_interface: DriveInterface,
    /// The disks besides the image.
    pub extra_drives: Vec<DriveArg>,
    /// Words to add to the kernel's command line.
    pub cmdline: String,
    /// Whether its agent may use the lane.
    pub lane: bool,
    /// How long the VM may live.
    pub timeout: Option<Duration>,
    /// Variables of every program's environment.
    pub env: Vec<EnvVar>,
    /// The directory of the guest to run programs in.
    pub cwd: Option<String>,
    /// Who runs them.
    pub user: Option<String>,
    /// The interpreter that stands ready for them.
    pub warm: Option<WarmRuntime>,
}

impl VmSpec {
    /// What is left to say of a machine that goes on: how programs are run in it.
    pub fn of_saved(saved: &Saved) -> Self {
        let programs = &saved.programs;
        let env = programs.env.iter().map(|(name, value)| EnvVar {
            name: name.clone(),
            value: value.clone().into_bytes(),
        });
        Self {
            name: None,
            labels: BTreeMap::new(),
            budget: Budget::default(),
            guest_branch: 0,
            cpus: saved.machine.cpus,
            memory: 0,
            kernel: None,
            image: None,
            image_interface: DriveInterface::Pmem,
            extra_drives: Vec::new(),
            cmdline: String::new(),
            lane: false,
            timeout: None,
            env: env.collect(),
            cwd: programs.cwd.clone(),
            user: programs.user.clone(),
            warm: saved.warm.as_ref().and_then(|warm| warm.try_into().ok()),
        }
    }

    /// The interpreter that is to stand ready, as the agent is asked for it.
    pub fn interpreter(&self) -> Option<WarmRequest> {
        let runtime = self.warm.as_ref()?;
        Some(WarmRequest {
            language: runtime.language.into(),
            modules: runtime.modules.clone(),
            env: self.env.clone(),
            user: self.user.clone().unwrap_or_default(),
        })
    }

    /// The guest's disks: the image, if there is one, then the others.
    pub fn drives(&self, image: Option<PathBuf>) -> Vec<DriveConfig> {
        let image = image.map(|path| DriveConfig {
            path,
            read_only: true,
            interface: self.image_interface,
        });
        let others = self.extra_drives.iter().map(|drive| DriveConfig {
            path: drive.path.clone(),
            read_only: drive.read_only,
            interface: DriveInterface::Block,
        });
        image.into_iter().chain(others).collect()
    }
}

impl VmArgs {
    /// Reads the file of `--config`, if there is one, and puts it under the flags.
    pub fn resolve(&self) -> Result<VmSpec, CliError> {
        let file = match &self.config {
            Some(path) => {
                VmFile::read(path).map_err(|error| CliError::BadInput(error.to_string()))?
            }
            None => VmFile::default(),
        };
        Ok(self.over(file))
    }

    /// The flags over `file`. A flag that was given counts; drives are added, but one of the same path takes its place.
    fn over(&self, file: VmFile) -> VmSpec {
        let kernel = self.kernel.clone().or(file.kernel);
        let image_interface = match (self.image_as, file.image_as) {
            (Some(ImageAs::Pmem), _) => DriveInterface::Pmem,
            (Some(ImageAs::Block), _) => DriveInterface::Block,
            (None, Some(interface)) => interface,
            // A kernel that somebody else built may have no driver for persistent memory.
            (None, None) if kernel.is_some() => DriveInterface::Block,
            (None, None) => DriveInterface::Pmem,
        };
        let in_file = file.drives.into_iter().map(|drive| DriveArg {
            path: drive.path,
            read_only: drive.read_only,
        });
        let mut extra_drives: Vec<DriveArg> = in_file.collect();
        let count = extra_drives.len();
        for drive in &self.drive {
            let (from_file, _) = extra_drives.split_at_mut(count);
            match from_file.iter_mut().find(|other| other.path == drive.path) {
                Some(other) => *other = drive.clone(),
                None => extra_drives.push(drive.clone()),
            }
        }
        let env = file.agent.env.into_iter().map(|(name, value)| EnvVar {
            name,
            value: value.into_bytes(),
        });
        VmSpec {
            name: file.name,
            labels: file.labels,
            budget: Budget {
                memory_mib: file.tree_memory,
                sandboxes: file.tree_sandboxes,
                drive_backup_mib: file.drive_backup,
            },
            guest_branch: file.guest_branch.unwrap_or(0),
            cpus: self.cpus.or(file.cpus).unwrap_or(1),
            memory: self.memory.or(file.memory).unwrap_or(MEMORY_MIB),
            kernel,
            image: self.image.clone().or(file.image),
            image_interface,
            extra_drives,
            cmdline: self.cmdline.clone().or(file.cmdline).unwrap_or_default(),
            lane: !self.no_lane,
            timeout: self.timeout.or(file.timeout),
            env: env.collect(),
            cwd: file.agent.cwd,
            user: file.agent.user,
            warm: self.warm.clone().or(file.agent.warm),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        vm: VmArgs,
    }

    fn over(flags: &[&str], text: &str) -> VmSpec {
        let flags = Flags::parse_from([&["vmm"], flags].concat());
        let file = VmFile::parse("conf/vm.toml".as_ref(), text.as_bytes()).unwrap();
        flags.vm.over(file)
    }

    const FILE: &str = r#"
        name = "build"
        cpus = 4
        memory = "1G"
        kernel = "vmlinux"
        image = "image"
        image_as = "pmem"
        cmdline = "debug"
        timeout = 60
        tree_memory = "2G"
        tree_sandboxes = 8
        drive_backup = 100
        labels.team = "ci"
        drives = [{ path = "a" }, { path = "b", read_only = true }]
        agent = { env = { A = "file", B = "file" }, cwd = "/work", warm = "python:re" }
    "#;

    #[test]
    fn what_neither_says_has_a_default() {
        let spec = over(&[], "");
        let VmSpec {
            cpus,
            memory,
            kernel,
            image,
            image_interface,
            timeout,
            ..
        } = &spec;
        assert_eq!((*cpus, *memory), (1, 128));
        assert_eq!((kernel, image, timeout), (&None, &None, &None));
        assert_eq!(*image_interface, DriveInterface::Pmem);
        assert_eq!(spec.cmdline, "");
        assert!(spec.drives(None).is_empty());
    }

    #[test]
    fn a_flag_that_is_not_given_leaves_the_file_alone() {
        let spec = over(&[], FILE);
        assert_eq!(spec.name.as_deref(), Some("build"));
        assert_eq!(spec.labels["team"], "ci");
        assert_eq!((spec.cpus, spec.memory), (4, 1024));
        assert_eq!(spec.kernel, Some("conf/vmlinux".into()));
        assert_eq!(spec.image, Some("conf/image".into()));
        assert_eq!(spec.image_interface, DriveInterface::Pmem);
        assert_eq!(spec.cmdline, "debug");
        assert_eq!(spec.timeout, Some(Duration::from_secs(60)));
        let budget = Budget {
            memory_mib: Some(2048),
            sandboxes: Some(8),
            drive_backup_mib: Some(100),
        };
        assert_eq!(spec.budget, budget);
        assert_eq!(spec.cwd.as_deref(), Some("/work"));
        assert_eq!(spec.warm, "python:re".parse().ok());
    }

    #[test]
    fn a_flag_counts_more_than_the_file() {
        let flags = [
            "--cpus=1",
            "--memory=128",
            "--kernel=k",
            "--image=i",
            "--image-as=block",
            "--cmdline=",
            "--timeout=5s",
            "--warm=python",
        ];
        let spec = over(&flags, FILE);
        assert_eq!((spec.cpus, spec.memory), (1, 128));
        assert_eq!(spec.kernel, Some("k".into()));
        assert_eq!(spec.image, Some("i".into()));
        assert_eq!(spec.image_interface, DriveInterface::Block);
        assert_eq!(spec.cmdline, "");
        assert_eq!(spec.timeout, Some(Duration::from_secs(5)));
        assert_eq!(spec.warm, "python".parse().ok());
    }

    #[test]
    fn a_kernel_of_the_users_gets_a_disk() {
        for (flags, text, interface) in [
            (&["--kernel=k"][..], "", DriveInterface::Block),
            (&[], "kernel = 'k'", DriveInterface::Block),
            (&["--kernel=k"], "image_as = 'pmem'", DriveInterface::Pmem),
        ] {
            assert_eq!(over(flags, text).image_interface, interface, "{text}");
        }
    }

    #[test]
    fn drives_are_added_unless_the_path_is_the_same() {
        let spec = over(&["--drive=c", "--drive=conf/a,ro", "--drive=d,ro"], FILE);
        let drives = spec.drives(Some("image".into()));
        let shown: Vec<_> = drives
            .iter()
            .map(|drive| (drive.path.to_str().unwrap(), drive.read_only))
            .collect();
        let expected = [
            ("image", true),
            ("conf/a", true),
            ("conf/b", true),
            ("c", false),
            ("d", true),
        ];
        assert_eq!(shown, expected);
        assert_eq!(drives[0].interface, DriveInterface::Pmem);
        assert!(
            drives[1..]
                .iter()
                .all(|drive| drive.interface == DriveInterface::Block)
        );
    }
}
