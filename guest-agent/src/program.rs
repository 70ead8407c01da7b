//! A running program: its pipes, the credit of its streams, and how it ended.
//!
//! Invariants: never more is read from a pipe than there is credit for, so what is
//! not sent yet waits in the pipe; never more standard input is held than the window
//! that the client was given. A program is over when its process is reaped and both
//! its output pipes are drained.

use std::os::fd::OwnedFd;

use guest_agent::proto::{
    Credit, ErrorCode, Exited, MAX_DATA, Stderr, Stdout, Stream, exited, from_agent::Kind,
};
use rustix::io::{Errno, ioctl_fionread, read, write};
use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};

use crate::failure::Failure;
use crate::output::Output;
use crate::runners::SourceFile;
use crate::spawn::Spawned;

/// The credit in bytes that each standard input starts with: what a pipe holds.
pub const STDIN_WINDOW: u32 = 64 * 1024;

/// An output pipe.
struct Source {
    /// `None` once it is drained.
    pipe: Option<OwnedFd>,
    /// How many bytes the client is ready for.
    credit: u32,
    /// How many bytes are left to read, once the process has ended.
    left: Option<u64>,
}

/// The standard input's pipe.
struct Sink {
    /// `None` once it is closed, by either side.
    pipe: Option<OwnedFd>,
    /// What the pipe did not take yet.
    waiting: Vec<u8>,
    /// Whether the client has said that no more comes.
    closing: bool,
}

/// A running program.
pub struct Program {
    /// The request that started it.
    pub request_id: u32,
    pid: Pid,
    stdin: Sink,
    stdout: Source,
    stderr: Source,
    status: Option<exited::Status>,
    /// Held for its drop, which comes when the program is over.
    _source_file: Option<SourceFile>,
}

