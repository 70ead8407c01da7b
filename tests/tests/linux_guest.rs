//! A Linux guest with its agent.

use std::process::ExitCode;

fn main() -> ExitCode {
    tests::main(vec![])
}
