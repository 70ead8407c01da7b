//! `vmm snapshot`: saves a sandbox while it runs on.

use std::time::Duration;

use clap::Args;

use super::lifecycle::{failed, living};
use super::{CliError, find_failed, print, print_json, print_timings};
use crate::control::client::ask;
use crate::control::types::{SnapshotRequest, SnapshotView};
use crate::sandbox::list::{Sandbox, find};

/// How long a snapshot may take. Writing tens of GiB to a slow disk takes minutes.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Save a sandbox while it runs on, and print the snapshot's id
///
/// What is saved is the difference to the snapshot that the sandbox was restored from, or to the last one taken of it.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The sandbox: its name, or the beginning of its id
    #[arg(value_name = "SANDBOX")]
    sandbox: String,
    /// What to call the snapshot [default: its id alone]
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Save all of it, so that it needs no other snapshot
    #[arg(long)]
    full: bool,
    /// Print JSON: what was saved, and how long it took
    #[arg(long, conflicts_with = "timings")]
    json: bool,
    /// Print what took how long to standard error
    #[arg(long)]
    timings: bool,
}

/// Carries out `vmm snapshot`.
pub fn snapshot(args: &SnapshotArgs) -> Result<u8, CliError> {
    let sandbox = find(&args.sandbox).map_err(find_failed)?;
    let request = SnapshotRequest {
        name: args.name.clone(),
        full: args.full,
        aside: false,
    };
    let view = take(&sandbox, &request)?;
    if args.json {
        return print_json(&view);
    }
    if args.timings {
        let written = format!("written: {} pages, {} bytes", view.data_pages, view.bytes);
        print_timings(&[
            (view.state_us, "state had"),
            (view.freeze_us, "memory frozen"),
            (view.pause_us, "running again"),
            (view.total_us, &written),
        ]);
    }
    print((view.id + "\n").as_bytes())
}

/// Has a sandbox saved.
pub fn take(sandbox: &Sandbox, request: &SnapshotRequest) -> Result<SnapshotView, CliError> {
    living(sandbox)?;
    let socket = sandbox.paths.api_socket();
    ask(&socket, "POST", "/v1/snapshot", request, PATIENCE).map_err(|error| failed(sandbox, &error))
}
