//! Kernel images.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::kernel::Input| bough_fuzz::kernel::run(&input));
