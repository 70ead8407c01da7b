//! Manifests of snapshots.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bough_fuzz::snapshot::manifest(bytes));
