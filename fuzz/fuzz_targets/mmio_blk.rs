//! The block device behind its registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::blk::Input| bough_fuzz::blk::run(&input));
