//! A running program, or a helper that works on files: its pipes, the credit of its streams, and how
//! it ended.
//!
//! Invariants: never more is read from a pipe than there is credit for, so what is
//! not sent yet waits in the pipe; never more standard input is held than the window
//! that the client was given. A program is over when its process is reaped and both
//! its output pipes are drained.

use std::os::fd::OwnedFd;
use std::time::Instant;

use guest_agent::proto::{
    Credit, Done, Error, ErrorCode, Exited, Resize, Stderr, Stdout, Stream, exited,
    from_agent::Kind,
};
use prost::Message;
use rustix::io::{Errno, write};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::termios::tcsetwinsize;

use crate::cgroup::Cgroup;
use crate::epoll::Watched;
use crate::failure::Failure;
use crate::loan::{self, Loan};
use crate::output::Output;
use crate::runners::SourceFile;
use crate::source::Source;
use crate::spawn::{Spawned, window};
use crate::sys::Ended;
use crate::warm::{Copy, Start, Tidings};

/// The credit in bytes that each standard input starts with: what a pipe holds.
pub const STDIN_WINDOW: u32 = 64 * 1024;

/// The credit that a helper gives besides, once content comes: so that more is on its way while it writes.
const HELPER_EXTRA: u32 = 64 * 1024;
const _: () = assert!((STDIN_WINDOW + HELPER_EXTRA) as usize == loan::WINDOW);

/// The most that a helper may say of its failure.
const MAX_REPORT: usize = 8 * 1024;

/// What a terminal takes for the end of its input: Ctrl-D.
const END_OF_FILE: u8 = 4;

/// The standard input's pipe.
struct Sink {
    /// `None` once it is closed, by either side.
    pipe: Option<OwnedFd>,
    /// What the pipe did not take yet.
    waiting: Waiting,
    /// The credit that the client has or had at most.
    window: u32,
    /// Whether the client has said that no more comes.
    closing: bool,
}

/// Bytes on their way to a pipe.
enum Waiting {
    /// For a program, which may keep what a pipe refers to.
    Copied(Vec<u8>),
    /// For a helper.
    Lent(Loan),
}

impl Waiting {
    fn len(&self) -> usize {
        match self {
            Self::Copied(bytes) => bytes.len(),
            Self::Lent(loan) => loan.len(),
        }
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn push(&mut self, data: &[u8]) {
        match self {
            Self::Copied(bytes) => bytes.extend_from_slice(data),
            Self::Lent(loan) => loan.push(data),
        }
    }

    /// Gives the pipe what it takes; says how much that was.
    fn give(&mut self, pipe: &OwnedFd) -> Result<usize, Errno> {
        match self {
            Self::Copied(bytes) => {
                let taken = write(pipe, bytes)?;
                bytes.drain(..taken);
                Ok(taken)
            }
            Self::Lent(loan) => loan.lend(pipe),
        }
    }

    /// Forgets all; says how much that was.
    fn clear(&mut self) -> usize {
        match self {
            Self::Copied(bytes) => std::mem::take(bytes).len(),
            Self::Lent(loan) => loan.clear(),
        }
    }
}

/// What runs.
enum Role {
    /// A program that a client has asked for.
    Program,
    /// A copy of the agent that works on files. What it says on its standard error is an `Error`.
    Helper { report: Vec<u8>, cancelled: bool },
}

/// A running program.
pub struct Program {
    /// The request that started it.
    pub request_id: u32,
    pid: Pid,
    stdin: Sink,
    stdout: Source,
    stderr: Source,
    is_terminal: bool,
    role: Role,
    exited: Option<Exited>,
    /// When its time is over.
    deadline: Option<Instant>,
    timed_out: bool,
    /// Its control group, until that is taken to be removed.
    pub cgroup: Option<Cgroup>,
    /// Its source, which is removed when this is dropped.
    pub source_file: Option<SourceFile>,
    /// Its way into a copy of an interpreter, until it runs.
    pub start: Option<Box<Start>>,
    /// The copy that runs it, as long as that has something to say.
    copy: Option<Copy>,
    /// Whether it was to run in one.
    warm: bool,
    /// Signals that wait until the copy is the program.
    early: Vec<Signal>,
    /// Why it cannot run, where that is known only now.
    failure: Option<Failure>,
}

impl Program {
    /// A program that was just started. Each of its output streams has `window` bytes of credit.
    pub fn new(
        request_id: u32,
        spawned: Spawned,
        window: u32,
        cgroup: Option<Cgroup>,
        source_file: Option<SourceFile>,
    ) -> Self {
        Self {
            request_id,
            pid: spawned.pid,
            stdin: Sink {
                pipe: spawned.stdin,
                waiting: Waiting::Copied(Vec::new()),
                window: STDIN_WINDOW,
                closing: false,
            },
            stdout: Source::new(Some(spawned.stdout), window, spawned.is_terminal),
            stderr: Source::new(spawned.stderr, window, false),
            is_terminal: spawned.is_terminal,
            role: Role::Program,
            exited: None,
            deadline: None,
            timed_out: false,
            cgroup,
            source_file,
            start: None,
            copy: None,
            warm: false,
            early: Vec::new(),
            failure: None,
        }
    }

