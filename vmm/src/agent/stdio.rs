//! A program's standard streams on this side: where its input comes from and its
//! output goes, and the credit of each.
//!
//! Invariant: never more input is sent than the agent gave credit for; output gives
//! its credit back once it is written, so a slow sink makes the program wait.

use std::io::Write;
use std::os::fd::BorrowedFd;

use guest_agent::proto::{MAX_DATA, StdinClose, StdinData, Stream, to_agent};
use rustix::io::Errno;

use super::AgentError;
use super::link::{OUTPUT_WINDOW, Request};

/// Where a program's standard input comes from.
#[derive(Clone, Copy, Debug)]
pub enum Stdin<'a> {
    /// Nowhere: it reads /dev/null.
    Null,
    /// These bytes.
    Bytes(&'a [u8]),
    /// A file, pipe or terminal, read as the program reads; never read ahead by more than the
    /// agent's window. It need not end for the program to end.
    Fd(BorrowedFd<'a>),
}

/// A program's standard streams. A sink that is slow makes the program wait.
pub struct Stdio<'a> {
    /// Standard input.
    pub stdin: Stdin<'a>,
    /// Where standard output goes.
    pub stdout: &'a mut dyn Write,
    /// Where standard error goes.
    pub stderr: &'a mut dyn Write,
}

/// Standard input on its way to the agent.
pub(super) struct Input<'a> {
    /// What is left of it; `Null` once its end was sent.
    source: Stdin<'a>,
    /// How many bytes the agent is ready for.
    pub credit: u32,
}

impl<'a> Input<'a> {
    pub fn new(source: Stdin<'a>, credit: u32) -> Self {
        Self { source, credit }
    }

    /// How much may be sent at once.
    fn room(&self) -> usize {
        usize::try_from(self.credit).map_or(MAX_DATA, |credit| credit.min(MAX_DATA))
    }

    /// The descriptor to wait for, if what it has could be sent.
    pub fn ready_to_read(&self) -> Option<BorrowedFd<'a>> {
        match self.source {
            Stdin::Fd(fd) if self.credit > 0 => Some(fd),
            _ => None,
        }
    }

    fn send(&mut self, data: &[u8], request: &Request) -> Result<(), AgentError> {
        // Never more than the credit: both callers ask for `room` first.
        self.credit -= u32::try_from(data.len()).unwrap_or(self.credit);
        let data = data.to_vec();
        request.send(to_agent::Kind::StdinData(StdinData { data }))
    }

    fn close(&mut self, request: &Request) -> Result<(), AgentError> {
        self.source = Stdin::Null;
        request.send(to_agent::Kind::StdinClose(StdinClose {}))
    }

    /// Sends what there is credit for, if the input lies in memory.
    pub fn send_bytes(&mut self, request: &Request) -> Result<(), AgentError> {
        while let Stdin::Bytes(bytes) = self.source {
            if bytes.is_empty() {
                self.close(request)?;
            } else if self.credit > 0 {
                let (now, later) = bytes.split_at(self.room().min(bytes.len()));
                self.send(now, request)?;
                self.source = Stdin::Bytes(later);
            } else {
                break;
            }
        }
        Ok(())
    }

    /// Reads once from a descriptor that is ready.
    pub fn read(&mut self, request: &Request) -> Result<(), AgentError> {
        let Stdin::Fd(fd) = self.source else {
            return Ok(());
        };
        let mut buffer = vec![0; self.room()];
        match rustix::io::read(fd, &mut buffer) {
            // A standard input that was closed from the start is one that has ended.
            Ok(0) | Err(Errno::BADF) => self.close(request),
            Ok(count) => self.send(buffer.get(..count).unwrap_or_default(), request),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(AgentError::Stdin(errno.into())),
        }
    }
}

/// Where an output stream goes.
pub(super) struct Sink<'a> {
    writer: &'a mut dyn Write,
    stream: Stream,
    name: &'static str,
    /// Bytes that were taken and not yet given back as credit.
    taken: u32,
    failed: bool,
}

impl<'a> Sink<'a> {
    pub fn new(writer: &'a mut dyn Write, stream: Stream, name: &'static str) -> Self {
        Self {
            writer,
            stream,
            name,
            taken: 0,
            failed: false,
        }
    }

    /// Writes output, and gives its credit back. A sink that has failed swallows the rest.
    pub fn take(&mut self, data: &[u8], request: &Request) -> Result<(), AgentError> {
        self.taken = self
            .taken
            .saturating_add(data.len().try_into().unwrap_or(u32::MAX));
        // Not for every few bytes: a credit is a message, and the other half keeps the agent going.
        if self.taken >= OUTPUT_WINDOW / 2 {
            request.give_credit(self.stream, std::mem::take(&mut self.taken))?;
        }
        if self.failed {
            return Ok(());
        }
        let written = self.writer.write_all(data);
        written
            .and_then(|()| self.writer.flush())
            .map_err(|source| {
                self.failed = true;
                AgentError::Output {
                    stream: self.name,
                    source,
                }
            })
    }
}
