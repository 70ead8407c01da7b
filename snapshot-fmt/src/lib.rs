//! Bough's saved states as plain data.
//!
//! So far this holds only the state types that devices save and restore; the
//! on-disk format (header, layers, chains) joins them when snapshots do. Nothing here knows KVM, and
//! nothing here is trusted by who reads it: a restored value may be hostile.
#![forbid(unsafe_code)]

pub mod bytes;
pub mod state;
