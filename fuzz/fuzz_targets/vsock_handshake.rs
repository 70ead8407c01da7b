//! What a host client says first.
#![no_main]

libfuzzer_sys::fuzz_target!(
    |input: bough_fuzz::handshake::Input| bough_fuzz::handshake::run(&input)
);
