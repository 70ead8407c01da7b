//! The messages, made from `proto/agent.proto`; that file is the reference for
//! what they mean and in which order they come.

#![allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]

include!(concat!(env!("OUT_DIR"), "/bough.agent.v1.rs"));

/// The vsock port that the agent listens on, and the host's port that it dials when ready.
pub const AGENT_PORT: u32 = 1024;

/// The credit of an output stream if the client's Hello does not say, in bytes.
pub const DEFAULT_OUTPUT_WINDOW: u32 = 256 * 1024;

/// The most bytes that one Stdout, Stderr or StdinData carries.
pub const MAX_DATA: usize = 64 * 1024;

/// The most entries that the answer to `ListUpper` has.
pub const MAX_UPPER_ENTRIES: usize = 200_000;

/// The most bytes that their paths and targets have together.
pub const MAX_UPPER_BYTES: usize = 32 << 20;
