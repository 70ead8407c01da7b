//! `vmm diff`: how two sandboxes differ, or a sandbox and a snapshot.

use clap::Args;

use super::snap::{failed, inspect::print_differences};
use super::{CliError, find_failed, snapshot::take};
use crate::control::types::SnapshotRequest;
use crate::logger::complain;
use crate::sandbox::list::{FindError, find};
use crate::store::{Held, Store, StoreError};

/// Count the pages of memory and the blocks of disks that differ between two sandboxes, by region
///
/// Each is saved for that, aside from its other snapshots, and what was saved is removed again; if the command is killed, a snapshot without a name is left. They run on meanwhile.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A sandbox or a snapshot: a name, or the beginning of an id
    #[arg(value_name = "A")]
    a: String,
    /// Another
    #[arg(value_name = "B")]
    b: String,
    /// Print JSON, which names the pages too
    #[arg(long)]
    json: bool,
}

/// One side.
struct Side<'a> {
    store: &'a Store,
    held: Option<Held>,
    /// It is there for this alone.
    aside: bool,
}

impl<'a> Side<'a> {
    /// The sandbox that `reference` means, as it is now, or else the snapshot.
    fn of(store: &'a Store, reference: &str) -> Result<Self, CliError> {
        let (id, aside) = match find(reference) {
            Ok(sandbox) => {
                let request = SnapshotRequest {
                    aside: true,
                    ..SnapshotRequest::default()
                };
                (take(&sandbox, &request)?.id, true)
            }
            Err(FindError::Unknown { .. }) => (reference.to_owned(), false),
            Err(error) => return Err(find_failed(error)),
        };
        Ok(Self {
            store,
            held: Some(store.hold(&id).map_err(|error| match error {
                StoreError::Unknown { .. } => CliError::BadInput(format!(
                    "no sandbox and no snapshot is called {reference:?}; `vmm ls` and `vmm snap ls` list them"
                )),
                error => failed(error),
            })?),
            aside,
        })
    }
}

impl Drop for Side<'_> {
    fn drop(&mut self) {
        let Some(held) = self.held.take().filter(|_| self.aside) else {
            return;
        };
        let id = held.snapshot().id();
        // What is held is not removed.
        drop(held);
        if let Err(error) = self.store.remove(&id, false) {
            complain(format_args!("warning: {error}"));
        }
    }
}

/// Carries out `vmm diff`.
pub fn diff(args: &DiffArgs) -> Result<u8, CliError> {
    let store = Store::of_user().map_err(failed)?;
    let sides = [Side::of(&store, &args.a)?, Side::of(&store, &args.b)?];
    match &sides {
        [Side { held: Some(a), .. }, Side { held: Some(b), .. }] => {
            print_differences(&store, [a.snapshot(), b.snapshot()], args.json)
        }
        _ => Ok(0),
    }
}
