//! `vmm rollback`: takes a sandbox back, in place.

use std::time::Duration;

use clap::Args;

use super::lifecycle::{failed, living};
use super::{CliError, find_failed, print_json, print_timings};
use crate::control::client::ask;
use crate::control::types::{RollbackRequest, RollbackView};
use crate::sandbox::list::find;

/// How long the guest may take to be itself again.
const PATIENCE: Duration = Duration::from_secs(240);

/// Take a sandbox back to what it was, in place
///
/// Without a snapshot it goes back to what it began with: the snapshot that it was restored from, the moment at which it branched off, or the snapshot that it has gone back to since. Whatever has run in it
/// since has never been; its clients lose their connections. It keeps its name, its process and its sockets, and runs from there.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// The sandbox: its name, or the beginning of its id
    #[arg(value_name = "SANDBOX")]
    sandbox: String,
    /// A snapshot of it, or of another machine like it: its name, or the beginning of its id
    #[arg(value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Print JSON: what was put back, and how long it took
    #[arg(long, conflicts_with = "timings")]
    json: bool,
    /// Print what took how long to standard error
    #[arg(long)]
    timings: bool,
}

/// Carries out `vmm rollback`.
pub fn rollback(args: &RollbackArgs) -> Result<u8, CliError> {
    let sandbox = find(&args.sandbox).map_err(find_failed)?;
    living(&sandbox)?;
    let request = RollbackRequest {
        snapshot: args.snapshot.clone(),
    };
    let socket = sandbox.paths.api_socket();
    let view: RollbackView = ask(&socket, "POST", "/v1/rollback", &request, PATIENCE)
        .map_err(|error| failed(&sandbox, &error))?;
    if args.json {
        return print_json(&view);
    }
    if args.timings {
        let back = format!("running again: {} pages put back", view.pages);
        print_timings(&[(view.pause_us, &back), (view.total_us, "agent answered")]);
    }
    Ok(0)
}
