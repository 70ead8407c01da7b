//! `vmm cache`: the guests that have booted before and were kept.

use clap::{Args, Subcommand};

use super::CliError;
use super::snap::ls::{self, LsArgs};
use super::snap::remove::{self, GcArgs, RmArgs};
use crate::boot_cache;

/// Look at and remove guests that have booted before, from which `vmm run` and `vmm start` go on
#[derive(Debug, Args)]
pub struct CacheArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ls(LsArgs),
    Rm(RmArgs),
    Gc(GcArgs),
}

/// Carries out `vmm cache`.
pub fn cache(args: &CacheArgs) -> Result<u8, CliError> {
    let store = boot_cache::store().ok_or_else(|| {
        CliError::BadInput("neither XDG_CACHE_HOME nor HOME is set: there is no cache".to_owned())
    })?;
    match &args.command {
        Command::Ls(args) => ls::ls(&store, args),
        Command::Rm(args) => remove::rm(&store, args),
        Command::Gc(args) => remove::gc(&store, args),
    }
}
