//! The `vmm` binary: one process per sandbox.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    vmm::cli::main(Instant::now())
}