    /// The same, on its way into a copy of an interpreter that stands ready.
    pub fn through(self, start: Box<Start>) -> Self {
        Self {
            start: Some(start),
            warm: true,
            ..self
        }
    }

    /// It runs as process `pid`: in a copy, or if that has failed in a fresh interpreter.
    pub fn begin(&mut self, pid: Pid) {
        self.pid = pid;
        if let Some(start) = self.start.take() {
            self.warm = !start.has_failed();
            if self.warm {
                self.copy = Some(start.into_copy());
            }
            if !self.warm || self.early.contains(&Signal::KILL) {
                self.send_early();
            }
        }
    }

    /// The copy of an interpreter that may have something to say.
    pub fn copy(&self) -> Option<&Watched> {
        match (&self.start, &self.copy) {
            (Some(start), _) => Some(start.socket()),
            (None, copy) => copy.as_ref().map(Copy::socket),
        }
    }

    /// Hears whether the copy that runs it says that it is over.
    pub fn hear(&mut self) {
        match self.copy.as_ref().map(|copy| copy.hear(self.pid)) {
            None | Some(Tidings::None) => {}
            Some(Tidings::Last) => {
                // It runs another program by now, if it has not ended.
                self.copy = None;
                self.send_early();
            }
            Some(Tidings::Failed(failure)) => {
                self.failure = Some(failure);
                self.end(Exited::default());
            }
            Some(Tidings::Ended(ended)) => self.reaped(&ended),
        }
    }

    /// Whether it runs in a copy of an interpreter, or is on its way into one.
    pub fn is_warm(&self) -> bool {
        self.warm
    }

    /// A helper that was just started.
    pub fn helper(request_id: u32, spawned: Spawned, window: u32) -> Self {
        let role = Role::Helper {
            report: Vec::new(),
            cancelled: false,
        };
        let mut helper = Self::new(request_id, spawned, window, None, None);
        helper.role = role;
        helper.stdin.waiting = Waiting::Lent(Loan::default());
        helper
    }

    /// Whether it is a helper, which is of no use without its client.
    pub fn is_helper(&self) -> bool {
        matches!(self.role, Role::Helper { .. })
    }

    /// Its client is lost: it goes on, its output is thrown away, and its input stays open without more to come.
    pub fn orphan(&mut self) {
        self.stdout.discard();
        self.stderr.discard();
    }

    /// Ends it at this moment.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// When something is to be done about it: it is to be ended, or sent a signal that came too early.
    pub fn deadline(&self) -> Option<Instant> {
        let give_up = self.start.as_ref().and_then(|start| start.give_up);
        let settled = self.settled_at().filter(|_| !self.early.is_empty());
        [self.deadline, give_up, settled]
            .into_iter()
            .flatten()
            .min()
            .filter(|_| self.exited.is_none() && !self.timed_out)
    }

    /// When a copy is surely its program.
    fn settled_at(&self) -> Option<Instant> {
        self.copy.as_ref().map(Copy::settled_at)
    }

