//! `vmm restore`: a sandbox that goes on where a snapshot was taken.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use snapshot_fmt::manifest::STATE;

use super::detached::{self, DetachedArgs, Starter};
use super::launch::{Launch, Source};
use super::vm_spec::VmSpec;
use super::{CliError, print_timings};
use crate::handover::{Handover, Unborn};
use crate::pager::Mode;
use crate::pool;
use crate::sandbox::runtime_dir;
use crate::sizes::duration;
use crate::snapshot::SnapshotError;
use crate::snapshot::restore::Saved;
use crate::store::Store;
use crate::timings::{millis, monotonic_ns};

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

fn open(args: &RestoreArgs) -> Result<Saved, CliError> {
    Store::of_user()
        .map_err(SnapshotError::from)
        .and_then(|store| Saved::open(&store, &args.snapshot, args.pages.into()))
        .map_err(|error| CliError::BadInput(error.to_string()))
}

/// Restores the snapshot in a process of the pool, and gives the sandbox's id. None where the pool has no process for it, or it needs more
/// than one of those can do.
fn restore_in_shell(args: &RestoreArgs) -> Result<Option<String>, CliError> {
    let since = monotonic_ns();
    let saved = open(args)?;
    let refused = |error: SnapshotError| CliError::BadInput(error.to_string());
    let pages = saved.pages().map_err(refused)?;
    if saved.mode != Mode::Map || !pages.working_set.is_empty() {
        return Ok(None);
    }
    let layers = pages.chain.layers();
    let mut taken = pool::take(&runtime_dir(), &saved.machine, layers, 1);
    let (Some(base), Some(shell)) = (&saved.base, taken.shells.pop()) else {
        return Ok(None);
    };
    let mut handover = Handover {
        name: None,
        timeout_ms: args.timeout.map(millis),
        labels: args.detached.label.iter().cloned().collect(),
        budget: args.detached.budget(),
        guest_branch: args.detached.guest_branch.unwrap_or(0),
        ask: None,
        number: 0,
        branch: None,
        machine: saved.machine.clone(),
        programs: saved.programs.clone(),
        warm: saved.warm.as_ref().and_then(|warm| warm.try_into().ok()),
        base: Some(base.place()),
        disks: Vec::new(),
        is_late: false,
        stands_still: false,
        since,
        moment: None,
    };
    let failed = |error: std::io::Error| CliError::Monitor(format!("cannot restore it: {error}"));
    let state = File::open(base.held.snapshot().path(STATE)).map_err(failed)?;
    let files: Vec<_> = [&state]
        .into_iter()
        .chain(layers.iter().map(|layer| layer.file()))
        .collect();
    let unborn = Unborn::new(args.name.clone(), 0, shell).map_err(failed)?;
    if unborn.send(&mut handover, &files).is_err() {
        // It has died since.
        return Ok(None);
    }
    let view = unborn.ready().map_err(CliError::BadInput)?;
    unborn.release().map_err(failed)?;
    unborn.settle();
    if args.timings {
        print_timings(&[
            (view.running_us, "first KVM_RUN"),
            (view.answered_us, "guest told"),
        ]);
    }
    Ok(Some(view.id))
}

/// Carries out `vmm restore`.
pub fn restore(args: &RestoreArgs, start: Instant) -> Result<u8, CliError> {
    if !args.detached.monitor {
        if pool::socket_in(&runtime_dir()).exists()
            && let Some(id) = restore_in_shell(args)?
        {
            return detached::print_name(&args.detached, &id);
        }
        return detached::start(&args.detached, "restoring");
    }
    let saved = open(args)?;
    let spec = VmSpec {
        name: args.name.clone(),
        labels: args.detached.label.iter().cloned().collect(),
        budget: args.detached.budget(),
        guest_branch: args.detached.guest_branch.unwrap_or(0),
        timeout: args.timeout,
        ..VmSpec::of_saved(&saved)
    };
    let launch = Launch {
        spec,
        source: Source::Saved(Arc::new(saved)),
        cached: false,
        branch: None,
        ask: None,
        shell: None,
    };
    detached::monitor(launch, args.timings, start, &Starter)
}
