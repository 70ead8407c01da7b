//! `vmm snap flatten`, `rebase`, `pack` and `unpack`: snapshots made of others. Each prints what it made.

use std::path::PathBuf;

use clap::Args;

use super::super::{CliError, print};
use super::failed;
use crate::store::derive::pack as write_pack;
use crate::store::{Held, Store};

/// Make a snapshot with the content of another that rests on no other
#[derive(Debug, Args)]
pub struct FlattenArgs {
    /// A name, or the beginning of an id
    #[arg(value_name = "REF")]
    snapshot: String,
    /// Name of the new snapshot [default: that of the other]
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

/// Make a snapshot with the content of another that rests on a third
#[derive(Debug, Args)]
pub struct RebaseArgs {
    /// A name, or the beginning of an id
    #[arg(value_name = "REF")]
    snapshot: String,
    /// The snapshot to rest on
    #[arg(value_name = "NEW_PARENT")]
    parent: String,
    /// Name of the new snapshot [default: that of the other]
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

/// Write a snapshot to a compressed file; what it rests on is not in it
#[derive(Debug, Args)]
pub struct PackArgs {
    /// A name, or the beginning of an id
    #[arg(value_name = "REF")]
    snapshot: String,
    /// The new file [default: <id>.bough]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Add a snapshot from a file that `vmm snap pack` wrote
#[derive(Debug, Args)]
pub struct UnpackArgs {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Carries out `vmm snap flatten`.
pub fn flatten(store: &Store, args: &FlattenArgs) -> Result<u8, CliError> {
    let held = store.hold(&args.snapshot).map_err(failed)?;
    let made = store.flatten(held.snapshot(), args.name.as_deref());
    print_id(&made.map_err(failed)?)
}

/// Carries out `vmm snap rebase`.
pub fn rebase(store: &Store, args: &RebaseArgs) -> Result<u8, CliError> {
    let held = store.hold(&args.snapshot).map_err(failed)?;
    let parent = store.hold(&args.parent).map_err(failed)?;
    let made = store.rebase(held.snapshot(), parent.snapshot(), args.name.as_deref());
    print_id(&made.map_err(failed)?)
}

/// Carries out `vmm snap pack`.
pub fn pack(store: &Store, args: &PackArgs) -> Result<u8, CliError> {
    let held = store.hold(&args.snapshot).map_err(failed)?;
    let id = held.snapshot().id();
    let path = args
        .file
        .clone()
        .unwrap_or_else(|| format!("{id}.bough").into());
    if path.exists() {
        let path = path.display();
        return Err(CliError::BadInput(format!(
            "{path} is there already: remove it, or name another file"
        )));
    }
    write_pack(held.snapshot(), &path).map_err(failed)?;
    print(format!("{}\n", path.display()).as_bytes())
}

/// Carries out `vmm snap unpack`.
pub fn unpack(store: &Store, args: &UnpackArgs) -> Result<u8, CliError> {
    if !args.file.exists() {
        let path = args.file.display();
        return Err(CliError::BadInput(format!(
            "there is no file {path}: give one that `vmm snap pack` wrote"
        )));
    }
    print_id(&store.unpack(&args.file).map_err(failed)?)
}

fn print_id(made: &Held) -> Result<u8, CliError> {
    print(format!("{}\n", made.snapshot().id()).as_bytes())
}