impl Program {
    /// A program that was just started. Each of its output streams has `window` bytes of credit.
    pub fn new(
        request_id: u32,
        spawned: Spawned,
        window: u32,
        source_file: Option<SourceFile>,
    ) -> Self {
        let source = |pipe| Source {
            pipe: Some(pipe),
            credit: window,
            left: None,
        };
        Self {
            request_id,
            pid: spawned.pid,
            stdin: Sink {
                pipe: spawned.stdin,
                waiting: Vec::new(),
                closing: false,
            },
            stdout: source(spawned.stdout),
            stderr: source(spawned.stderr),
            status: None,
            _source_file: source_file,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it is this process, and not one that got its number after it.
    pub fn is_process(&self, pid: Pid) -> bool {
        self.pid == pid && self.status.is_none()
    }

    /// The pipe of a stream, if it is worth waiting for: a source with credit, a sink with bytes for it.
    pub fn waits_for(&self, stream: Stream) -> Option<&OwnedFd> {
        match stream {
            Stream::Stdin => self
                .stdin
                .pipe
                .as_ref()
                .filter(|_| !self.stdin.waiting.is_empty()),
            Stream::Stdout => self.stdout.pipe.as_ref().filter(|_| self.stdout.credit > 0),
            Stream::Stderr => self.stderr.pipe.as_ref().filter(|_| self.stderr.credit > 0),
            Stream::Unspecified => None,
        }
    }

    /// Moves what a ready pipe has, or takes. `scratch` has room for [`MAX_DATA`] bytes.
    pub fn move_data(&mut self, stream: Stream, scratch: &mut [u8], output: &mut Output) {
        let id = self.request_id;
        match stream {
            Stream::Stdin => self.feed(output),
            Stream::Stdout => self.stdout.pump(scratch, |data| {
                output.push(id, Kind::Stdout(Stdout { data }));
            }),
            Stream::Stderr => self.stderr.pump(scratch, |data| {
                output.push(id, Kind::Stderr(Stderr { data }));
            }),
            Stream::Unspecified => {}
        }
    }

    /// More bytes for standard input.
    ///
    /// # Errors
    /// The client sent more than it had credit for.
    pub fn stdin_data(&mut self, data: &[u8], output: &mut Output) -> Result<(), Failure> {
        let window = usize::try_from(STDIN_WINDOW).unwrap_or(usize::MAX);
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
        self.stdin.waiting.extend_from_slice(data);
        self.feed(output);
        Ok(())
    }

    /// No more bytes for standard input.
    pub fn stdin_close(&mut self) {
        self.stdin.closing = true;
        if self.stdin.waiting.is_empty() {
            self.stdin.pipe = None;
        }
    }

    /// Writes what the pipe takes, and gives that much credit back.
    fn feed(&mut self, output: &mut Output) {
        let sink = &mut self.stdin;
        let taken = match &sink.pipe {
            None => sink.waiting.len(),
            Some(pipe) => match write(pipe, &sink.waiting) {
                Ok(taken) => taken,
                Err(Errno::AGAIN | Errno::INTR) => 0,
                // The program reads no more: as with any pipe, what is on the way is lost.
                Err(_) => {
                    sink.pipe = None;
                    sink.waiting.len()
                }
            },
        };
        sink.waiting.drain(..taken);
        if sink.waiting.is_empty() && sink.closing {
            sink.pipe = None;
        }
        if taken > 0 {
            let credit = Credit {
                stream: Stream::Stdin.into(),
                bytes: u32::try_from(taken).unwrap_or(u32::MAX),
            };
            output.push(self.request_id, Kind::Credit(credit));
        }
    }

    /// The client is ready for more of a stream.
    pub fn credit(&mut self, stream: Stream, bytes: u32) {
        match stream {
            Stream::Stdout => self.stdout.credit = self.stdout.credit.saturating_add(bytes),
            Stream::Stderr => self.stderr.credit = self.stderr.credit.saturating_add(bytes),
            Stream::Stdin | Stream::Unspecified => {}
        }
    }

    /// Sends a signal to the process group, unless its leader is gone: then its number may be
    /// another's by now.
    pub fn signal(&self, signal: Signal) {
        if self.status.is_none() {
            // The group may be gone already, though not reaped: then there is nobody to tell.
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// The process has ended. What its pipes hold at this moment is still sent.
    pub fn reaped(&mut self, status: WaitStatus) {
        let number = |number: i32| u32::try_from(number).unwrap_or(0);
        self.status = Some(match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => exited::Status::Code(number(code)),
            (None, signal) => exited::Status::Signal(number(signal.unwrap_or(0))),
        });
        self.stdin.pipe = None;
        self.stdout.end();
        self.stderr.end();
    }

    /// How the program ended, once there is no more to send of it.
    pub fn over(&self) -> Option<Exited> {
        let drained = self.stdout.pipe.is_none() && self.stderr.pipe.is_none();
        let status = self.status.filter(|_| drained)?;
        Some(Exited {
            status: Some(status),
        })
    }
}

impl Source {
    /// Reads once, as much as there is credit for.
    fn pump(&mut self, scratch: &mut [u8], send: impl FnOnce(Vec<u8>)) {
        let Some(pipe) = &self.pipe else { return };
        let limit = u64::from(self.credit)
            .min(self.left.unwrap_or(u64::MAX))
            .min(MAX_DATA as u64);
        let limit = usize::try_from(limit).unwrap_or(0).min(scratch.len());
        let Some(scratch) = scratch
            .get_mut(..limit)
            .filter(|scratch| !scratch.is_empty())
        else {
            return;
        };
        let data = match read(pipe, &mut *scratch) {
            Ok(count) => scratch.get(..count).unwrap_or_default(),
            Err(Errno::INTR | Errno::AGAIN) => return,
            Err(_) => &[],
        };
        if data.is_empty() {
            self.pipe = None;
            return;
        }
        // At most MAX_DATA, so neither subtraction can wrap nor the conversion fail.
        self.credit -= u32::try_from(data.len()).unwrap_or(self.credit);
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(data.len() as u64);
        }
        send(data.to_vec());
        self.close_if_drained();
    }

    /// The process has ended: what others write from now on is not ours to send.
    fn end(&mut self) {
        if let Some(pipe) = &self.pipe {
            self.left = Some(ioctl_fionread(pipe).unwrap_or(0));
            self.close_if_drained();
        }
    }

    fn close_if_drained(&mut self) {
        if self.left == Some(0) {
            self.pipe = None;
        }
    }
}
