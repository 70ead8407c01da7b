//! The socket device as a snapshot has it, which may have anything.
#![no_main]

libfuzzer_sys::fuzz_target!(
    |input: bough_fuzz::vsock::SavedInput| bough_fuzz::vsock::run_saved(&input)
);
