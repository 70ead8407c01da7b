//! Packed snapshots.
#![no_main]

libfuzzer_sys::fuzz_target!(
    |input: bough_fuzz::snapshot::PackInput| bough_fuzz::snapshot::pack(&input)
);
