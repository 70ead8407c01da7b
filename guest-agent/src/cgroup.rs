//! A control group per program, so that all of it can be counted, bounded and killed, wherever
//! its processes have gone.
//!
//! A group without limits costs little: no controller is enabled for it. The first program that
//! has limits enables them, below a group of its own. Where there is no control group file
//! system (an agent that is not PID 1, a kernel without it), programs do without.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use guest_agent::proto::{ErrorCode, Limits};
use nix::libc::O_DIRECTORY;
use rustix::io::Errno;
use rustix::process::Pid;

use crate::failure::Failure;

/// The file with what a group has used.
const USAGE: &str = "cpu.stat";

const ROOT: &str = "/sys/fs/cgroup";

/// Above those that have limits.
const LIMITED: &str = "/sys/fs/cgroup/limited";

/// The period in which a share of processor time is counted, in microseconds.
const CPU_PERIOD: u64 = 100_000;

/// Makes control groups.
pub struct Cgroups {
    available: bool,
    limits_enabled: bool,
    count: u64,
}

/// The control group of a program.
pub struct Cgroup {
    path: PathBuf,
    directory: File,
    has_memory_limit: bool,
    /// What it has used, where that was opened ahead.
    usage: Option<File>,
}

/// What a group has used.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in user mode, in microseconds.
    pub user_us: u64,
    /// Processor time in the kernel, in microseconds.
    pub system_us: u64,
}

impl Cgroups {
    /// Control groups for PID 1, which has mounted them if it could; for anybody else none.
    pub fn new(is_init: bool) -> Self {
        Self {
            available: is_init,
            limits_enabled: false,
            count: 0,
        }
    }

    /// Whether programs can have limits.
    pub fn are_available(&self) -> bool {
        self.available
    }

    /// A fresh group, or `None` where there are none and no limits are asked for.
    ///
    /// # Errors
    /// Limits are asked for and cannot be had, or the group cannot be made.
    pub fn create(&mut self, limits: Option<&Limits>) -> Result<Option<Cgroup>, Failure> {
        let limits = limits.filter(|limits| **limits != Limits::default());
        let unsupported =
            || Failure::new(ErrorCode::Unsupported, "this guest has no control groups");
        if !self.available {
            return limits.map_or(Ok(None), |_| Err(unsupported()));
        }
        let parent = if limits.is_some() {
            self.enable_limits()?;
            LIMITED
        } else {
            ROOT
        };
        self.count += 1;
        let path = Path::new(parent).join(format!("exec-{}", self.count));
        match make(path, limits) {
            Ok(cgroup) => Ok(Some(cgroup)),
            // Nothing is mounted there: programs do without from now on.
            Err(error) if self.count == 1 && limits.is_none() => {
                crate::init::warn(&format!("no control groups: {error}"));
                self.available = false;
                Ok(None)
            }
            Err(error) => Err(Failure::internal("make a control group", error)),
        }
    }

    fn enable_limits(&mut self) -> Result<(), Failure> {
        if self.limits_enabled {
            return Ok(());
        }
        let enable = |group: &str| {
            let file = Path::new(group).join("cgroup.subtree_control");
            put(&file, "+memory +pids +cpu")
        };
        let result = enable(ROOT)
            .and_then(|()| match std::fs::create_dir(LIMITED) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
                _ => Ok(()),
            })
            .and_then(|()| enable(LIMITED));
        result.map_err(|error| {
            let message = format!("the controllers for limits cannot be enabled: {error}");
            Failure::new(ErrorCode::Unsupported, message)
        })?;
        self.limits_enabled = true;
        Ok(())
    }
}

fn put(file: &Path, value: &str) -> std::io::Result<()> {
    // Not `std::fs::write`: these files are neither created nor truncated.
    let mut file = OpenOptions::new().write(true).open(file)?;
    file.write_all(value.as_bytes())
}

