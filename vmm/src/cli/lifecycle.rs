//! `vmm pause`, `resume`, `stop` and `rm`: each does the same to every sandbox that is named.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::{CliError, find_failed};
use crate::control::client::{ClientError, ask};
use crate::control::types::{StopRequest, StopView};
use crate::host;
use crate::logger::complain;
use crate::sandbox::list::{Sandbox, find};
use crate::sandbox::remove;
use crate::sizes::duration;
use crate::timings::millis;

/// How long a sandbox may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a process may take to be gone.
const GONE_PATIENCE: Duration = Duration::from_secs(10);
/// How many sandboxes at once, per processor of the host.
const AT_ONCE: usize = 4;
/// How long to wait for its end at a time.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Sandboxes.
#[derive(Debug, Args)]
pub struct Names {
    /// Names, or beginnings of ids; of several, in no particular order
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// Take the processors of sandboxes out of their guests; they keep their memory, and wait
#[derive(Debug, Args)]
pub struct PauseArgs {
    #[command(flatten)]
    names: Names,
}

/// Let sandboxes run on that were paused
#[derive(Debug, Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    names: Names,
}

/// End sandboxes: their guests are asked to, and forced after a while
#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    names: Names,
    /// How long a guest may take to end by itself
    #[arg(short, long, default_value = "10s", value_name = "TIME", value_parser = duration)]
    time: Duration,
    /// Do not ask
    #[arg(short, long, conflicts_with = "time")]
    force: bool,
    /// Remove what is left, as `vmm rm` does
    #[arg(long)]
    rm: bool,
}

/// Remove what sandboxes that have ended have left
#[derive(Debug, Args)]
pub struct RmArgs {
    #[command(flatten)]
    names: Names,
    /// Stop those that are running, by force
    #[arg(short, long)]
    force: bool,
}

impl Names {
    /// Does `act` to each, some at once: most of the time is spent waiting for processes to be gone. One failure does not stop the others; the last
    /// is the command's.
    fn each(&self, act: impl Fn(&Sandbox) -> Result<(), CliError> + Sync) -> Result<u8, CliError> {
        let mut seen = HashSet::new();
        let mut found: Vec<_> = self.names.iter().map(|name| find(name)).collect();
        // One that is named twice is dealt with once.
        found.retain(|found| {
            let id = found.as_ref().map(|found| found.record.id.clone());
            id.map_or(true, |id| seen.insert(id))
        });
        let at_once = found.len().min(host::processors() * AT_ONCE);
        let found = Mutex::new(found.into_iter().enumerate());
        let next = || found.lock().unwrap_or_else(PoisonError::into_inner).next();
        let (sender, failures) = channel();
        let work = || {
            while let Some((index, found)) = next() {
                if let Err(error) = found.map_err(find_failed).and_then(|found| act(&found)) {
                    // It is received below.
                    let _ = sender.send((index, error));
                }
            }
        };
        thread::scope(|scope| {
            let spawn = |_| Builder::new().spawn_scoped(scope, work).is_ok();
            // With fewer it takes longer.
            let _ = (1..at_once).all(spawn);
            work();
        });
        let mut failures: Vec<_> = failures.try_iter().collect();
        failures.sort_by_key(|(index, _)| *index);
        let last = failures.pop();
        for (_, earlier) in failures {
            complain(&earlier);
        }
        last.map_or(Ok(0), |(_, error)| Err(error))
    }
}

/// Refuses what has no API.
pub fn living(sandbox: &Sandbox) -> Result<(), CliError> {
    let name = &sandbox.record.name;
    if !sandbox.alive {
        return Err(CliError::BadInput(format!(
            "{name} is not running: start it again with `vmm start {name}`, or remove it with `vmm rm {name}`"
        )));
    }
    if !sandbox.record.kept {
        return Err(CliError::BadInput(format!(
            "{name} belongs to a `vmm run` (process {}), which ends it",
            sandbox.record.pid
        )));
    }
    Ok(())
}

fn post(sandbox: &Sandbox, path: &str) -> Result<(), CliError> {
    living(sandbox)?;
    let answer = ask::<Value>(&sandbox.paths.api_socket(), "POST", path, &(), PATIENCE);
    answer.map(drop).map_err(|error| failed(sandbox, &error))
}

/// What a sandbox refuses because of what was asked is bad input; all else is a failure of its monitor.
pub fn failed(sandbox: &Sandbox, error: &ClientError) -> CliError {
    let message = format!("{}: {error}", sandbox.record.name);
    match error {
        ClientError::Refused(body) if body.code.status() < 500 => CliError::BadInput(message),
        _ => CliError::Monitor(message),
    }
}

