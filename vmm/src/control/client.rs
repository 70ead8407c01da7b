//! The API as `vmm`'s own subcommands ask for it.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::http::{Answer, HttpError, read_answer, write_request};
use super::types::{ErrorBody, ErrorCode, ErrorView};

/// Longest answer, or line of one, in bytes.
const ANSWER_MAX: usize = 1 << 20;

/// A request came to nothing.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("cannot reach the sandbox at {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke, or what came is no HTTP.
    #[error("the sandbox did not answer: {0}")]
    Http(#[from] HttpError),
    /// The sandbox refused.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// The answer is not what it should be.
    #[error("the sandbox's answer cannot be read: {0}")]
    Answer(#[from] serde_json::Error),
}

impl From<ClientError> for ErrorBody {
    /// As who asked another sandbox tells it on.
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(body) => body,
            error => Self::new(ErrorCode::Agent, error.to_string()),
        }
    }
}

/// Sends a request, and reads the head of the answer.
fn begin(
    socket: &Path,
    method: &str,
    path: &str,
    body: &impl Serialize,
    patience: Duration,
) -> Result<(UnixStream, Answer), ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| ClientError::Connect {
        path: socket.to_owned(),
        source,
    })?;
    let io = |error| ClientError::Http(HttpError::Io(error));
    stream.set_read_timeout(Some(patience)).map_err(io)?;
    stream.set_write_timeout(Some(patience)).map_err(io)?;
    write_request(&mut stream, method, path, &serde_json::to_vec(body)?).map_err(io)?;
    let answer = read_answer(&mut stream)?;
    if answer.status != 200 {
        let body = answer.body(&mut stream, ANSWER_MAX)?;
        let view: ErrorView = serde_json::from_slice(&body)?;
        return Err(ClientError::Refused(view.error));
    }
    Ok((stream, answer))
}

/// Asks the sandbox at `socket`, and waits at most `patience`.
pub fn ask<T: DeserializeOwned>(
    socket: &Path,
    method: &str,
    path: &str,
    body: &impl Serialize,
    patience: Duration,
) -> Result<T, ClientError> {
    let (mut stream, answer) = begin(socket, method, path, body, patience)?;
    let body = answer.body(&mut stream, ANSWER_MAX)?;
    Ok(serde_json::from_slice(&body)?)
}

/// Asks the sandbox at `socket` for text, and waits at most `patience`.
pub fn ask_for_text(socket: &Path, path: &str, patience: Duration) -> Result<String, ClientError> {
    let (mut stream, answer) = begin(socket, "GET", path, &(), patience)?;
    let text = answer.body(&mut stream, ANSWER_MAX)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// An answer that comes in lines, of which none was read yet.
pub struct Lines {
    stream: UnixStream,
    answer: Answer,
}

impl Lines {
    /// Asks the sandbox at `socket`, and waits for the answer to begin at most `patience`.
    pub fn ask(
        socket: &Path,
        path: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> Result<Self, ClientError> {
        let (stream, answer) = begin(socket, "POST", path, body, patience)?;
        let io = |error| ClientError::Http(HttpError::Io(error));
        stream.set_read_timeout(None).map_err(io)?;
        Ok(Self { stream, answer })
    }

    /// What it comes on: shut, it ends.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Has `each` see what comes.
    pub fn read<T: DeserializeOwned, E: From<ClientError>>(
        mut self,
        mut each: impl FnMut(T) -> Result<(), E>,
    ) -> Result<(), E> {
        let io = |error| ClientError::Http(HttpError::Io(error));
        let mut lines = BufReader::new(self.answer.chunks(&mut self.stream));
        let mut line = String::new();
        loop {
            line.clear();
            // One that is cut off is no JSON.
            let limit = u64::try_from(ANSWER_MAX).unwrap_or(u64::MAX);
            if (&mut lines).take(limit).read_line(&mut line).map_err(io)? == 0 {
                return Ok(());
            }
            each(serde_json::from_str(&line).map_err(ClientError::Answer)?)?;
        }
    }
}
