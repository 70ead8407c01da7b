//! One connection that many requests share.
//!
//! A thread of its own reads what the agent sends and sorts it into an inbox per request; whoever
//! has a request takes from its inbox. So neither direction waits for the other, and a request
//! that is not looked after holds nobody up. What the agent sends is hostile: an inbox holds
//! no more output than the credit that was given for it.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use guest_agent::frame::{self, FrameBuffer, FrameError};
use guest_agent::proto::{
    Cancel, Credit, DEFAULT_OUTPUT_WINDOW, ErrorCode, FromAgent, MAX_DATA, Stream, ToAgent,
    from_agent, to_agent,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::channel::{Channel, timeout_until};
use super::{AgentError, UNEXPECTED, printable};

/// Why nothing more comes.
#[derive(Clone)]
enum Broken {
    Disconnected,
    Socket(i32),
    Frame(FrameError),
    Protocol(&'static str),
    Refused(ErrorCode, String),
}

impl From<Broken> for AgentError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Disconnected => Self::Disconnected,
            Broken::Socket(errno) => Self::Socket(io::Error::from_raw_os_error(errno)),
            Broken::Frame(error) => Self::Frame(error),
            Broken::Protocol(what) => Self::Protocol { what },
            Broken::Refused(code, message) => Self::Refused { code, message },
        }
    }
}

/// What has come for a request and was not taken yet.
struct Inbox {
    data: VecDeque<(Stream, Vec<u8>)>,
    /// How much output may still come, per stream.
    allowed: [u32; 2],
    credit: u32,
    started: Option<u32>,
    end: Option<from_agent::Kind>,
    wake: Arc<OwnedFd>,
}

#[derive(Default)]
struct State {
    inboxes: HashMap<u32, Inbox>,
    last_id: u32,
    broken: Option<Broken>,
}

/// The connection.
pub(super) struct Link {
    socket: UnixStream,
    /// Held while a frame is written.
    writing: Mutex<()>,
    state: Mutex<State>,
    deadline: Mutex<Option<Instant>>,
}

/// Ends the connection when the last of those who use it is gone.
pub(super) struct Owner(pub Arc<Link>);

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.0.socket.shutdown(Shutdown::Both);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change to what these hold is complete in itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn index(stream: Stream) -> usize {
    usize::from(stream == Stream::Stderr)
}

impl Link {
    /// Takes over a connection on which the Hellos have been exchanged.
    ///
    /// # Errors
    /// The Hello cannot be sent, or no thread be started.
    pub fn start(mut channel: Channel) -> Result<Arc<Owner>, AgentError> {
        channel.flush_all()?;
        let (socket, frames, deadline) = channel.into_parts();
        let link = Arc::new(Self {
            socket,
            writing: Mutex::default(),
            state: Mutex::default(),
            deadline: Mutex::new(deadline),
        });
        let owner = Arc::new(Owner(link.clone()));
        std::thread::Builder::new()
            .name("agent".into())
            .spawn(move || {
                let broken = link.read(frames);
                let mut state = lock(&link.state);
                state.broken.get_or_insert(broken);
                state.inboxes.values().for_each(Inbox::wake);
            })
            .map_err(AgentError::Socket)?;
        Ok(owner)
    }

