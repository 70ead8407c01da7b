//! The entropy device behind its registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::rng::Input| bough_fuzz::rng::run(&input));
