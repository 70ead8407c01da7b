//! Sandboxes that live on, in directories of a test's own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{Output, Vmm, installed};

/// A runtime directory and a data directory of its own, in which the installed kernel and image are.
pub struct Host(tempfile::TempDir);

impl Host {
    /// One with nothing else in it.
    pub fn new() -> Result<Self, Failed> {
        let host = Self(tempfile::tempdir()?);
        fs::create_dir_all(host.data())?;
        for name in ["vmlinux", "image"] {
            symlink(installed(name), host.data().join(name))?;
        }
        Ok(host)
    }

    /// Where sandboxes are, below `bough`, and room for a test's files.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where kernel, image and snapshots are.
    pub fn data(&self) -> PathBuf {
        self.path().join("share/bough")
    }

    /// A call of `vmm` on it.
    pub fn vmm(&self, arguments: &[&str]) -> Vmm {
        Vmm::new(arguments)
            .env("XDG_RUNTIME_DIR", self.path())
            .env("XDG_DATA_HOME", self.path().join("share"))
    }

    /// Runs `vmm` to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<Output, Failed> {
        self.vmm(arguments).run()
    }

    /// Runs it and expects success.
    pub fn ok(&self, arguments: &[&str]) -> Result<Output, Failed> {
        let output = self.run(arguments)?;
        output.expect_status(0)?;
        Ok(output)
    }

    /// Runs it and expects one line that says why not.
    pub fn refused(&self, arguments: &[&str], parts: &[&str]) -> Result<(), Failed> {
        let output = self.run(arguments)?;
        output
            .expect_status(2)?
            .expect_one_line()?
            .expect_stderr(parts)?;
        Ok(())
    }

    /// Fails unless `ls` shows these names and states, in this order.
    pub fn expect_ls(&self, expected: &[(&str, &str)]) -> Result<(), Failed> {
        let listed: Value = serde_json::from_str(&self.ok(&["ls", "--json"])?.stdout)?;
        let shown: Vec<_> = listed
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| {
                let text = |key: &str| one[key].as_str().unwrap_or_default();
                (text("name"), text("state"))
            })
            .collect();
        if shown == expected {
            return Ok(());
        }
        Err(format!("ls shows {shown:?}, not {expected:?}").into())
    }

    /// What `vmm inspect` prints.
    pub fn inspect(&self, name: &str) -> Result<Value, Failed> {
        Ok(serde_json::from_str(&self.ok(&["inspect", name])?.stdout)?)
    }

    /// A sandbox's directory.
    pub fn dir(&self, name: &str) -> Result<PathBuf, Failed> {
        let inspected = self.inspect(name)?;
        Ok(inspected["dir"].as_str().ok_or("no dir")?.into())
    }

    /// A sandbox's monitor.
    pub fn pid(&self, name: &str) -> Result<u64, Failed> {
        Ok(self.inspect(name)?["pid"].as_u64().ok_or("no pid")?)
    }

    /// A request to a sandbox's API, and the answer's status and body.
    pub fn curl(&self, name: &str, method: &str, path: &str) -> Result<(u16, Value), Failed> {
        let socket = self.dir(name)?.join("api.sock");
        let output = Command::new("curl")
            .args(["--silent", "--max-time", "60", "--request", method])
            .args(["--write-out", "\n%{http_code}", "--unix-socket"])
            .arg(socket)
            .arg(format!("http://sandbox{path}"))
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let (body, status) = text.rsplit_once('\n').ok_or("curl said nothing")?;
        Ok((status.parse()?, serde_json::from_str(body)?))
    }
}

/// Nothing of a failed test lives on.
impl Drop for Host {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.0.path().join("bough"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let record = fs::read(entry.path().join("sandbox.json")).unwrap_or_default();
            let record: Value = serde_json::from_slice(&record).unwrap_or_default();
            if let (Some(pid), false) = (
                record["pid"].as_u64(),
                entry.path().join("exit.json").exists(),
            ) {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            }
        }
    }
}

/// A process that has ended and that nobody has waited for counts as gone.
pub fn is_alive(pid: u64) -> bool {
    process_state(pid).is_some_and(|state| state != 'Z')
}

/// Sends a signal to a process.
pub fn signal(pid: u64, signal: Signal) -> Result<(), Failed> {
    let pid = Pid::from_raw(i32::try_from(pid)?).ok_or("no process")?;
    Ok(kill_process(pid, signal)?)
}

/// The letter of a process's state (proc(5)); none where there is no such process.
pub fn process_state(pid: u64) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// How long a process has had a processor, its threads together, in ticks of mostly 10 ms (proc(5), `utime` and `stime`).
pub fn processor_time(pid: u64) -> Result<u64, Failed> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
    Ok(ticks.sum::<Result<_, _>>()?)
}

/// Waits until it is so; fails when that takes too long.
pub fn wait_for(condition: impl Fn() -> Result<bool, Failed>) -> Result<(), Failed> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition()? {
        if Instant::now() > deadline {
            return Err("it did not come to that within 60 s".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
