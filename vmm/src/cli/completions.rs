//! `vmm completions`: what a shell needs to complete the command line, made from its definition.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, CliError, print};

/// Print a shell's completions: for bash, `vmm completions bash > ~/.local/share/bash-completion/completions/vmm`
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Carries out `vmm completions`.
pub fn completions(args: &CompletionsArgs) -> Result<u8, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vmm", &mut script);
    print(&script)
}