    /// From now on, whoever waits gives up at this moment.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        *lock(&self.deadline) = deadline;
        lock(&self.state).inboxes.values().for_each(Inbox::wake);
    }

    /// Reads until the connection ends; says why.
    fn read(&self, mut frames: FrameBuffer) -> Broken {
        let mut scratch = vec![0; MAX_DATA];
        loop {
            loop {
                match frames.next_message() {
                    Ok(Some(message)) => {
                        if let Err(broken) = self.sort(message) {
                            return broken;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return Broken::Frame(error),
                }
            }
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Broken::Socket(errno.raw_os_error()),
            }
            match (&self.socket).read(&mut scratch) {
                Ok(0) => return Broken::Disconnected,
                Ok(count) => {
                    let bytes = scratch.get(..count).unwrap_or_default();
                    frames.input().extend_from_slice(bytes);
                }
                Err(error) => match broken(&error) {
                    Some(broken) => return broken,
                    None => continue,
                },
            }
        }
    }

    fn sort(&self, message: FromAgent) -> Result<(), Broken> {
        let mut state = lock(&self.state);
        let Some(kind) = message.kind else {
            return Ok(());
        };
        if message.request_id == 0 {
            return Err(match kind {
                from_agent::Kind::Error(error) => {
                    Broken::Refused(error.code(), printable(&error.message))
                }
                _ => Broken::Protocol("a message about no request"),
            });
        }
        // About a request that has been given up.
        let Some(inbox) = state.inboxes.get_mut(&message.request_id) else {
            return Ok(());
        };
        match kind {
            from_agent::Kind::Stdout(out) => inbox.take(Stream::Stdout, out.data)?,
            from_agent::Kind::Stderr(out) => inbox.take(Stream::Stderr, out.data)?,
            from_agent::Kind::Credit(credit) => {
                inbox.credit = inbox.credit.saturating_add(credit.bytes);
            }
            from_agent::Kind::Started(started) => inbox.started = Some(started.pid),
            end => drop(inbox.end.get_or_insert(end)),
        }
        inbox.wake();
        Ok(())
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`AgentError::Frame`] if it is longer than a frame may be, and those of the socket.
    pub fn send(&self, request_id: u32, kind: to_agent::Kind) -> Result<(), AgentError> {
        let message = ToAgent {
            request_id,
            kind: Some(kind),
        };
        let mut bytes = Vec::new();
        frame::encode(&message, &mut bytes).map_err(AgentError::Frame)?;
        let _writing = lock(&self.writing);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match (&self.socket).write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let deadline = *lock(&self.deadline);
                    let timeout = timeout_until(deadline);
                    // Once a frame is cut in two, nothing can follow it.
                    let cut = rest.len() < bytes.len();
                    let timeout = timeout.inspect_err(|_| {
                        if cut {
                            let _ = self.socket.shutdown(Shutdown::Both);
                        }
                    })?;
                    let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
                    match poll(&mut fds, timeout.as_ref()) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(errno) => return Err(AgentError::Socket(errno.into())),
                    }
                }
                Err(error) => {
                    if let Some(broken) = broken(&error) {
                        // The agent may have said why before it hung up.
                        let said = lock(&self.state).broken.clone();
                        return Err(said.unwrap_or(broken).into());
                    }
                }
            }
        }
        Ok(())
    }
}

/// What an error of the socket means, if it is one.
fn broken(error: &io::Error) -> Option<Broken> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, Interrupted, WouldBlock};
    match error.kind() {
        Interrupted | WouldBlock => None,
        BrokenPipe | ConnectionReset => Some(Broken::Disconnected),
        _ => Some(Broken::Socket(error.raw_os_error().unwrap_or(0))),
    }
}

impl Inbox {
    fn take(&mut self, stream: Stream, mut data: Vec<u8>) -> Result<(), Broken> {
        let too_much = Broken::Protocol("more output than there was credit for");
        let length = u32::try_from(data.len()).map_err(|_| too_much.clone())?;
        if let Some(allowed) = self.allowed.get_mut(index(stream)) {
            *allowed = allowed.checked_sub(length).ok_or(too_much)?;
        }
        match self.data.back_mut() {
            // Many small pieces cost more than their bytes.
            Some((last, bytes)) if *last == stream && bytes.len() < MAX_DATA => {
                bytes.append(&mut data);
            }
            _ => self.data.push_back((stream, data)),
        }
        Ok(())
    }

    fn wake(&self) {
        // Full is as good as written.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }
}

/// What a request is told.
pub(super) enum Event {
    /// The program runs, under this process id.
    Started(u32),
    /// Output.
    Data(Stream, Vec<u8>),
    /// So much more input may be sent.
    Credit(u32),
    /// The last that is said of it.
    End(from_agent::Kind),
}

/// A request that was made. One that is dropped before its end is cancelled.
pub(super) struct Request {
    owner: Arc<Owner>,
    id: u32,
    wake: Arc<OwnedFd>,
    over: bool,
}

impl Request {
    /// Makes a request.
    ///
    /// # Errors
    /// Those of [`Link::send`].
    pub fn start(owner: &Arc<Owner>, kind: to_agent::Kind) -> Result<Self, AgentError> {
        let link = &owner.0;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|errno| AgentError::Socket(errno.into()))?;
        let wake = Arc::new(wake);
        let inbox = Inbox {
            data: VecDeque::new(),
            allowed: [DEFAULT_OUTPUT_WINDOW; 2],
            credit: 0,
            started: None,
            end: None,
            wake: wake.clone(),
        };
        let id = {
            let mut state = lock(&link.state);
            loop {
                state.last_id = state.last_id.checked_add(1).unwrap_or(1);
                if !state.inboxes.contains_key(&state.last_id) {
                    break;
                }
            }
            let id = state.last_id;
            state.inboxes.insert(id, inbox);
            id
        };
        let mut request = Self {
            owner: owner.clone(),
            id,
            wake,
            over: false,
        };
        if let Err(error) = link.send(id, kind) {
            // There is nothing to cancel.
            request.over = true;
            return Err(error);
        }
        Ok(request)
    }

    /// Says more about it.
    ///
    /// # Errors
    /// Those of [`Link::send`].
    pub fn send(&self, kind: to_agent::Kind) -> Result<(), AgentError> {
        self.owner.0.send(self.id, kind)
    }

    /// A way to steer it from elsewhere.
    pub fn controller(&self) -> Controller {
        Controller {
            owner: self.owner.clone(),
            id: self.id,
        }
    }

