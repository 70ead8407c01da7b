//! `vmm metrics`: what a sandbox has done and has, for Prometheus.

use std::time::Duration;

use clap::Args;

use super::lifecycle::{failed, living};
use super::{CliError, find_failed, print};
use crate::control::client::ask_for_text;
use crate::sandbox::list::find;

/// How long the sandbox may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Print what a sandbox has done, how long that took and what it has, as OpenMetrics text, which Prometheus reads
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// The sandbox: its name, or the beginning of its id
    #[arg(value_name = "SANDBOX")]
    sandbox: String,
}

/// Carries out `vmm metrics`.
pub fn metrics(args: &MetricsArgs) -> Result<u8, CliError> {
    let sandbox = find(&args.sandbox).map_err(find_failed)?;
    living(&sandbox)?;
    let socket = sandbox.paths.api_socket();
    let text = ask_for_text(&socket, "/v1/metrics", PATIENCE);
    let text = text.map_err(|error| failed(&sandbox, &error))?;
    print(text.as_bytes())
}
