//! Bough's guest agent: PID 1 of the guest.
#![forbid(unsafe_code)]

fn main() {}
