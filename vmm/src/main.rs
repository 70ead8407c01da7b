//! The `vmm` binary: one process per sandbox.

fn main() {}
