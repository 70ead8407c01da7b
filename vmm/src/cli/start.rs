//! `vmm start`: a sandbox that lives on by itself, until `vmm stop`, its time, or its guest ends it.

use std::time::Instant;

use clap::Args;

use super::CliError;
use super::detached::{self, DetachedArgs, Starter};
use super::launch::{BootFiles, Launch, Source};
use super::vm_args::{CacheArgs, VmArgs};

/// Start a sandbox that lives on by itself, and print its name once its guest is ready
#[derive(Debug, Args)]
pub struct StartArgs {
    /// What to call it [default: its id]
    #[arg(value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    vm: VmArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    detached: DetachedArgs,
}

/// Carries out `vmm start`.
pub fn start(args: &StartArgs, start: Instant) -> Result<u8, CliError> {
    if !args.detached.monitor {
        return detached::start(&args.detached, "booting");
    }
    let mut spec = args.vm.resolve()?;
    spec.name = args.name.clone().or(spec.name);
    spec.budget = args.detached.budget().or(spec.budget);
    spec.guest_branch = args.detached.guest_branch.unwrap_or(spec.guest_branch);
    spec.labels.extend(args.detached.label.iter().cloned());
    let source = Source::Boot(BootFiles::find(&spec)?);
    let launch = Launch {
        spec,
        source,
        cached: !args.cache.cold,
        branch: None,
        ask: None,
        shell: None,
    };
    detached::monitor(launch, args.vm.timings, start, &Starter)
}
