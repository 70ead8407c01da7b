//! The socket device, between a guest and host clients.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::vsock::Input| bough_fuzz::vsock::run(&input));
