//! The host's side of the agent channel: run programs in the guest.
//!
//! An [`Agent`] is one connection, on which this side runs one request at a time.
//! The contract, and what a client may rely on, is `guest-agent/proto/agent.proto`.
//! The agent may be hostile: what it sends is bounded, and its texts are made fit
//! for a terminal before anybody sees them.

mod channel;
mod stdio;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guest_agent::frame::FrameError;
use guest_agent::proto::{
    DEFAULT_OUTPUT_WINDOW, ErrorCode, FromAgent, Hello, Ping, Shutdown, Stream, exited, from_agent,
    to_agent,
};
use guest_agent::version::{SUPPORTED, VersionRange};
use thiserror::Error;

use channel::Channel;
use stdio::{Input, Sink};

pub use stdio::{Stdin, Stdio};

pub use guest_agent::proto::{
    AGENT_PORT, EnvVar, Exec as ExecRequest, Language, RunCode as RunCodeRequest, ShutdownMode,
};

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

/// A connection to the guest agent.
pub struct Agent {
    channel: Channel,
    hello: Hello,
    last_id: u32,
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
        let agent = VersionRange::from(&hello);
        if SUPPORTED.common(agent).is_none() {
            return Err(AgentError::Version {
                software: hello.software,
                agent,
                host: SUPPORTED,
            });
        }
        let ours = Hello {
            min_version: SUPPORTED.min,
            max_version: SUPPORTED.max,
            software: concat!("bough-vmm ", env!("CARGO_PKG_VERSION")).into(),
            output_window: DEFAULT_OUTPUT_WINDOW,
            ..Hello::default()
        };
        channel.send(0, to_agent::Kind::Hello(ours))?;
        Ok(Self {
            channel,
            hello,
            last_id: 0,
        })
    }

    /// What the agent said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// From now on, requests end with [`AgentError::TimedOut`] at this moment; `None` for never.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.channel.deadline = deadline;
    }

    /// Asks for a sign of life, and says how long it took.
    ///
    /// # Errors
    /// All that a broken or silent connection can lead to.
    pub fn ping(&mut self) -> Result<Duration, AgentError> {
        let start = Instant::now();
        let id = self.request(to_agent::Kind::Ping(Ping {}))?;
        match self.reply(id)? {
            from_agent::Kind::Pong(_) => Ok(start.elapsed()),
            _ => Err(UNEXPECTED),
        }
    }

    /// Runs a program and waits for its end. The request's `stdin` is set from `stdio`.
    ///
    /// # Errors
    /// [`AgentError::Refused`] if it could not be started, [`AgentError::Output`] if a sink failed
    /// (the program was killed), and all that a broken or silent connection can lead to.
    pub fn exec(&mut self, request: ExecRequest, stdio: Stdio) -> Result<ExitStatus, AgentError> {
        let stdin = !matches!(stdio.stdin, Stdin::Null);
        let request = ExecRequest { stdin, ..request };
        let id = self.request(to_agent::Kind::Exec(request))?;
        self.follow(id, stdio)
    }

    /// Runs a piece of source code and waits for its end. The request's `stdin` is set from `stdio`.
    ///
    /// # Errors
    /// As [`Self::exec`]; [`AgentError::Frame`] if the source is longer than a frame may be.
    pub fn run_code(
        &mut self,
        request: RunCodeRequest,
        stdio: Stdio,
    ) -> Result<ExitStatus, AgentError> {
        let stdin = !matches!(stdio.stdin, Stdin::Null);
        let request = RunCodeRequest { stdin, ..request };
        let id = self.request(to_agent::Kind::RunCode(request))?;
        self.follow(id, stdio)
    }

    /// Asks the guest to end, and comes back when it has begun to. Processes get `grace`
    /// (milliseconds are what counts; none for the agent's default) between SIGTERM and SIGKILL.
    ///
    /// # Errors
    /// All that a broken or silent connection can lead to.
    pub fn shutdown(&mut self, mode: ShutdownMode, grace: Duration) -> Result<(), AgentError> {
        let shutdown = Shutdown {
            mode: mode.into(),
            grace_ms: grace.as_millis().try_into().unwrap_or(u32::MAX),
        };
        let id = self.request(to_agent::Kind::Shutdown(shutdown))?;
        match self.reply(id)? {
            from_agent::Kind::ShuttingDown(_) => Ok(()),
            _ => Err(UNEXPECTED),
        }
    }

    fn request(&mut self, kind: to_agent::Kind) -> Result<u32, AgentError> {
        // No request lasts until the numbers come round again: they run one at a time.
        self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        self.channel.send(self.last_id, kind)?;
        Ok(self.last_id)
    }

    fn reply(&mut self, id: u32) -> Result<from_agent::Kind, AgentError> {
        loop {
            let message = self.channel.receive()?;
            if let Some(kind) = concerning(id, message)? {
                return Ok(kind);
            }
        }
    }

    /// Moves a program's data until it ends.
    fn follow(&mut self, id: u32, stdio: Stdio) -> Result<ExitStatus, AgentError> {
        let mut input = Input::new(stdio.stdin, self.hello.stdin_window);
        let mut stdout = Sink::new(stdio.stdout, Stream::Stdout, "standard output");
        let mut stderr = Sink::new(stdio.stderr, Stream::Stderr, "standard error");
        let mut failure = None;
        loop {
            while let Some(message) = self.channel.received()? {
                let result = match concerning(id, message)? {
                    Some(from_agent::Kind::Stdout(out)) => {
                        stdout.take(&out.data, id, &mut self.channel)
                    }
                    Some(from_agent::Kind::Stderr(out)) => {
                        stderr.take(&out.data, id, &mut self.channel)
                    }
                    Some(from_agent::Kind::Credit(credit)) => {
                        input.credit = input.credit.saturating_add(credit.bytes);
                        Ok(())
                    }
                    Some(from_agent::Kind::Exited(exited)) => {
                        let status = exit_status(exited.status)?;
                        return failure.map_or(Ok(status), Err);
                    }
                    Some(from_agent::Kind::Started(_)) | None => Ok(()),
                    Some(_) => return Err(UNEXPECTED),
                };
                if let Err(error) = result {
                    // The program has lost its reader: it ends, and is waited for.
                    if failure.is_none() {
                        let cancel = guest_agent::proto::Cancel {};
                        self.channel.send(id, to_agent::Kind::Cancel(cancel))?;
                        failure = Some(error);
                    }
                }
            }
            input.send_bytes(id, &mut self.channel)?;
            let source = input.ready_to_read().filter(|_| self.channel.may_send());
            if self.channel.wait(source)? {
                input.read(id, &mut self.channel)?;
            }
        }
    }
}

const UNEXPECTED: AgentError = AgentError::Protocol {
    what: "a reply of the wrong kind",
};

/// What a message says about a request; `None` if it is about another, which has been given up.
fn concerning(id: u32, message: FromAgent) -> Result<Option<from_agent::Kind>, AgentError> {
    match message.kind {
        Some(from_agent::Kind::Error(error)) if [0, id].contains(&message.request_id) => {
            Err(AgentError::Refused {
                code: error.code(),
                message: printable(&error.message),
            })
        }
        kind if message.request_id == id => Ok(kind),
        _ => Ok(None),
    }
}

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
