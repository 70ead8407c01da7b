//! Bough: a microVM monitor that branches.
//!
//! One process runs one sandbox. See `docs/architecture.md` for the rooms of
//! this house and the direction in which they may import each other.

pub mod devices;
