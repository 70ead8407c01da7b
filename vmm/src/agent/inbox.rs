//! What comes from the agent, sorted: an inbox per request. The agent is hostile: an inbox holds no more output than
//! the credit that was given for it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use guest_agent::frame::{FrameBuffer, FrameError};
use guest_agent::proto::{BranchWanted, ErrorCode, FromAgent, MAX_DATA, Stream, from_agent};

use super::{AgentError, printable};

/// Why nothing more comes.
#[derive(Clone)]
pub(super) enum Broken {
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
pub(super) struct Inbox {
    pub data: VecDeque<(Stream, Vec<u8>)>,
    /// How much output may still come, per stream.
    pub allowed: [u32; 2],
    pub credit: u32,
    pub started: Option<u32>,
    pub end: Option<from_agent::Kind>,
    /// The end has come, be it taken or not.
    pub ended: bool,
    pub wake: Arc<OwnedFd>,
}

/// What is known of a connection's requests.
#[derive(Default)]
pub(super) struct State {
    /// What has come for each that is looked after, by its id.
    pub inboxes: HashMap<u32, Inbox>,
    /// Requests that were given up, and whose end has not come.
    pub ending: HashSet<u32>,
    pub last_id: u32,
    /// The agent has said the beginning of a frame and not its end.
    pub partial: bool,
    /// How many want no request to begin.
    pub holders: u32,
    pub broken: Option<Broken>,
    /// What the guest asks and nobody has dealt with.
    pub wanted: Vec<BranchWanted>,
}

/// The place of an output stream in a pair.
pub(super) fn index(stream: Stream) -> usize {
    usize::from(stream == Stream::Stderr)
}

impl State {
    /// Sorts the messages that are whole.
    pub fn sort_all(&mut self, frames: &mut FrameBuffer) -> Result<(), Broken> {
        while let Some(message) = frames.next_message().map_err(Broken::Frame)? {
            self.sort(message)?;
        }
        self.partial = frames.is_partial();
        Ok(())
    }

    fn sort(&mut self, message: FromAgent) -> Result<(), Broken> {
        use from_agent::Kind::{BranchWanted, Credit, Error, Started, Stderr, Stdout};
        let Some(kind) = message.kind else {
            return Ok(());
        };
        if message.request_id == 0 {
            if let BranchWanted(wanted) = kind {
                self.wanted.push(wanted);
                return Ok(());
            }
            return Err(match kind {
                Error(error) => Broken::Refused(error.code(), printable(&error.message)),
                _ => Broken::Protocol("a message about no request"),
            });
        }
        let Some(inbox) = self.inboxes.get_mut(&message.request_id) else {
            // About a request that has been given up.
            if !matches!(kind, Stdout(_) | Stderr(_) | Credit(_) | Started(_)) {
                self.ending.remove(&message.request_id);
            }
            return Ok(());
        };
        match kind {
            Stdout(out) => inbox.take(Stream::Stdout, out.data)?,
            Stderr(out) => inbox.take(Stream::Stderr, out.data)?,
            Credit(credit) => inbox.credit = inbox.credit.saturating_add(credit.bytes),
            Started(started) => inbox.started = Some(started.pid),
            end => {
                inbox.ended = true;
                inbox.end.get_or_insert(end);
            }
        }
        inbox.wake();
        Ok(())
    }
}

impl Inbox {
    pub fn new(wake: Arc<OwnedFd>, output_window: u32) -> Self {
        Self {
            data: VecDeque::new(),
            allowed: [output_window; 2],
            credit: 0,
            started: None,
            end: None,
            ended: false,
            wake,
        }
    }

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

    pub fn wake(&self) {
        // Full is as good as written.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }
}