    /// Does what its time has come for.
    pub fn check_deadline(&mut self, now: Instant) {
        if self.exited.is_some() || self.timed_out {
            return;
        }
        let is_over = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_over(self.settled_at()) {
            self.send_early();
        }
        if is_over(self.deadline) {
            self.timed_out = true;
            self.kill();
        } else if let Some(start) = self.start.as_mut().filter(|start| is_over(start.give_up)) {
            start.give_up();
        }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it is this process, and not one that got its number after it.
    pub fn is_process(&self, pid: Pid) -> bool {
        let own = match &self.start {
            Some(start) => start.pid(),
            None => Some(self.pid),
        };
        own == Some(pid) && self.exited.is_none()
    }

    /// The pipe of a stream, if it is worth waiting for: a source with credit, a sink with bytes for it.
    pub fn waits_for(&self, stream: Stream) -> Option<&OwnedFd> {
        match stream {
            Stream::Stdin => self
                .stdin
                .pipe
                .as_ref()
                .filter(|_| !self.stdin.waiting.is_empty()),
            Stream::Stdout => self.stdout.waiting(),
            Stream::Stderr => self.stderr.waiting(),
            Stream::Unspecified => None,
        }
    }

    /// Moves what a ready pipe has, or takes. `scratch` has room for `MAX_DATA` bytes.
    pub fn move_data(&mut self, stream: Stream, scratch: &mut [u8], output: &mut Output) {
        let id = self.request_id;
        if stream != Stream::Stdin {
            self.send_early();
        }
        match stream {
            Stream::Stdin => self.feed(output),
            Stream::Stdout => self.stdout.pump(scratch, |data| {
                output.push(id, Kind::Stdout(Stdout { data }));
            }),
            Stream::Stderr => match &mut self.role {
                Role::Program => self.stderr.pump(scratch, |data| {
                    output.push(id, Kind::Stderr(Stderr { data }));
                }),
                Role::Helper { report, .. } => self.stderr.pump(scratch, |data| {
                    let room = MAX_REPORT.saturating_sub(report.len());
                    report.extend(data.into_iter().take(room));
                }),
            },
            Stream::Unspecified => {}
        }
    }

    /// Moves what a terminal still holds after the end of its program: it may not become ready again.
    pub fn drain(&mut self, scratch: &mut [u8], output: &mut Output) {
        while self.stdout.is_draining() && !output.is_full() {
            self.move_data(Stream::Stdout, scratch, output);
        }
    }

    /// More bytes for standard input.
    ///
    /// # Errors
    /// The client sent more than it had credit for.
    pub fn stdin_data(&mut self, data: &[u8], output: &mut Output) -> Result<(), Failure> {
        let window = usize::try_from(self.stdin.window).unwrap_or(usize::MAX);
        if self.stdin.waiting.len().saturating_add(data.len()) > window {
            return Err(Failure::new(
                ErrorCode::CreditExceeded,
                format!(
                    "standard input of request {}: over its credit",
                    self.request_id
                ),
            ));
        }
        if self.stdin.closing {
            return Ok(());
        }
        self.stdin.waiting.push(data);
        self.feed(output);
        Ok(())
    }

    /// No more bytes for standard input.
    pub fn stdin_close(&mut self) {
        if self.is_terminal && !self.stdin.closing {
            // A terminal stays open, or the program would be hung up on.
            self.stdin.waiting.push(&[END_OF_FILE]);
        }
        self.stdin.closing = true;
        if self.stdin.waiting.is_empty() {
            self.stdin.pipe = None;
        }
    }

    /// Writes what the pipe takes, and gives that much credit back.
    fn feed(&mut self, output: &mut Output) {
        let sink = &mut self.stdin;
        let taken = match &sink.pipe {
            None => sink.waiting.clear(),
            Some(pipe) => match sink.waiting.give(pipe) {
                Ok(taken) => taken,
                Err(Errno::AGAIN | Errno::INTR) => 0,
                // The program reads no more: as with any pipe, what is on the way is lost.
                Err(_) => {
                    sink.pipe = None;
                    sink.waiting.clear()
                }
            },
        };
        if sink.waiting.is_empty() && sink.closing {
            sink.pipe = None;
        }
        if taken > 0 {
            let mut bytes = u32::try_from(taken).unwrap_or(u32::MAX);
            if matches!(self.role, Role::Helper { .. }) && sink.window == STDIN_WINDOW {
                sink.window += HELPER_EXTRA;
                bytes = bytes.saturating_add(HELPER_EXTRA);
            }
            let credit = Credit {
                stream: Stream::Stdin.into(),
                bytes,
            };
            output.push(self.request_id, Kind::Credit(credit));
        }
    }

    /// The client is ready for more of a stream.
    pub fn credit(&mut self, stream: Stream, bytes: u32) {
        match stream {
            Stream::Stdout => self.stdout.add_credit(bytes),
            Stream::Stderr => self.stderr.add_credit(bytes),
            Stream::Stdin | Stream::Unspecified => {}
        }
    }

    /// The client's terminal has another size. The kernel tells the program (SIGWINCH).
    pub fn resize(&self, resize: Resize) {
        if let (true, Some(terminal)) = (self.is_terminal, self.stdout.pipe()) {
            let _ = tcsetwinsize(terminal, window(resize.rows, resize.columns));
        }
    }

    /// Sends a signal to the process group, unless its leader is gone: then its number may be
    /// another's by now. One that comes while a copy of an interpreter becomes the program waits for that.
    pub fn signal(&mut self, signal: Signal) {
        let is_settling =
            signal != Signal::KILL && self.settled_at().is_some_and(|at| at > Instant::now());
        if self.start.is_some() || is_settling {
            if !self.early.contains(&signal) {
                self.early.push(signal);
            }
        } else if self.exited.is_none() && matches!(self.role, Role::Program) {
            // The group may be gone already, though not reaped: then there is nobody to tell.
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// Sends the signals that waited: it is the program, or will not be.
    fn send_early(&mut self) {
        if let Some(copy) = &mut self.copy {
            copy.settle();
        }
        for signal in std::mem::take(&mut self.early) {
            self.signal(signal);
        }
    }

    /// Ends it, with every process that it has started and that can be found.
    pub fn kill(&mut self) {
        match &mut self.role {
            Role::Program => {
                self.signal(Signal::KILL);
                if let Some(cgroup) = &self.cgroup {
                    cgroup.kill();
                }
                if let Some(mut start) = self.start.take() {
                    // It has not begun, so this is its end.
                    start.give_up();
                    self.end(Exited {
                        status: Some(exited::Status::Signal(Signal::KILL.as_raw().unsigned_abs())),
                        timed_out: self.timed_out,
                        ..Exited::default()
                    });
                }
            }
            Role::Helper { cancelled, .. } => {
                *cancelled = true;
                if self.exited.is_none() {
                    // One that writes a file takes this as the word to clean up. It finds it
                    // before it finds the end of its input: that is closed later.
                    let _ = kill_process(self.pid, Signal::TERM);
                }
            }
        }
    }

    /// The process has ended. What its pipes hold at this moment is still sent.
    pub fn reaped(&mut self, ended: &Ended) {
        let mut exited = Exited {
            status: Some(ended.status),
            timed_out: self.timed_out,
            oom_killed: false,
            user_us: ended.user_us,
            system_us: ended.system_us,
            peak_memory_bytes: ended.peak_bytes,
            warm: self.warm,
        };
        if let Some(cgroup) = &self.cgroup {
            let usage = cgroup.usage();
            if self.warm {
                // The process has worked before it was this program's, in another group.
                (exited.user_us, exited.system_us) = (0, 0);
            }
            exited.user_us = usage.user_us.max(exited.user_us);
            exited.system_us = usage.system_us.max(exited.system_us);
            if let Some((peak, killed)) = cgroup.memory() {
                exited.peak_memory_bytes = peak;
                exited.oom_killed = killed;
            }
        }
        self.end(exited);
    }

    fn end(&mut self, exited: Exited) {
        self.exited = Some(exited);
        self.copy = None;
        self.stdin.pipe = None;
        self.stdout.end();
        self.stderr.end();
    }

    /// How the request ended, once there is no more to send of it.
    pub fn over(&self) -> Option<Kind> {
        let drained = self.stdout.pipe().is_none() && self.stderr.pipe().is_none();
        let exited = self.exited.filter(|_| drained)?;
        if let Some(failure) = &self.failure {
            return Some(Kind::Error(failure.clone().into()));
        }
        let Role::Helper { report, cancelled } = &self.role else {
            return Some(Kind::Exited(exited));
        };
        Some(match exited.status {
            Some(exited::Status::Code(0)) => Kind::Done(Done {}),
            _ if *cancelled => {
                Kind::Error(Failure::new(ErrorCode::Cancelled, "the request was cancelled").into())
            }
            status => Kind::Error(match Error::decode(report.as_slice()) {
                Ok(error) if !error.message.is_empty() => error,
                _ => Failure::internal("the agent's helper", format!("it ended with {status:?}"))
                    .into(),
            }),
        })
    }
}
