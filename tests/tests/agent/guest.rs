//! The guest that all cases share, and ways to ask it things.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use tempfile::TempDir;
use vmm::agent::{AGENT_PORT, Agent, Ended, ExecRequest, ExitStatus, Stdin, Stdio};

struct Guest {
    monitor: Mutex<Child>,
    runtime: TempDir,
    socket: PathBuf,
}

static GUEST: OnceLock<Result<Guest, String>> = OnceLock::new();

fn boot() -> Result<Guest, Failed> {
    let runtime = tempfile::tempdir()?;
    let monitor = tests::vmm_command()
        // The end of its time is for the case that this test is killed.
        .args([
            "run",
            "--memory",
            "512",
            "--timeout",
            "2400",
            "--",
            "sleep",
            "100000",
        ])
        .env("XDG_RUNTIME_DIR", runtime.path())
        .spawn()?;
    let mut guest = Guest {
        monitor: Mutex::new(monitor),
        socket: PathBuf::new(),
        runtime,
    };
    for _ in 0..1200 {
        let sandboxes = std::fs::read_dir(guest.runtime.path().join("bough"));
        let mut sandboxes = sandboxes.into_iter().flatten().flatten();
        if let Some(socket) = sandboxes
            .next()
            .map(|entry| entry.path().join("vsock.sock"))
            && Agent::connect(&socket, AGENT_PORT, None).is_ok()
        {
            guest.socket = socket;
            return Ok(guest);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err("the agent does not answer on the socket".into())
}

/// The monitor's socket of the guest, which is booted by whoever asks first.
pub fn socket() -> Result<&'static Path, Failed> {
    match GUEST.get_or_init(|| boot().map_err(|error| format!("{error:?}"))) {
        Ok(guest) => Ok(&guest.socket),
        Err(error) => Err(error.into()),
    }
}

/// Ends the guest, if there is one.
pub fn end() {
    if let Some(Ok(guest)) = GUEST.get() {
        let mut monitor = guest.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = Command::new("kill").arg(monitor.id().to_string()).status();
        let _ = monitor.wait();
        // A static is not dropped.
        let _ = std::fs::remove_dir_all(guest.runtime.path());
    }
}

/// What a case may take of a loaded host.
const PATIENCE: Duration = Duration::from_secs(170);

/// A connection of one's own.
pub fn connect() -> Result<Agent, Failed> {
    let agent = Agent::connect(socket()?, AGENT_PORT, None)?;
    renew_patience(&agent);
    Ok(agent)
}

/// For a case of many steps.
pub fn renew_patience(agent: &Agent) {
    agent.set_deadline(Some(Instant::now() + PATIENCE));
}

/// A line of shell.
pub fn shell(line: &str) -> ExecRequest {
    ExecRequest {
        argv: ["sh", "-c", line]
            .map(|word| word.as_bytes().to_vec())
            .to_vec(),
        ..ExecRequest::default()
    }
}

/// Runs a program to its end; gives its output, errors included, and how it ended.
pub fn run(agent: &Agent, request: ExecRequest) -> Result<(String, Ended), Failed> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let ended = agent.start(request)?.communicate(Stdio {
        stdin: Stdin::Null,
        stdout: &mut stdout,
        stderr: &mut stderr,
    })?;
    stdout.extend(stderr);
    Ok((String::from_utf8_lossy(&stdout).into_owned(), ended))
}

/// What a line of shell, run by root, prints; it must succeed.
pub fn ask(agent: &Agent, line: &str) -> Result<String, Failed> {
    let request = ExecRequest {
        user: "root".into(),
        ..shell(line)
    };
    let (output, ended) = run(agent, request)?;
    if ended.status == ExitStatus::Code(0) {
        Ok(output)
    } else {
        Err(format!("{line}: {ended:?} {output}").into())
    }
}

/// Whether each byte that the guest's kernel copies takes an emulator a microsecond.
pub fn is_slow() -> bool {
    vmm::host::KvmKind::detect() == vmm::host::KvmKind::Software
}

/// Fails with `what` unless it holds.
pub fn expect(holds: bool, what: impl std::fmt::Debug) -> Result<(), Failed> {
    if holds {
        Ok(())
    } else {
        Err(format!("{what:?}").into())
    }
}

/// Waits until `holds` says so; says how long it took from `start` until it was asked for the last time.
pub fn wait_until(
    start: Instant,
    mut holds: impl FnMut() -> Result<bool, Failed>,
) -> Result<Duration, Failed> {
    loop {
        let asked = start.elapsed();
        if holds()? {
            return Ok(asked);
        }
        if asked > Duration::from_secs(60) {
            return Err("waited in vain".into());
        }
    }
}
