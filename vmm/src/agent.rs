//! The host's side of the agent channel: run programs in the guest.
//!
//! An [`Agent`] is one connection. Any number of threads may use it, or clones of it, at once:
//! each call is a request of its own, and they do not wait for each other.
//! The contract, and what a client may rely on, is `guest-agent/proto/agent.proto`.
//! The agent may be hostile: what it sends is bounded, and its texts are made fit
//! for a terminal before anybody sees them.

mod asks;
mod channel;
mod content;
mod files;
mod inbox;
mod link;
mod quiet;
#[cfg(test)]
mod quiet_tests;
mod stdio;
mod upper;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::frame::FrameError;
use guest_agent::proto::{
    ErrorCode, Exited, Feature, Hello, Ping, Shutdown, Stream, exited, from_agent, to_agent,
};
use guest_agent::version::{SUPPORTED, VersionRange};
use thiserror::Error;

use channel::Channel;
use link::{Event, Link, OUTPUT_WINDOW, Owner, Request};
use stdio::{Input, Sink};

pub use asks::Answerer;
pub use files::WriteOptions;
pub use link::Controller;
pub use quiet::Quiet;
pub use stdio::{Stdin, Stdio};
pub use upper::Upper;

pub use guest_agent::proto::{
    AGENT_PORT, BranchWanted, Child, EnvVar, Exec as ExecRequest, FileInfo, FileKind, InImage,
    Language, Limits, Pty, Restored as RestoredRequest, RunCode as RunCodeRequest, ShutdownMode,
    UpperEntry, UpperKind, Warm as WarmRequest, WatchEvent, WatchKind,
};
pub use guest_agent::tree::TreeError;

/// The longest answer to CONNECT, in bytes: "OK 4294967295\n".
const MAX_ANSWER: usize = 16;

