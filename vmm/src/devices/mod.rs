//! Emulated devices.
//!
//! Devices know guest memory, [`interrupt::Interrupt`] and eventfds; they never see KVM,
//! so each of them is tested by a fake driver on a machine without `/dev/kvm`.

pub mod bus;
#[cfg(test)]
mod hostile_tests;
pub mod interrupt;
pub mod lane;
pub mod live;
pub mod serial;
pub mod virtio;
