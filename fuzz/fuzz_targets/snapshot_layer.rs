//! Layers and chains of them.
#![no_main]

libfuzzer_sys::fuzz_target!(
    |input: bough_fuzz::snapshot::LayerInput| bough_fuzz::snapshot::layer(&input)
);
