//! Frames between the host and the agent.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::frames::Input| bough_fuzz::frames::run(&input));
