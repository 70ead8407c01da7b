//! Snapshots: a running machine written to a directory while it runs on, and brought back.

pub mod memory_layer;
