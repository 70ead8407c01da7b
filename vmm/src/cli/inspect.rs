//! `vmm inspect`: all that is known about sandboxes, as JSON.

use clap::Args;

use super::ls::Listed;
use super::{CliError, find_failed, print_json};
use crate::sandbox::list::find;

/// Print what is known about sandboxes, as JSON
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Names, or beginnings of ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// Carries out `vmm inspect`: prints an object for one name, a list for more.
pub fn inspect(args: &InspectArgs) -> Result<u8, CliError> {
    if let [name] = &args.names[..] {
        return show(name);
    }
    let found: Vec<_> = args
        .names
        .iter()
        .map(|name| find(name).map(|sandbox| Listed::new(&sandbox)))
        .collect::<Result<_, _>>()
        .map_err(find_failed)?;
    print_json(&found)
}

/// Prints one sandbox.
pub fn show(name: &str) -> Result<u8, CliError> {
    let sandbox = find(name).map_err(find_failed)?;
    print_json(&Listed::new(&sandbox))
}
