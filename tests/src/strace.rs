//! Faults injected into a running process by strace(1): the n-th call of a kind fails, or meets a signal.
//!
//! Each thread counts its calls from when it is traced; what it starts is traced too, and counts from its start.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use libtest_mimic::Failed;
use rustix::process::{Pid, Signal, kill_process};

use crate::sandboxes::process_state;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// It fails: the disk is full.
    Full,
    /// It fails: the disk is broken.
    Io,
    /// The process is killed as it makes it.
    Kill,
    /// The process is stopped as it makes it.
    Stop,
}

/// The `nth` call of a kind, counted from 1, and what happens to it.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The system call.
    pub call: &'static str,
    /// Which.
    pub nth: usize,
    /// What happens.
    pub what: What,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            What::Full => "error=ENOSPC",
            What::Io => "error=EIO",
            What::Kill => "signal=KILL",
            What::Stop => "signal=STOP",
        };
        write!(f, "{}:{what}:when={}", self.call, self.nth)
    }
}

/// Whether strace is there and may be used on a process of ours that is not its child.
pub fn works() -> bool {
    let Ok(mut victim) = Command::new("sleep").arg("60").spawn() else {
        return false;
    };
    let attached = Tracer::attach(victim.id().into(), &["nanosleep"], &[]);
    let works = attached.is_ok_and(|tracer| tracer.detach().is_ok());
    let _ = victim.kill();
    let _ = victim.wait();
    works
}

/// A process that is traced.
pub struct Tracer {
    strace: Child,
    traced: u64,
    _stderr: BufReader<ChildStderr>,
    log: tempfile::TempPath,
}

impl Tracer {
    /// Traces `calls` of the process and of all that it starts, and injects `faults`. The process is traced when this returns.
    pub fn attach(pid: u64, calls: &[&str], faults: &[Fault]) -> Result<Self, Failed> {
        let log = tempfile::NamedTempFile::new()?.into_temp_path();
        let mut command = Command::new("strace");
        command.args(["-f", "-s", "0", "-p", &pid.to_string(), "-o"]);
        command.arg(&log);
        let mut traced = calls.to_vec();
        traced.extend(faults.iter().map(|fault| fault.call));
        command.args(["-e", &format!("trace={}", traced.join(","))]);
        for fault in faults {
            command.args(["-e", &format!("inject={fault}")]);
        }
        let mut strace = command.stderr(Stdio::piped()).spawn()?;
        let mut stderr = BufReader::new(strace.stderr.take().ok_or("no standard error")?);
        let mut line = String::new();
        stderr.read_line(&mut line)?;
        let tracer = Self {
            strace,
            traced: pid,
            _stderr: stderr,
            log,
        };
        if line.contains("attached") {
            return Ok(tracer);
        }
        Err(line.into())
    }

    /// What was traced until now.
    pub fn log(&self) -> Result<String, Failed> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// Lets the process go, or finds it gone. Returns what was traced.
    pub fn detach(mut self) -> Result<String, Failed> {
        self.end();
        self.log()
    }

    fn end(&mut self) {
        // It ends by itself with the last process that it traces. Told to end while that one dies, it may wait for it for ever.
        let alive = |pid| process_state(pid).is_some_and(|state| !"ZX".contains(state));
        if alive(self.traced) || !self.has_ended() {
            for signal in [Signal::TERM, Signal::KILL] {
                let pid = i32::try_from(self.strace.id()).ok().and_then(Pid::from_raw);
                if let Some(pid) = pid
                    && matches!(self.strace.try_wait(), Ok(None))
                {
                    let _ = kill_process(pid, signal);
                }
                if self.has_ended() {
                    break;
                }
            }
        }
        let _ = self.strace.wait();
    }

    /// Whether it ends within a few seconds.
    fn has_ended(&mut self) -> bool {
        for _ in 0..500 {
            if !matches!(self.strace.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.end();
    }
}
