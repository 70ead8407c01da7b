//! `vmm branch`: makes children of a running sandbox.

use std::time::Duration;

use clap::Args;

use super::detached::label;
use super::lifecycle::{failed, living};
use super::{CliError, find_failed, print, print_json, print_timings};
use crate::control::client::ask;
use crate::control::types::{BranchRequest, BranchView, ChildView};
use crate::sandbox::list::find;
use crate::sizes::{duration, memory_mib};
use crate::timings::millis;

/// How long it may take. A child gives up before.
const PATIENCE: Duration = Duration::from_secs(300);

/// Make children of a running sandbox, and print their names
///
/// Each goes on by itself from the same moment, in memory that it shares with the others until one of them writes to it. The sandbox runs on. There
/// are all children that were asked for, each ready for work, or none.
#[derive(Debug, Args)]
pub struct BranchArgs {
    /// The sandbox: its name, or the beginning of its id
    #[arg(value_name = "SANDBOX")]
    sandbox: String,
    /// What to call the child; several are called NAME-1, NAME-2 and so on [default: their ids]
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    count: u32,
    /// End each after this time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ttl: Option<Duration>,
    /// Memory that each is expected to come to have for itself; without that much for all of them there are none
    #[arg(long, value_name = "SIZE", default_value = "16", value_parser = memory_mib)]
    reserve: u64,
    /// Give each a label to be told apart by, besides the sandbox's own
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// Print JSON: the children, and what took how long
    #[arg(long, conflicts_with = "timings")]
    json: bool,
    /// Print what took how long to standard error
    #[arg(long)]
    timings: bool,
}

/// Carries out `vmm branch`.
pub fn branch(args: &BranchArgs) -> Result<u8, CliError> {
    let sandbox = find(&args.sandbox).map_err(find_failed)?;
    living(&sandbox)?;
    let request = BranchRequest {
        count: args.count,
        name: args.name.clone(),
        ttl_ms: args.ttl.map(millis),
        labels: args.label.iter().cloned().collect(),
        reserve_mib: args.reserve,
    };
    let socket = sandbox.paths.api_socket();
    let view: BranchView = ask(&socket, "POST", "/v1/branch", &request, PATIENCE)
        .map_err(|error| failed(&sandbox, &error))?;
    if args.json {
        return print_json(&view);
    }
    if args.timings {
        show_timings(&view);
    }
    let names: String = view
        .children
        .iter()
        .map(|child| child.name.clone() + "\n")
        .collect();
    print(names.as_bytes())
}

fn show_timings(view: &BranchView) {
    let written = format!(
        "memory written: {} pages",
        view.data_pages + view.zero_pages
    );
    let last = |of: fn(&ChildView) -> u64| view.children.iter().map(of).max().unwrap_or(0);
    print_timings(&[
        (view.state_us, "of its pause: state had"),
        (view.freeze_us, "of its pause: memory frozen"),
        (view.pause_us, "of its pause: running again"),
        (view.written_us, &written),
        (last(|child| child.running_us), "all children running"),
        (last(|child| child.answered_us), "all children ready"),
        (view.total_us, "done"),
    ]);
}
