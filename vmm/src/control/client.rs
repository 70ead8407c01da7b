//! The API as `vmm`'s own subcommands ask for it.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::http::{HttpError, read_answer, write_request};
use super::types::{ErrorBody, ErrorView};

/// Longest answer, in bytes.
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

/// Asks the sandbox at `socket`, and waits at most `patience`.
pub fn ask<T: DeserializeOwned>(
    socket: &Path,
    method: &str,
    path: &str,
    body: &impl Serialize,
    patience: Duration,
) -> Result<T, ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| ClientError::Connect {
        path: socket.to_owned(),
        source,
    })?;
    let io = |error| ClientError::Http(HttpError::Io(error));
    stream.set_read_timeout(Some(patience)).map_err(io)?;
    stream.set_write_timeout(Some(patience)).map_err(io)?;
    write_request(&mut stream, method, path, &serde_json::to_vec(body)?).map_err(io)?;
    let answer = read_answer(&mut stream)?;
    let status = answer.status;
    let body = answer.body(&mut stream, ANSWER_MAX)?;
    if status != 200 {
        let view: ErrorView = serde_json::from_slice(&body)?;
        return Err(ClientError::Refused(view.error));
    }
    Ok(serde_json::from_slice(&body)?)
}
