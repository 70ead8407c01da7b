//! The persistent memory device behind its registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::pmem::Input| bough_fuzz::pmem::run(&input));