fn make(path: PathBuf, limits: Option<&Limits>) -> std::io::Result<Cgroup> {
    DirBuilder::new().create(&path)?;
    let open = || {
        if let Some(limits) = limits {
            for (file, value) in settings(limits) {
                put(&path.join(file), &value)?;
            }
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(O_DIRECTORY).open(&path)
    };
    match open() {
        Ok(directory) => Ok(Cgroup {
            has_memory_limit: limits.is_some_and(|limits| limits.memory_bytes > 0),
            directory,
            path,
            usage: None,
        }),
        Err(error) => {
            // It is empty, so this does not fail.
            let _ = std::fs::remove_dir(&path);
            Err(error)
        }
    }
}

/// The files of a group to write, and what to write.
fn settings(limits: &Limits) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    if limits.memory_bytes > 0 {
        settings.push(("memory.max", limits.memory_bytes.to_string()));
        settings.push(("memory.oom.group", "1".into()));
    }
    if limits.processes > 0 {
        settings.push(("pids.max", limits.processes.to_string()));
    }
    if limits.cpu_millis > 0 {
        // The kernel takes no quota below a millisecond.
        let quota = u64::from(limits.cpu_millis.max(10)) * CPU_PERIOD / 1000;
        settings.push(("cpu.max", format!("{quota} {CPU_PERIOD}")));
    }
    settings
}

/// The value of `name` in a file of lines "name value".
fn value(text: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(key, _)| *key == name);
    found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

impl Cgroup {
    /// What a process is started into.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Takes a process in that runs already.
    ///
    /// # Errors
    /// The process is gone, or the group takes no more.
    pub fn adopt(&self, pid: Pid) -> std::io::Result<()> {
        put(&self.path.join("cgroup.procs"), &pid.to_string())
    }

    /// Kills every process in it.
    pub fn kill(&self) {
        // Without the file (before Linux 5.14) the process group has been killed all the same.
        let _ = put(&self.path.join("cgroup.kill"), "1");
    }

    fn read(&self, name: &str) -> String {
        let mut text = String::new();
        let file = File::open(self.path.join(name));
        let _ = file.and_then(|file| file.take(4096).read_to_string(&mut text));
        text
    }

    /// Opens ahead what [`Self::usage`] reads: to open and close it is most of that for an emulated kernel.
    pub fn open_usage(&mut self) {
        self.usage = File::open(self.path.join(USAGE)).ok();
    }

    /// What its processes have used, also those that nobody waited for.
    pub fn usage(&self) -> Usage {
        let text = match &self.usage {
            // The kernel gives all of it at once.
            Some(file) => {
                let mut room = [0; 1024];
                let count = file.read_at(&mut room, 0).unwrap_or(0);
                String::from_utf8_lossy(&room[..count]).into_owned()
            }
            None => self.read(USAGE),
        };
        Usage {
            user_us: value(&text, "user_usec"),
            system_us: value(&text, "system_usec"),
        }
    }

    /// With a limit on memory: the most that was used, and whether something was killed for it.
    pub fn memory(&self) -> Option<(u64, bool)> {
        if !self.has_memory_limit {
            return None;
        }
        let peak = self.read("memory.peak").trim().parse().unwrap_or(0);
        let killed = value(&self.read("memory.events"), "oom_kill") > 0;
        Some((peak, killed))
    }

    /// Removes it; says whether it is gone. It is not as long as a process is left.
    pub fn remove(&self) -> bool {
        let result = rustix::fs::rmdir(&self.path);
        !matches!(result, Err(Errno::BUSY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_settings() {
        assert!(settings(&Limits::default()).is_empty());
        let limits = Limits {
            memory_bytes: 1 << 20,
            cpu_millis: 1,
            processes: 7,
        };
        let settings = settings(&limits);
        assert!(settings.contains(&("memory.max", "1048576".into())));
        assert!(settings.contains(&("pids.max", "7".into())));
        assert!(settings.contains(&("cpu.max", "1000 100000".into())));
    }

    #[test]
    fn values_are_found() {
        let text = "usage_usec 7\nuser_usec 12\nsystem_usec x\n";
        assert_eq!(value(text, "user_usec"), 12);
        assert_eq!(value(text, "system_usec"), 0);
        assert_eq!(value(text, "usec"), 0);
    }

    #[test]
    fn an_ordinary_process_has_none() {
        let mut groups = Cgroups::new(false);
        assert!(groups.create(None).unwrap().is_none());
        let limits = Limits {
            processes: 1,
            ..Limits::default()
        };
        let failure = groups.create(Some(&limits)).err().unwrap();
        assert_eq!(failure.code, ErrorCode::Unsupported);
    }
}
