//! The agent's contract with the host.
#![forbid(unsafe_code)]
