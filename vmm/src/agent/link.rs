//! One connection that many requests share.
//!
//! A thread of its own reads what the agent sends and sorts it into an inbox per request; whoever
//! has a request takes from its inbox. So neither direction waits for the other, and a request
//! that is not looked after holds nobody up. New requests can be held back, for the moment of a snapshot.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use guest_agent::frame::{self, FrameBuffer};
use guest_agent::proto::{Cancel, Credit, Stream, ToAgent, from_agent, to_agent};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::asks::{Answerer, deal_with};
use super::channel::{Channel, timeout_until};
use super::inbox::{Broken, Inbox, State, index};
use super::{AgentError, UNEXPECTED, printable};
use crate::sys::heap::MAPPED;

/// How many bytes of each output stream the agent may send ahead of whoever takes them.
pub(super) const OUTPUT_WINDOW: u32 = 512 * 1024;

/// How many bytes are read at once: what was read into stays the sandbox's also while it waits for work.
const READ_SIZE: usize = 16 * 1024;

/// The connection.
pub(super) struct Link {
    socket: UnixStream,
    /// Held while a frame is written.
    writing: Mutex<()>,
    state: Mutex<State>,
    /// The last holder is gone, or the deadline is another.
    released: Condvar,
    deadline: Mutex<Option<Instant>>,
    /// The credit that each output starts with, as the agent was told.
    output_window: u32,
    /// Itself, as those have it who use it.
    pub owner: Mutex<Weak<Owner>>,
    /// Who deals with what the guest asks.
    pub answerer: Mutex<Option<Arc<Answerer>>>,
    /// How much of that is being dealt with.
    pub asks: Mutex<u32>,
}

/// Ends the connection when the last of those who use it is gone.
pub(super) struct Owner(pub Arc<Link>);

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.0.socket.shutdown(Shutdown::Both);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change to what these hold is complete in itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// Takes over a connection on which the Hellos have been exchanged, and requests up to `last_id` been made.
    ///
    /// # Errors
    /// The Hello cannot be sent, or no thread be started.
    pub fn start(
        mut channel: Channel,
        output_window: u32,
        last_id: u32,
    ) -> Result<Arc<Owner>, AgentError> {
        channel.flush_all()?;
        let (socket, frames, deadline) = channel.into_parts();
        let link = Arc::new(Self {
            socket,
            writing: Mutex::default(),
            state: Mutex::new(State {
                last_id,
                partial: frames.is_partial(),
                ..State::default()
            }),
            released: Condvar::new(),
            deadline: Mutex::new(deadline),
            output_window,
            owner: Mutex::default(),
            answerer: Mutex::default(),
            asks: Mutex::default(),
        });
        let owner = Arc::new(Owner(link.clone()));
        *lock(&link.owner) = Arc::downgrade(&owner);
        std::thread::Builder::new()
            .name("agent".into())
            .spawn(move || {
                let broken = link.read(frames);
                // The agent is to know that nobody listens any more.
                let _ = link.socket.shutdown(Shutdown::Both);
                let mut state = lock(&link.state);
                state.broken.get_or_insert(broken);
                state.inboxes.values().for_each(Inbox::wake);
                link.released.notify_all();
            })
            .map_err(AgentError::Socket)?;
        Ok(owner)
    }

    /// What it is on.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// From now on, whoever waits gives up at this moment.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        *lock(&self.deadline) = deadline;
        lock(&self.state).inboxes.values().for_each(Inbox::wake);
        self.released.notify_all();
    }

    /// Lets no request begin until [`Self::release`] was called as often as this.
    pub fn hold(&self) {
        lock(&self.state).holders += 1;
    }

    /// Lets requests begin again.
    pub fn release(&self) {
        let mut state = lock(&self.state);
        state.holders = state.holders.saturating_sub(1);
        if state.holders == 0 {
            self.released.notify_all();
        }
    }

    /// What a connection at rest goes on with: the outputs' first credit, and the last id of a request. Nothing while a
    /// request runs, or either side is in the middle of a frame.
    pub fn at_rest(&self) -> Option<(u32, u32)> {
        let _writing = self.writing.try_lock().ok()?;
        let state = lock(&self.state);
        let rests = state.broken.is_none()
            && !state.partial
            && state.ending.is_empty()
            && state.inboxes.values().all(|inbox| inbox.ended);
        rests.then_some((self.output_window, state.last_id))
    }

    /// Gives a request an id and an inbox, once requests may begin.
    fn enter(&self, wake: Arc<OwnedFd>) -> Result<u32, AgentError> {
        let mut state = lock(&self.state);
        while state.holders > 0 && state.broken.is_none() {
            let left = timeout_until(*lock(&self.deadline))?;
            let left = left.and_then(|left| Duration::try_from(left).ok());
            state = match left {
                None => self
                    .released
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.released.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        loop {
            let id = state.last_id.checked_add(1).unwrap_or(1);
            state.last_id = id;
            if !state.inboxes.contains_key(&id) && !state.ending.contains(&id) {
                state
                    .inboxes
                    .insert(id, Inbox::new(wake, self.output_window));
                return Ok(id);
            }
        }
    }

    /// Reads until the connection ends; says why.
    fn read(self: &Arc<Self>, mut frames: FrameBuffer) -> Broken {
        // More than is ever used, for it is a mapping then, of which what was never read into costs nothing.
        let mut scratch = vec![0; MAPPED];
        // Held from when bytes are taken off the socket until they are sorted, so that nobody finds them in between.
        let mut state = lock(&self.state);
        loop {
            if let Err(broken) = state.sort_all(&mut frames) {
                return broken;
            }
            let wanted = std::mem::take(&mut state.wanted);
            drop(state);
            for wanted in wanted {
                if let Err(broken) = deal_with(self, wanted) {
                    return broken;
                }
            }
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Broken::Socket(errno.raw_os_error()),
            }
            state = lock(&self.state);
            match (&self.socket).read(&mut scratch[..READ_SIZE]) {
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
        let id = link.enter(wake.clone())?;
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
        let runs = {
            let mut state = lock(&self.owner.0.state);
            let inbox = state.inboxes.remove(&self.id);
            let runs =
                !self.over && state.broken.is_none() && inbox.is_some_and(|inbox| !inbox.ended);
            if runs {
                state.ending.insert(self.id);
            }
            runs
        };
        if runs {
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
