//! An agent's connection at rest: held still while a snapshot is taken, and gone on with in a restored machine.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use guest_agent::proto::{Hello, Restored, from_agent, to_agent};
use snapshot_fmt::state::agent::AgentState;

use super::channel::Channel;
use super::link::{Link, Owner, Request};
use super::{Agent, AgentError, UNEXPECTED, check_version, printable};

/// While this is held, requests that are made on the connection wait. Those that run go on, and are not disturbed.
pub struct Quiet {
    owner: Arc<Owner>,
    hello: Arc<Hello>,
}

impl Quiet {
    /// What [`Agent::resume`] goes on with, if the connection is at rest: no request runs, nor does one that was given up
    /// and whose end has not come, and neither side has said half of something.
    ///
    /// To be asked after the devices have stood still and the socket device was saved with this connection. That one
    /// knows whether bytes are on their way, this one what those that have arrived mean; both must find rest.
    #[must_use]
    pub fn state(&self) -> Option<AgentState> {
        let (output_window, last_request_id) = self.owner.0.at_rest()?;
        let hello = &self.hello;
        Some(AgentState {
            min_version: hello.min_version,
            max_version: hello.max_version,
            software: hello.software.clone(),
            features: hello.features.clone(),
            boot_id: hello.boot_id.clone(),
            stdin_window: hello.stdin_window,
            output_window,
            last_request_id,
        })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.owner.0.release();
    }
}

impl Agent {
    /// Lets no request begin, on this connection, for as long as what this returns is held: they wait, up to their
    /// deadline. For the moment of a snapshot.
    #[must_use]
    pub fn quiesce(&self) -> Quiet {
        self.owner.0.hold();
        Quiet {
            owner: self.owner.clone(),
            hello: self.hello.clone(),
        }
    }

    /// Goes on with a connection that was saved by [`Quiet::state`], on the stream that the restored socket device has for
    /// it. There is no greeting: the guest does not notice. [`Self::restored`] should be the first request.
    ///
    /// # Errors
    /// [`AgentError::Version`] if the saved agent is too new or too old, and those of the stream.
    pub fn resume(
        stream: UnixStream,
        state: &AgentState,
        deadline: Option<Instant>,
    ) -> Result<Self, AgentError> {
        let hello = Hello {
            min_version: state.min_version,
            max_version: state.max_version,
            software: printable(&state.software),
            features: state.features.clone(),
            boot_id: state.boot_id.clone(),
            stdin_window: state.stdin_window,
            output_window: 0,
        };
        check_version(&hello)?;
        let channel = Channel::new(stream, deadline)?;
        Ok(Self {
            owner: Link::start(channel, state.output_window, state.last_request_id)?,
            hello: Arc::new(hello),
            file_user: String::new(),
        })
    }

    /// Tells a guest that goes on from a snapshot so, and comes back when its random numbers are its own and its clock is
    /// right.
    ///
    /// # Errors
    /// [`AgentError::Refused`] and all that a broken or silent connection can lead to: the guest must not be used.
    pub fn restored(&self, restored: Restored) -> Result<(), AgentError> {
        match Request::start(&self.owner, to_agent::Kind::Restored(restored))?.end()? {
            from_agent::Kind::Done(_) => Ok(()),
            _ => Err(UNEXPECTED),
        }
    }
}
