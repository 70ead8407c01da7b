//! Plain data that a component saves and is restored from.

pub mod virtio;
