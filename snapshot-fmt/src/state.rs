//! Plain data that a component saves and is restored from.

pub mod agent;
pub mod lane;
pub mod machine;
pub mod platform;
pub mod serial;
pub mod vcpu;
pub mod virtio;
