//! `vmm restore`: a sandbox that goes on where a snapshot was taken.

use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use super::CliError;
use super::detached::{self, DetachedArgs, Starter};
use super::launch::{Launch, Source};
use super::vm_spec::VmSpec;
use crate::pager::Mode;
use crate::sizes::duration;
use crate::snapshot::SnapshotError;
use crate::snapshot::restore::Saved;
use crate::store::Store;

/// Start a sandbox that goes on where a snapshot was taken, and print its name
///
/// Any number may go on from one snapshot, at once.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The snapshot: its name, or the beginning of its id
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// What to call the sandbox [default: its id]
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// How its memory comes: mapped from the files, or page by page when one is wanted, each checked
    #[arg(long, value_name = "HOW", value_enum, default_value = "map")]
    pages: PagesArg,
    /// End it after this time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// Print when each step was done to standard error
    #[arg(long)]
    timings: bool,
    #[command(flatten)]
    detached: DetachedArgs,
}

/// The ways of [`Mode`].
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PagesArg {
    /// Mapped from the snapshot's files
    Map,
    /// By faults, each page checked
    Fault,
}

impl From<PagesArg> for Mode {
    fn from(arg: PagesArg) -> Self {
        match arg {
            PagesArg::Map => Self::Map,
            PagesArg::Fault => Self::Fault,
        }
    }
}

/// Carries out `vmm restore`.
pub fn restore(args: &RestoreArgs, start: Instant) -> Result<u8, CliError> {
    if !args.detached.monitor {
        return detached::start(&args.detached, "restoring");
    }
    let saved = Store::of_user()
        .map_err(SnapshotError::from)
        .and_then(|store| Saved::open(&store, &args.snapshot, args.pages.into()))
        .map_err(|error| CliError::BadInput(error.to_string()))?;
    let spec = VmSpec {
        name: args.name.clone(),
        labels: args.detached.label.iter().cloned().collect(),
        timeout: args.timeout,
        ..VmSpec::of_saved(&saved)
    };
    let launch = Launch {
        spec,
        source: Source::Saved(Box::new(saved)),
        cached: false,
        branch: None,
        shell: None,
    };
    detached::monitor(launch, args.timings, start, &Starter)
}