/// What can go wrong between the host and the agent.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The sandbox's vsock socket cannot be connected to.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The monitor did not connect us to the port: nobody listens on it in the guest.
    #[error("the guest does not accept the connection (the answer was {answer:?})")]
    NotAccepted {
        /// The answer to CONNECT, as far as it came.
        answer: String,
    },
    /// The connection failed.
    #[error("the connection to the guest agent failed: {0}")]
    Socket(#[source] std::io::Error),
    /// The agent, or the guest as a whole, is gone.
    #[error("the guest agent closed the connection")]
    Disconnected,
    /// The deadline has passed.
    #[error("the guest agent did not answer in time")]
    TimedOut,
    /// A frame is too long, or no message.
    #[error("not the agent's protocol: {0}")]
    Frame(#[source] FrameError),
    /// The agent sent a message where it must not.
    #[error("not the agent's protocol: {what}")]
    Protocol {
        /// What was wrong with it.
        what: &'static str,
    },
    /// There is no protocol version in common.
    #[error(
        "the guest agent ({software}) speaks protocol version {agent}, this monitor {host}; \
         build the image and the monitor from the same source"
    )]
    Version {
        /// The agent's name and version.
        software: String,
        /// What the agent speaks.
        agent: VersionRange,
        /// What this side speaks.
        host: VersionRange,
    },
    /// The agent could not do what it was asked to.
    #[error("{message}")]
    Refused {
        /// Why.
        code: ErrorCode,
        /// The agent's words, without control characters.
        message: String,
    },
    /// Standard input cannot be read.
    #[error("cannot read standard input: {0}")]
    Stdin(#[source] std::io::Error),
    /// The program's output cannot be written; the program was killed.
    #[error("cannot write {stream}: {source}")]
    Output {
        /// "standard output" or "standard error".
        stream: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// What is to be sent cannot be read.
    #[error("cannot read what is to be written: {0}")]
    Source(#[source] std::io::Error),
    /// A tree of files of this host cannot be read or written.
    #[error(transparent)]
    Tree(TreeError),
}

impl AgentError {
    /// The exit status that a shell has for a program that could not be started: 127 if it was
    /// not found, 126 if it could not be executed.
    #[must_use]
    pub fn shell_status(&self) -> Option<u8> {
        match self {
            Self::Refused { code, .. } => match code {
                ErrorCode::NotFound => Some(127),
                ErrorCode::PermissionDenied | ErrorCode::NotExecutable => Some(126),
                _ => None,
            },
            _ => None,
        }
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited with this status.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl ExitStatus {
    /// The status that a shell has for it: the program's own, or 128 and the signal's number.
    #[must_use]
    pub fn shell_status(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// How a program ended, and what it used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// Whether its time (`timeout_ms`) was over.
    pub timed_out: bool,
    /// Whether a process was killed for going over the limit on memory.
    pub oom_killed: bool,
    /// Processor time in user mode, with that of all that it has started.
    pub user_time: Duration,
    /// Processor time in the kernel, likewise.
    pub system_time: Duration,
    /// The most memory that it used, in bytes.
    pub peak_memory: u64,
    /// Whether it was code that ran in a copy of an interpreter that stood ready.
    pub warm: bool,
}

/// A connection to the guest agent. A clone is another handle to the same connection, which ends
/// with the last of them.
#[derive(Clone)]
pub struct Agent {
    owner: Arc<Owner>,
    hello: Arc<Hello>,
    /// Who requests about files are done as; empty for the agent's default.
    file_user: String,
}

impl Agent {
    /// Connects to `port` in the guest by way of the sandbox's vsock socket.
    ///
    /// # Errors
    /// [`AgentError::Connect`], [`AgentError::NotAccepted`], and those of [`Self::from_stream`].
    pub fn connect(
        socket: &Path,
        port: u32,
        deadline: Option<Instant>,
    ) -> Result<Self, AgentError> {
        let stream = UnixStream::connect(socket).map_err(|source| AgentError::Connect {
            path: socket.to_owned(),
            source,
        })?;
        let mut channel = Channel::new(stream, deadline)?;
        channel.send_raw(format!("CONNECT {port}\n").as_bytes());
        let answer = match channel.receive_line(MAX_ANSWER) {
            Err(AgentError::Disconnected) => String::new(),
            answer => answer?,
        };
        if !answer.starts_with("OK ") {
            return Err(AgentError::NotAccepted { answer });
        }
        Self::greet(channel)
    }

    /// Takes the connection that the agent has opened to the host's port [`AGENT_PORT`].
    ///
    /// The deadline holds for the handshake and everything after it; see [`Self::set_deadline`].
    ///
    /// # Errors
    /// [`AgentError::Version`], and all that a broken or silent connection can lead to.
    pub fn from_stream(stream: UnixStream, deadline: Option<Instant>) -> Result<Self, AgentError> {
        Self::greet(Channel::new(stream, deadline)?)
    }

    fn greet(mut channel: Channel) -> Result<Self, AgentError> {
        let Some(from_agent::Kind::Hello(mut hello)) = channel.receive()?.kind else {
            let what = "it does not begin with a Hello";
            return Err(AgentError::Protocol { what });
        };
        hello.software = printable(&hello.software);
        check_version(&hello)?;
        let ours = Hello {
            min_version: SUPPORTED.min,
            max_version: SUPPORTED.max,
            software: concat!("bough-vmm ", env!("CARGO_PKG_VERSION")).into(),
            features: vec![Feature::GuestBranch.into()],
            output_window: OUTPUT_WINDOW,
            ..Hello::default()
        };
        channel.send(0, to_agent::Kind::Hello(ours))?;
        Ok(Self {
            owner: Link::start(channel, OUTPUT_WINDOW, 0)?,
            hello: Arc::new(hello),
            file_user: String::new(),
        })
    }

    /// What the agent said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The same connection, whose requests about files are done as `user`: a name, "uid" or
    /// "uid:gid". Empty for the agent's default, who has no privileges.
    #[must_use]
    pub fn as_user(&self, user: &str) -> Self {
        let file_user = user.to_owned();
        Self {
            file_user,
            ..self.clone()
        }
    }

    /// From now on, requests end with [`AgentError::TimedOut`] at this moment; `None` for never.
    /// It holds for the connection: for every handle to it.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        self.owner.0.set_deadline(deadline);
    }

    /// Asks for a sign of life, and says how long it took.
    ///
    /// # Errors
    /// All that a broken or silent connection can lead to.
    pub fn ping(&self) -> Result<Duration, AgentError> {
        let start = Instant::now();
        match Request::start(&self.owner, to_agent::Kind::Ping(Ping {}))?.end()? {
            from_agent::Kind::Pong(_) => Ok(start.elapsed()),
            _ => Err(UNEXPECTED),
        }
    }

    /// Starts a program. The request's `stdin` says whether it will read what is given to
    /// [`Running::communicate`].
    ///
    /// # Errors
    /// All that a broken or silent connection can lead to; a refusal comes later.
    pub fn start(&self, request: ExecRequest) -> Result<Running, AgentError> {
        self.running(to_agent::Kind::Exec(request))
    }

    /// Starts a piece of source code, as [`Self::start`] does a program.
    ///
    /// # Errors
    /// As [`Self::start`]; [`AgentError::Frame`] if the source is longer than a frame may be.
    pub fn start_code(&self, request: RunCodeRequest) -> Result<Running, AgentError> {
        self.running(to_agent::Kind::RunCode(request))
    }

    /// Has an interpreter stand ready; comes back when it does.
    ///
    /// # Errors
    /// [`AgentError::Refused`] if there cannot be one, with the name of a module that cannot be imported, and all that a broken
    /// or silent connection can lead to.
    pub fn warm(&self, request: WarmRequest) -> Result<(), AgentError> {
        match Request::start(&self.owner, to_agent::Kind::Warm(request))?.end()? {
            from_agent::Kind::Done(_) => Ok(()),
            _ => Err(UNEXPECTED),
        }
    }

    fn running(&self, kind: to_agent::Kind) -> Result<Running, AgentError> {
        Ok(Running {
            request: Request::start(&self.owner, kind)?,
            stdin_window: self.hello.stdin_window,
        })
    }

    /// Runs a program and waits for its end. The request's `stdin` is set from `stdio`. What it
    /// used is told by [`Self::start`] and [`Running::communicate`].
    ///
    /// # Errors
    /// [`AgentError::Refused`] if it could not be started, [`AgentError::Output`] if a sink failed
    /// (the program was killed), and all that a broken or silent connection can lead to.
    pub fn exec(&self, request: ExecRequest, stdio: Stdio) -> Result<ExitStatus, AgentError> {
        let stdin = !matches!(stdio.stdin, Stdin::Null);
        let running = self.start(ExecRequest { stdin, ..request })?;
        Ok(running.communicate(stdio)?.status)
    }

    /// Runs a piece of source code and waits for its end. The request's `stdin` is set from `stdio`.
    ///
    /// # Errors
    /// As [`Self::exec`]; [`AgentError::Frame`] if the source is longer than a frame may be.
    pub fn run_code(
        &self,
        request: RunCodeRequest,
        stdio: Stdio,
    ) -> Result<ExitStatus, AgentError> {
        let stdin = !matches!(stdio.stdin, Stdin::Null);
        let running = self.start_code(RunCodeRequest { stdin, ..request })?;
        Ok(running.communicate(stdio)?.status)
    }

    /// Asks the guest to end, and comes back when it has begun to. Processes get `grace`
    /// (milliseconds are what counts; none for the agent's default) between SIGTERM and SIGKILL.
    ///
    /// # Errors
    /// All that a broken or silent connection can lead to.
    pub fn shutdown(&self, mode: ShutdownMode, grace: Duration) -> Result<(), AgentError> {
        let shutdown = Shutdown {
            mode: mode.into(),
            grace_ms: grace.as_millis().try_into().unwrap_or(u32::MAX),
        };
        match Request::start(&self.owner, to_agent::Kind::Shutdown(shutdown))?.end()? {
            from_agent::Kind::ShuttingDown(_) => Ok(()),
            _ => Err(UNEXPECTED),
        }
    }
}

/// Refuses an agent that speaks no version of the protocol that we do.
fn check_version(hello: &Hello) -> Result<(), AgentError> {
    let agent = VersionRange::from(hello);
    if SUPPORTED.common(agent).is_some() {
        return Ok(());
    }
    Err(AgentError::Version {
        software: hello.software.clone(),
        agent,
        host: SUPPORTED,
    })
}

/// A program that was asked for. If this is dropped before the program's end, the program is
/// killed, with every process that it has started.
pub struct Running {
    request: Request,
    stdin_window: u32,
}

impl Running {
    /// What steers it while [`Self::communicate`] waits.
    #[must_use]
    pub fn controller(&self) -> Controller {
        self.request.controller()
    }

    /// Waits until it runs, and says its process id in the guest. To be asked once.
    ///
    /// # Errors
    /// [`AgentError::Refused`] if it could not be started, and those of the connection.
    pub fn pid(&mut self) -> Result<u32, AgentError> {
        match self.request.next()? {
            Event::Started(pid) => Ok(pid),
            _ => Err(UNEXPECTED),
        }
    }

    /// Moves its data until it ends.
    ///
    /// # Errors
    /// As [`Agent::exec`].
    pub fn communicate(mut self, stdio: Stdio) -> Result<Ended, AgentError> {
        let mut input = Input::new(stdio.stdin, self.stdin_window);
        let mut stdout = Sink::new(stdio.stdout, Stream::Stdout, "standard output");
        let mut stderr = Sink::new(stdio.stderr, Stream::Stderr, "standard error");
        let mut failure = None;
        loop {
            while let Some(event) = self.request.take()? {
                let result = match event {
                    Event::Data(Stream::Stderr, data) => stderr.take(&data, &self.request),
                    Event::Data(_, data) => stdout.take(&data, &self.request),
                    Event::Credit(credit) => {
                        input.credit = input.credit.saturating_add(credit);
                        Ok(())
                    }
                    Event::Started(_) => Ok(()),
                    Event::End(from_agent::Kind::Exited(exited)) => {
                        let ended = ended(&exited)?;
                        return failure.map_or(Ok(ended), Err);
                    }
                    Event::End(_) => return Err(UNEXPECTED),
                };
                if let Err(error) = result {
                    // The program has lost its reader: it ends, and is waited for.
                    if failure.is_none() {
                        self.controller().cancel()?;
                        failure = Some(error);
                    }
                }
            }
            input.send_bytes(&self.request)?;
            if self.request.wait(input.ready_to_read())? {
                input.read(&self.request)?;
            }
        }
    }
}

fn ended(exited: &Exited) -> Result<Ended, AgentError> {
    Ok(Ended {
        status: exit_status(exited.status)?,
        timed_out: exited.timed_out,
        oom_killed: exited.oom_killed,
        user_time: Duration::from_micros(exited.user_us),
        system_time: Duration::from_micros(exited.system_us),
        peak_memory: exited.peak_memory_bytes,
        warm: exited.warm,
    })
}

const UNEXPECTED: AgentError = AgentError::Protocol {
    what: "a reply of the wrong kind",
};

fn exit_status(status: Option<exited::Status>) -> Result<ExitStatus, AgentError> {
    let what = "an exit status out of range";
    let small = |number: u32| u8::try_from(number).map_err(|_| AgentError::Protocol { what });
    match status {
        Some(exited::Status::Code(code)) => Ok(ExitStatus::Code(small(code)?)),
        Some(exited::Status::Signal(signal)) => Ok(ExitStatus::Signal(small(signal)?)),
        None => Err(AgentError::Protocol { what }),
    }
}

/// A text of the guest's, fit to be shown on a terminal: short, and without control characters.
fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(1024).map(shown).collect()
}
