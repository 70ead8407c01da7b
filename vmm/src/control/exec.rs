//! `POST /v1/exec`: runs a program, and sends what it prints as it comes, a JSON object per line.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::http::Chunks;
use super::routes::client_is_gone;
use super::types::{CodeLanguage, EndedView, ErrorBody, ErrorCode, ExecBody, ExecEvent};
use crate::agent::{
    AGENT_PORT, Agent, AgentError, Controller, Ended, EnvVar, ExecRequest, Language, Limits,
    RunCodeRequest, Running, Stdin, Stdio,
};
use crate::sandbox::SandboxPaths;
use crate::sandbox::record::Record;
use crate::timings::millis;

/// How long the guest's agent may take to answer.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
/// How often to look whether the client is still there.
const GONE_PAUSE: Duration = Duration::from_millis(100);

/// Starts what `body` asks for in the sandbox of `record`, whose agent this is.
fn start(agent: &Agent, body: &ExecBody, record: &Record) -> Result<Running, AgentError> {
    let exec = request(body, record);
    if body.code.is_empty() {
        return agent.start(exec);
    }
    let language = match body.lang {
        CodeLanguage::Python => Language::Python,
        CodeLanguage::Shell => Language::Shell,
    };
    agent.start_code(RunCodeRequest {
        language: language.into(),
        source: body.code.clone().into_bytes(),
        args: exec.argv,
        env: exec.env,
        cwd: exec.cwd,
        user: exec.user,
        stdin: exec.stdin,
        limits: exec.limits,
        timeout_ms: exec.timeout_ms,
        ..RunCodeRequest::default()
    })
}

/// Connects to the agent of the sandbox at `paths`.
pub(super) fn connect(paths: &SandboxPaths) -> Result<Agent, ErrorBody> {
    let deadline = Some(Instant::now() + CONNECT_PATIENCE);
    let agent = Agent::connect(&paths.vsock_socket(), AGENT_PORT, deadline);
    let agent = agent.map_err(|error| agent_error(&error))?;
    agent.set_deadline(None);
    Ok(agent)
}

/// Refuses what asks for nothing.
pub(super) fn check(body: &ExecBody) -> Result<(), ErrorBody> {
    if body.argv.is_empty() && body.code.is_empty() {
        let message = "argv and code are empty: give the program and its arguments, or code";
        return Err(ErrorBody::new(ErrorCode::BadBody, message));
    }
    Ok(())
}

/// What the program reads.
fn stdin(body: &ExecBody) -> Stdin<'_> {
    match &*body.stdin {
        "" => Stdin::Null,
        text => Stdin::Bytes(text.as_bytes()),
    }
}

/// How it ended, as it is told.
fn ended_view(ended: &Ended) -> EndedView {
    EndedView {
        status: ended.status.shell_status(),
        timed_out: ended.timed_out,
        oom_killed: ended.oom_killed,
        user_ms: millis(ended.user_time),
        system_ms: millis(ended.system_time),
        peak_memory_bytes: ended.peak_memory,
    }
}

fn request(body: &ExecBody, record: &Record) -> ExecRequest {
    let var = |(name, value): (&String, &String)| EnvVar {
        name: name.clone(),
        value: value.clone().into_bytes(),
    };
    let limits = Limits {
        memory_bytes: body.memory_bytes,
        cpu_millis: body.cpu_millis,
        processes: body.processes,
    };
    let cwd = match &record.cwd {
        Some(cwd) if body.cwd.is_empty() => cwd,
        _ => &body.cwd,
    };
    let user = match &record.user {
        Some(user) if body.user.is_empty() => user,
        _ => &body.user,
    };
    ExecRequest {
        argv: body
            .argv
            .iter()
            .map(|word| word.clone().into_bytes())
            .collect(),
        // The last of a name counts.
        env: record.env.iter().chain(&body.env).map(var).collect(),
        cwd: cwd.clone().into_bytes(),
        user: user.clone(),
        stdin: !body.stdin.is_empty(),
        limits: (limits != Limits::default()).then_some(limits),
        timeout_ms: body.timeout_ms,
        ..ExecRequest::default()
    }
}

/// Where both streams of output go: lines of the answer.
struct Lines<'a>(Mutex<Chunks<&'a UnixStream>>);

impl Lines<'_> {
    fn send(&self, event: &ExecEvent) -> io::Result<()> {
        let mut chunks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.write_json(event)
    }
}

/// One stream of output.
struct Sink<'a> {
    lines: &'a Lines<'a>,
    event: fn(String) -> ExecEvent,
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let event = (self.event)(BASE64_STANDARD.encode(bytes));
        self.lines.send(&event).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn agent_error(error: &AgentError) -> ErrorBody {
    ErrorBody::new(ErrorCode::Agent, error.to_string())
}

/// Carries out what was [checked](check). An error is what was refused before anything was sent.
pub(super) fn exec(
    agent: &Agent,
    record: &Record,
    body: &ExecBody,
    stream: &UnixStream,
) -> Result<(), ErrorBody> {
    let running = start(agent, body, record).map_err(|error| agent_error(&error))?;
    let _watch = Watch::start(stream, running.controller());
    // A slow reader stalls its program, for as long as it likes.
    let started = stream
        .set_write_timeout(None)
        .and_then(|()| Chunks::start(stream, "application/x-ndjson"));
    // It fails where the client is gone; the program goes with the connection.
    let Ok(chunks) = started else { return Ok(()) };
    let lines = Lines(Mutex::new(chunks));
    let sink = |event| Sink {
        lines: &lines,
        event,
    };
    let (mut stdout, mut stderr) = (sink(ExecEvent::Stdout), sink(ExecEvent::Stderr));
    let ended = running.communicate(Stdio {
        stdin: stdin(body),
        stdout: &mut stdout,
        stderr: &mut stderr,
    });
    let last = match ended {
        Ok(ended) => ExecEvent::Ended(ended_view(&ended)),
        Err(error) => ExecEvent::Error(agent_error(&error)),
    };
    if lines.send(&last).is_ok() {
        let _ = lines.0.lock().unwrap_or_else(PoisonError::into_inner).end();
    }
    Ok(())
}

/// Kills the program where its client goes away, also while nothing is printed.
struct Watch(Arc<AtomicBool>);

impl Watch {
    /// Without a thread the program ends at its next output.
    fn start(stream: &UnixStream, controller: Controller) -> Option<Self> {
        let stream = stream.try_clone().ok()?;
        let done = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&done);
        std::thread::Builder::new()
            .name("api-watch".to_owned())
            .stack_size(64 << 10)
            .spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    if client_is_gone(&stream) {
                        // A connection that is gone has ended the program as well.
                        let _ = controller.cancel();
                        return;
                    }
                    std::thread::sleep(GONE_PAUSE);
                }
            })
            .ok()?;
        Some(Self(done))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
