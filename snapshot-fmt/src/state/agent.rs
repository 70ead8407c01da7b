//! The host's side of the guest agent's connection, saved while no request ran on it.
//!
//! It is what the two sides told each other when the connection began, which a restored one does not say again. The
//! agent's words are the guest's: a reader treats them as it treats a greeting.

use serde::{Deserialize, Serialize};

/// A connection to the guest agent at rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    /// The lowest protocol version that the agent speaks.
    pub min_version: u32,
    /// The highest.
    pub max_version: u32,
    /// The agent's name and version.
    pub software: String,
    /// What it can do, as numbers of the contract.
    pub features: Vec<i32>,
    /// What tells boots of the guest apart.
    pub boot_id: Vec<u8>,
    /// The credit in bytes that each standard input starts with.
    pub stdin_window: u32,
    /// The credit in bytes that the host gives each standard output and error at its start.
    pub output_window: u32,
    /// The last id that a request had.
    pub last_request_id: u32,
}
