//! The content of a request about files, as something to read from or to write to.
//!
//! The standard library's traits carry its own errors only; the agent's is kept aside and
//! takes precedence over what came of it.

use std::io::{self, Read, Write};

use guest_agent::proto::{MAX_DATA, StdinClose, StdinData, Stream, from_agent, to_agent};

use super::link::{Event, OUTPUT_WINDOW, Request};
use super::{AgentError, UNEXPECTED};

/// A request whose content goes one way or the other.
pub(super) struct Content {
    request: Request,
    /// What came and was not read yet.
    data: Vec<u8>,
    start: usize,
    /// Bytes that were read and not given back as credit.
    taken: u32,
    /// How many bytes the agent is ready for.
    credit: u32,
    done: bool,
    failure: Option<AgentError>,
}

impl Content {
    /// `credit` is what the agent's Hello grants for input.
    pub fn new(request: Request, credit: u32) -> Self {
        Self {
            request,
            data: Vec::new(),
            start: 0,
            taken: 0,
            credit,
            done: false,
            failure: None,
        }
    }

    /// The agent's error, if it is behind `result`; `other` makes one of the rest.
    pub fn explain<T, E>(
        &mut self,
        result: Result<T, E>,
        other: impl FnOnce(E) -> AgentError,
    ) -> Result<T, AgentError> {
        result.map_err(|error| self.failure.take().unwrap_or_else(|| other(error)))
    }

    /// Waits for the next event, and takes it in.
    fn advance(&mut self) -> Result<(), AgentError> {
        match self.request.next()? {
            Event::Data(Stream::Stdout, data) => {
                self.data = data;
                self.start = 0;
            }
            Event::Credit(credit) => self.credit = self.credit.saturating_add(credit),
            Event::End(from_agent::Kind::Done(_)) => self.done = true,
            Event::Data(..) | Event::End(_) | Event::Started(_) => return Err(UNEXPECTED),
        }
        Ok(())
    }

    fn keep(&mut self, error: AgentError) -> io::Error {
        let told = io::Error::other(error.to_string());
        self.failure.get_or_insert(error);
        told
    }

    /// A request that has failed brings nothing more to wait for. A writer that is dropped tries once more.
    fn still_going(&self) -> io::Result<()> {
        match &self.failure {
            Some(error) => Err(io::Error::other(error.to_string())),
            None => Ok(()),
        }
    }

    /// The next bytes; none at the end.
    pub fn fill(&mut self) -> Result<&[u8], AgentError> {
        while self.start == self.data.len() && !self.done {
            // Not for every few bytes: a credit is a message, and the other half keeps the agent going.
            if self.taken >= OUTPUT_WINDOW / 2 {
                let taken = std::mem::take(&mut self.taken);
                self.request.give_credit(Stream::Stdout, taken)?;
            }
            self.advance()?;
        }
        Ok(self.data.get(self.start..).unwrap_or_default())
    }

    pub fn consume(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.data.len());
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.taken = self.taken.saturating_add(count);
    }

    fn put(&mut self, bytes: &[u8]) -> Result<usize, AgentError> {
        // Also without waiting: the agent may have refused the request by now.
        while let Some(event) = self.request.take()? {
            match event {
                Event::Credit(credit) => self.credit = self.credit.saturating_add(credit),
                _ => return Err(UNEXPECTED),
            }
        }
        while self.credit == 0 {
            self.advance()?;
            if self.done {
                return Err(UNEXPECTED);
            }
        }
        let room = usize::try_from(self.credit).unwrap_or(MAX_DATA);
        let count = bytes.len().min(room).min(MAX_DATA);
        let data = bytes.get(..count).unwrap_or_default().to_vec();
        self.credit -= u32::try_from(count).unwrap_or(self.credit);
        self.request
            .send(to_agent::Kind::StdinData(StdinData { data }))?;
        Ok(count)
    }

    /// Says that no more is written, and waits for the end.
    pub fn finish(mut self) -> Result<(), AgentError> {
        self.request
            .send(to_agent::Kind::StdinClose(StdinClose {}))?;
        while !self.done {
            self.advance()?;
        }
        Ok(())
    }
}

impl Read for Content {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.still_going()?;
        let result = self.fill().map(|mut data| data.read(out));
        match result {
            Ok(count) => count.inspect(|count| self.consume(*count)),
            Err(error) => Err(self.keep(error)),
        }
    }
}

impl Write for Content {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        self.still_going()?;
        self.put(bytes).map_err(|error| self.keep(error))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