/// Carries out `vmm pause`.
pub fn pause(args: &PauseArgs) -> Result<u8, CliError> {
    args.names.each(|sandbox| post(sandbox, "/v1/pause"))
}

/// Carries out `vmm resume`.
pub fn resume(args: &ResumeArgs) -> Result<u8, CliError> {
    args.names.each(|sandbox| post(sandbox, "/v1/resume"))
}

/// Carries out `vmm stop`.
pub fn stop(args: &StopArgs) -> Result<u8, CliError> {
    let time = if args.force {
        Duration::ZERO
    } else {
        args.time
    };
    args.names.each(|sandbox| {
        if sandbox.alive || !args.rm {
            living(sandbox)?;
            end(sandbox, time)?;
        }
        if args.rm {
            remove_one(sandbox)?;
        }
        Ok(())
    })
}

/// Carries out `vmm rm`.
pub fn rm(args: &RmArgs) -> Result<u8, CliError> {
    args.names.each(|sandbox| {
        if sandbox.alive && !args.force {
            let name = &sandbox.record.name;
            return Err(CliError::BadInput(format!(
                "{name} is running: `vmm stop {name}` first, or use --force"
            )));
        }
        if sandbox.alive {
            living(sandbox)?;
            end(sandbox, Duration::ZERO)?;
        }
        remove_one(sandbox)
    })
}

fn remove_one(sandbox: &Sandbox) -> Result<(), CliError> {
    remove(sandbox).map_err(|error| CliError::Monitor(error.to_string()))
}

/// Ends a sandbox, and comes back when its process is gone. One that does not answer is killed where force was asked for.
fn end(sandbox: &Sandbox, time: Duration) -> Result<(), CliError> {
    let process = process(sandbox);
    let deadline_ms = millis(time);
    let request = StopRequest { deadline_ms };
    let patience = time.saturating_add(PATIENCE);
    let socket = sandbox.paths.api_socket();
    match ask::<StopView>(&socket, "POST", "/v1/stop", &request, patience) {
        Ok(StopView { forced }) if forced && !time.is_zero() => complain(format_args!(
            "warning: {} did not end by itself within {time:?}, and was forced to",
            sandbox.record.name
        )),
        Ok(_) => {}
        Err(_) if time.is_zero() => kill(sandbox, process.as_ref())?,
        // It may have ended meanwhile.
        Err(error) => {
            return match find(&sandbox.record.id) {
                Ok(now) if now.alive => Err(failed(sandbox, &error)),
                _ => Ok(()),
            };
        }
    }
    wait_until_gone(sandbox, process)
}

fn pid(sandbox: &Sandbox) -> Option<Pid> {
    let pid = i32::try_from(sandbox.record.pid).ok();
    pid.and_then(Pid::from_raw)
}

/// Its process, if it lives.
fn process(sandbox: &Sandbox) -> Option<OwnedFd> {
    let process = pidfd_open(pid(sandbox)?, PidfdFlags::empty()).ok()?;
    // As long as it does, the number is nobody else's.
    let lives = find(&sandbox.record.id).is_ok_and(|now| now.alive);
    lives.then_some(process)
}

/// Kills the process of a sandbox, where it still lives.
fn kill(sandbox: &Sandbox, process: Option<&OwnedFd>) -> Result<(), CliError> {
    match process.map(|process| pidfd_send_signal(process, Signal::KILL)) {
        None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
        Some(Err(_)) => Err(CliError::Monitor(format!(
            "cannot kill process {} of {}",
            sandbox.record.pid, sandbox.record.name
        ))),
    }
}

/// Waits until nothing is left of it: a process that ends lets go of its sandbox's lock before, or after, the locks of its drives, which somebody may want next.
fn wait_until_gone(sandbox: &Sandbox, process: Option<OwnedFd>) -> Result<(), CliError> {
    let deadline = Instant::now() + GONE_PATIENCE;
    while Instant::now() < deadline {
        let is_gone = process.as_ref().is_none_or(|process| {
            let mut fds = [PollFd::new(process, PollFlags::IN)];
            poll(&mut fds, Some(&LOOK)).is_ok_and(|ready| ready > 0)
        });
        match find(&sandbox.record.id) {
            Ok(now) if now.alive => thread::sleep(Duration::from_millis(5)),
            _ if is_gone => return Ok(()),
            _ => {}
        }
    }
    Err(CliError::Monitor(format!(
        "process {} of {} is still there; look at it, or kill -9 it",
        sandbox.record.pid, sandbox.record.name
    )))
}
