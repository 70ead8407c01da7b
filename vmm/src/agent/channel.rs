//! The beginning of a connection, by one thread with a deadline: the monitor's answer and
//! the Hellos. What the guest sends is hostile; at most one frame and one read of it are held.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use guest_agent::frame::{self, FrameBuffer};
use guest_agent::proto::{FromAgent, MAX_DATA, ToAgent, to_agent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::AgentError;

/// Frames to and from the agent.
pub struct Channel {
    socket: UnixStream,
    frames: FrameBuffer,
    out: Vec<u8>,
    scratch: Vec<u8>,
    /// When to give up; `None` for never.
    deadline: Option<Instant>,
}

impl Channel {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// [`AgentError::Socket`] if it cannot be made non-blocking.
    pub fn new(socket: UnixStream, deadline: Option<Instant>) -> Result<Self, AgentError> {
        socket.set_nonblocking(true).map_err(AgentError::Socket)?;
        Ok(Self {
            socket,
            frames: FrameBuffer::default(),
            out: Vec::new(),
            scratch: vec![0; MAX_DATA],
            deadline,
        })
    }

    /// Queues a message; it goes out whenever the channel waits.
    ///
    /// # Errors
    /// [`AgentError::Frame`] if it is longer than a frame may be.
    pub fn send(&mut self, request_id: u32, kind: to_agent::Kind) -> Result<(), AgentError> {
        let message = ToAgent {
            request_id,
            kind: Some(kind),
        };
        frame::encode(&message, &mut self.out).map_err(AgentError::Frame)
    }

    /// Queues bytes that are no frame.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// A message that has come already.
    ///
    /// # Errors
    /// [`AgentError::Frame`] if what came is no message.
    fn received(&mut self) -> Result<Option<FromAgent>, AgentError> {
        self.frames.next_message().map_err(AgentError::Frame)
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// As [`Self::wait`] and [`Self::received`].
    pub fn receive(&mut self) -> Result<FromAgent, AgentError> {
        loop {
            if let Some(message) = self.received()? {
                return Ok(message);
            }
            self.wait()?;
        }
    }

    /// Waits for a line, and takes it without its end.
    ///
    /// # Errors
    /// As [`Self::wait`], and [`AgentError::NotAccepted`] if no line comes in `limit` bytes.
    pub fn receive_line(&mut self, limit: usize) -> Result<String, AgentError> {
        loop {
            let bytes = self.frames.input();
            if let Some(end) = bytes.iter().take(limit).position(|&byte| byte == b'\n') {
                let line = bytes.get(..end).unwrap_or_default();
                let line = String::from_utf8_lossy(line).into_owned();
                bytes.drain(..=end);
                return Ok(line);
            }
            if bytes.len() >= limit {
                let answer = String::from_utf8_lossy(bytes).into_owned();
                return Err(AgentError::NotAccepted { answer });
            }
            self.wait()?;
        }
    }

    /// Waits until something comes from the agent, sending what is queued meanwhile.
    ///
    /// # Errors
    /// [`AgentError::TimedOut`], [`AgentError::Disconnected`] and [`AgentError::Socket`].
    fn wait(&mut self) -> Result<(), AgentError> {
        self.flush()?;
        let mut interest = PollFlags::IN;
        interest.set(PollFlags::OUT, !self.out.is_empty());
        if !self.poll(interest)?.difference(PollFlags::OUT).is_empty() {
            self.read()?;
        }
        Ok(())
    }

    /// Sends all that is queued.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn flush_all(&mut self) -> Result<(), AgentError> {
        self.flush()?;
        while !self.out.is_empty() {
            self.poll(PollFlags::OUT)?;
            self.flush()?;
        }
        Ok(())
    }

    fn poll(&self, interest: PollFlags) -> Result<PollFlags, AgentError> {
        let timeout = timeout_until(self.deadline)?;
        let mut fds = [PollFd::new(&self.socket, interest)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(PollFlags::empty()),
            Err(errno) => return Err(AgentError::Socket(errno.into())),
        }
        let [socket] = fds;
        Ok(socket.revents())
    }

    /// What goes on after the handshake: the socket, what came and was not looked at, the deadline.
    pub fn into_parts(self) -> (UnixStream, FrameBuffer, Option<Instant>) {
        (self.socket, self.frames, self.deadline)
    }

    fn read(&mut self) -> Result<(), AgentError> {
        match self.socket.read(&mut self.scratch) {
            Ok(0) => Err(AgentError::Disconnected),
            Ok(count) => {
                let bytes = self.scratch.get(..count).unwrap_or_default();
                self.frames.input().extend_from_slice(bytes);
                Ok(())
            }
            Err(error) => tolerate(error),
        }
    }

    fn flush(&mut self) -> Result<(), AgentError> {
        while !self.out.is_empty() {
            match self.socket.write(&self.out) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => tolerate(error)?,
            }
        }
        Ok(())
    }
}

/// Lets pass what is no failure of the socket.
fn tolerate(error: io::Error) -> Result<(), AgentError> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, Interrupted, WouldBlock};
    match error.kind() {
        Interrupted | WouldBlock => Ok(()),
        BrokenPipe | ConnectionReset => Err(AgentError::Disconnected),
        _ => Err(AgentError::Socket(error)),
    }
}

/// How long poll(2) may wait; `None` for ever.
///
/// # Errors
/// [`AgentError::TimedOut`] if the moment has passed.
pub fn timeout_until(deadline: Option<Instant>) -> Result<Option<Timespec>, AgentError> {
    let Some(deadline) = deadline else {
        return Ok(None);
    };
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(AgentError::TimedOut);
    }
    Ok(Some(Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    }))
}
