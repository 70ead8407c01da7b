//! What the tests of the built binaries share: finding `vmm`, running it, and saying
//! which tests this host cannot run.
//!
//! Tests that need KVM, or a guest kernel and image, are reported as ignored by name where there is none.

pub mod elf;
pub mod sandboxes;
pub mod strace;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use vmm::host::KvmKind;

/// No test waits longer than this for a process; a VM that hangs is a failure.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a test needs of its host.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: it runs everywhere.
    Nothing,
    /// `/dev/kvm`.
    Kvm,
    /// A KVM without hardware virtualization.
    SoftwareKvm,
    /// `/dev/kvm`, the guest kernel and the guest image.
    Guest,
    /// All of `Guest`, and strace, which injects faults.
    TracedGuest,
    /// Root, with mount namespaces.
    Root,
}

impl Needs {
    fn are_met(self) -> bool {
        let kvm = || vmm::kvm::open().is_ok();
        match self {
            Self::Nothing => true,
            Self::Kvm => kvm(),
            Self::SoftwareKvm => kvm() && KvmKind::detect() == KvmKind::Software,
            Self::Root => {
                let status = Command::new("unshare").args(["--mount", "true"]).status();
                status.is_ok_and(|status| status.success())
            }
            Self::TracedGuest => Self::Guest.are_met() && strace::works(),
            Self::Guest => kvm() && installed("vmlinux").exists() && installed("image").exists(),
        }
    }
}

/// A test that `needs` something of its host.
pub fn test(
    name: &str,
    needs: Needs,
    run: impl FnOnce() -> Result<(), Failed> + Send + 'static,
) -> Trial {
    Trial::test(name, run).with_ignored_flag(!needs.are_met())
}

/// Runs the tests, one VM at a time unless the user says otherwise: several would only slow each other down.
pub fn main(tests: Vec<Trial>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(1));
    libtest_mimic::run(&arguments, tests).exit_code()
}

/// A file that tools/build-kernel or tools/build-image has installed.
pub fn installed(name: &str) -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    let base = var("XDG_DATA_HOME")
        .or_else(|| Some(var("HOME")?.join(".local/share")))
        .unwrap_or_default();
    base.join("bough").join(name)
}

/// The `vmm` that was built beside this test.
pub fn vmm_path() -> PathBuf {
    let test = std::env::current_exe().unwrap_or_default();
    // target/<profile>/deps/<test>
    let profile = test
        .parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("."));
    let path = profile.join("vmm");
    assert!(
        path.exists(),
        "no {}: build it first, with cargo build",
        path.display()
    );
    path
}

/// Where the tests' `vmm` keeps guests that have booted (`XDG_CACHE_HOME`): all test programs share it, so each kind of guest boots
/// once, and nobody else has it.
pub fn cache_home() -> PathBuf {
    let vmm = vmm_path();
    // target/<profile>/vmm
    let target = vmm.ancestors().nth(2).unwrap_or(Path::new("."));
    target.join("tmp").join("cache")
}

/// The `vmm` that was built beside this test, with the tests' cache.
pub fn vmm_command() -> Command {
    let mut command = Command::new(vmm_path());
    command.env("XDG_CACHE_HOME", cache_home());
    command
}

/// A call of `vmm` that is to be run.
pub struct Vmm {
    command: Command,
    stdin: Vec<u8>,
}

/// How a call of `vmm` ended.
#[derive(Debug)]
pub struct Output {
    /// Exit status; absent if a signal killed it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Vmm {
    /// `vmm` with these arguments.
    pub fn new<I: IntoIterator<Item: AsRef<std::ffi::OsStr>>>(arguments: I) -> Self {
        let mut command = vmm_command();
        command.args(arguments);
        Self {
            command,
            stdin: Vec::new(),
        }
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What it reads on its standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Starts it, with pipes for all that it reads and writes.
    pub fn spawn(mut self) -> Result<Child, Failed> {
        self.command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(self.command.spawn()?)
    }

    /// Runs it to its end; kills it and fails when that takes too long.
    pub fn run(mut self) -> Result<Output, Failed> {
        let start = Instant::now();
        let input = std::mem::take(&mut self.stdin);
        let mut child = self.spawn()?;
        let mut stdin = child.stdin.take().ok_or("no standard input")?;
        // It may end without having read everything.
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let pid = child.id();
        let (done, finished) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(child.wait_with_output()));
        let output = finished.recv_timeout(PATIENCE).map_err(|_| {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            format!("vmm did not end within {PATIENCE:?}")
        })??;
        let _ = writer.join();
        Ok(Output {
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: start.elapsed(),
        })
    }
}

impl Output {
    /// Fails unless the exit status is `status`.
    pub fn expect_status(&self, status: i32) -> Result<&Self, Failed> {
        if self.status == Some(status) {
            return Ok(self);
        }
        Err(format!("status {:?}, not {status}: {self:#?}", self.status).into())
    }

    /// Fails unless standard error holds each of `parts`.
    pub fn expect_stderr(&self, parts: &[&str]) -> Result<&Self, Failed> {
        match parts.iter().find(|part| !self.stderr.contains(**part)) {
            Some(part) => Err(format!("standard error lacks {part:?}: {self:#?}").into()),
            None => Ok(self),
        }
    }

    /// Fails unless standard error is empty.
    pub fn expect_no_stderr(&self) -> Result<&Self, Failed> {
        if self.stderr.is_empty() {
            return Ok(self);
        }
        Err(format!("standard error is not empty: {self:#?}").into())
    }

    /// Fails unless standard output is `text`.
    pub fn expect_stdout(&self, text: &str) -> Result<&Self, Failed> {
        if self.stdout == text {
            return Ok(self);
        }
        Err(format!("standard output is not {text:?}: {self:#?}").into())
    }

    /// Fails unless standard error is a single line.
    pub fn expect_one_line(&self) -> Result<&Self, Failed> {
        if self.stderr.lines().count() == 1 {
            return Ok(self);
        }
        Err(format!("standard error is not one line: {self:#?}").into())
    }
}
