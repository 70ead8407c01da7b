//! What goes wrong in the agent, in the terms of the contract: each failure ends up
//! as an `Error` message to a client, so its type is that message's code and text.

use std::fmt::Display;

use guest_agent::proto::{Error, ErrorCode};

/// A failure of a request, or of a connection.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What a client can branch on.
    pub code: ErrorCode,
    /// One line for a person.
    pub message: String,
}

impl Failure {
    /// A failure with its text.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// A system call of ours that failed: `call` names it and its operands.
    pub fn internal(call: &str, error: impl Display) -> Self {
        Self::new(ErrorCode::Internal, format!("{call}: {error}"))
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self {
            code: failure.code.into(),
            message: failure.message,
        }
    }
}

/// The system's words for an error, without the number that std adds.
pub fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text.get(..end).unwrap_or(&text).to_owned(),
        None => text,
    }
}
