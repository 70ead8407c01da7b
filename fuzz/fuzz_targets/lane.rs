//! The lane, between a guest that breaks its rules and a program of the host.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::lane::Input| bough_fuzz::lane::run(&input));
