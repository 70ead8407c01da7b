//! `vmm snap`: the snapshots of this user, one file per group of subcommands.

pub mod inspect;
pub mod ls;
mod make;
pub mod remove;

use clap::{Args, Subcommand};

use super::CliError;
use crate::store::{Store, StoreError};

/// Look at, check, convert and remove snapshots
#[derive(Debug, Args)]
pub struct SnapArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ls(ls::LsArgs),
    Inspect(inspect::InspectArgs),
    Verify(inspect::VerifyArgs),
    Diff(inspect::DiffArgs),
    Flatten(make::FlattenArgs),
    Rebase(make::RebaseArgs),
    Pack(make::PackArgs),
    Unpack(make::UnpackArgs),
    Rm(remove::RmArgs),
    Gc(remove::GcArgs),
}

/// Carries out `vmm snap`.
pub fn snap(args: &SnapArgs) -> Result<u8, CliError> {
    let store = Store::of_user().map_err(failed)?;
    match &args.command {
        Command::Ls(args) => ls::ls(&store, args),
        Command::Inspect(args) => inspect::inspect(&store, args),
        Command::Verify(args) => inspect::verify(&store, args),
        Command::Diff(args) => inspect::diff(&store, args),
        Command::Flatten(args) => make::flatten(&store, args),
        Command::Rebase(args) => make::rebase(&store, args),
        Command::Pack(args) => make::pack(&store, args),
        Command::Unpack(args) => make::unpack(&store, args),
        Command::Rm(args) => remove::rm(&store, args),
        Command::Gc(args) => remove::gc(&store, args),
    }
}

/// What the files say is bad input; what the system says is a failure.
pub fn failed(error: impl Into<StoreError>) -> CliError {
    let error = error.into();
    if error.is_system() {
        CliError::Monitor(error.to_string())
    } else {
        CliError::BadInput(error.to_string())
    }
}
