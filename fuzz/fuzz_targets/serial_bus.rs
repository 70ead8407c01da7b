//! The bus with the serial port and the keyboard controller.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: bough_fuzz::serial::Input| bough_fuzz::serial::run(&input));