    /// Lets the agent send more output.
    ///
    /// # Errors
    /// Those of [`Link::send`].
    pub fn give_credit(&self, stream: Stream, bytes: u32) -> Result<(), AgentError> {
        {
            let mut state = lock(&self.owner.0.state);
            let inbox = state.inboxes.get_mut(&self.id);
            let allowed = inbox.and_then(|inbox| inbox.allowed.get_mut(index(stream)));
            if let Some(allowed) = allowed {
                *allowed = allowed.saturating_add(bytes);
            }
        }
        let stream = stream.into();
        self.send(to_agent::Kind::Credit(Credit { stream, bytes }))
    }

    /// What has come, if anything has.
    ///
    /// # Errors
    /// The agent refused the request, or the connection has ended before it did.
    pub fn take(&mut self) -> Result<Option<Event>, AgentError> {
        let mut state = lock(&self.owner.0.state);
        let State {
            inboxes, broken, ..
        } = &mut *state;
        let Some(inbox) = inboxes.get_mut(&self.id) else {
            return Err(UNEXPECTED);
        };
        if let Some(pid) = inbox.started.take() {
            return Ok(Some(Event::Started(pid)));
        }
        if let Some((stream, data)) = inbox.data.pop_front() {
            return Ok(Some(Event::Data(stream, data)));
        }
        if inbox.credit > 0 {
            return Ok(Some(Event::Credit(std::mem::take(&mut inbox.credit))));
        }
        match (inbox.end.take(), broken) {
            (Some(from_agent::Kind::Error(error)), _) => {
                self.over = true;
                Err(AgentError::Refused {
                    code: error.code(),
                    message: printable(&error.message),
                })
            }
            (Some(end), _) => {
                self.over = true;
                Ok(Some(Event::End(end)))
            }
            (None, Some(broken)) => Err(broken.clone().into()),
            (None, None) => Ok(None),
        }
    }

    /// Waits until something may have come or `input` is readable; says whether `input` is ready.
    ///
    /// # Errors
    /// [`AgentError::TimedOut`].
    pub fn wait(&self, input: Option<BorrowedFd<'_>>) -> Result<bool, AgentError> {
        let timeout = timeout_until(*lock(&self.owner.0.deadline))?;
        let wake = PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN);
        // Without an input, the same twice: an array is simpler than a vector, and as true.
        let (second, count) = match input {
            Some(input) => (PollFd::from_borrowed_fd(input, PollFlags::IN), 2),
            None => (wake.clone(), 1),
        };
        let mut fds = [wake, second];
        match poll(fds.get_mut(..count).unwrap_or_default(), timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(errno) => return Err(AgentError::Socket(errno.into())),
        }
        let [first, second] = fds.map(|fd| fd.revents());
        if !first.is_empty() {
            // Before the inbox is looked at, so that what comes after that wakes again.
            let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        }
        Ok(count == 2 && !second.is_empty())
    }

    /// Waits for what comes next.
    ///
    /// # Errors
    /// As [`Self::take`] and [`Self::wait`].
    pub fn next(&mut self) -> Result<Event, AgentError> {
        loop {
            if let Some(event) = self.take()? {
                return Ok(event);
            }
            self.wait(None)?;
        }
    }

    /// Waits for the end of a request that says nothing else.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn end(mut self) -> Result<from_agent::Kind, AgentError> {
        match self.next()? {
            Event::End(end) => Ok(end),
            _ => Err(UNEXPECTED),
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let alive = {
            let mut state = lock(&self.owner.0.state);
            state.inboxes.remove(&self.id);
            state.broken.is_none()
        };
        if alive && !self.over {
            let _ = self.send(to_agent::Kind::Cancel(Cancel {}));
        }
    }
}

/// Steers a running program from wherever it is held: another thread, a signal's handler loop.
/// Once the program has ended, nothing happens.
#[derive(Clone)]
pub struct Controller {
    owner: Arc<Owner>,
    id: u32,
}

impl Controller {
    fn send(&self, kind: to_agent::Kind) -> Result<(), AgentError> {
        // The number may be another request's one day, but not while the counter has not come round.
        self.owner.0.send(self.id, kind)
    }

    /// The terminal has another size.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), AgentError> {
        let (rows, columns) = (rows.into(), columns.into());
        let resize = guest_agent::proto::Resize { rows, columns };
        self.send(to_agent::Kind::Resize(resize))
    }

    /// Sends a signal to the program's process group.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn signal(&self, signal: u8) -> Result<(), AgentError> {
        let signo = signal.into();
        let signal = guest_agent::proto::Signal { signo };
        self.send(to_agent::Kind::Signal(signal))
    }

    /// Kills the program with every process that it has started.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn cancel(&self) -> Result<(), AgentError> {
        self.send(to_agent::Kind::Cancel(Cancel {}))
    }
}
