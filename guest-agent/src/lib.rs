//! The agent's contract with the host: its messages and their framing.
//!
//! Shared by the agent, the monitor and the SDKs. Whatever arrives is hostile: a
//! frame's length is checked before memory is set aside for it, and nothing here
//! panics on any input.
#![forbid(unsafe_code)]

pub mod frame;
pub mod proto;
pub mod tree;
pub mod version;
