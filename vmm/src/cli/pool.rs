//! `vmm pool`: keeps processes ready for sandboxes to come.

use std::io::Write;

use clap::Args;

use super::launch::BootFiles;
use super::vm_args::VmArgs;
use super::{CliError, print};
use crate::config::ConsoleConfig;
use crate::devices::live::Disks;
use crate::host;
use crate::pool::demand::Bounds;
use crate::pool::server::{Pool, PoolError};
use crate::sandbox::{SandboxPaths, make_runtime_dir, runtime_dir};
use crate::snapshot::description::describe;
use crate::supervisor::Signals;

/// Keep processes ready that `vmm branch`, `vmm explore` and `vmm restore` take over, until it is told to end
///
/// What the host is slow at is done in them ahead of time, for machines like the one that is described, and for those that are asked for later. Without a
/// pool, or where it has none ready, all works the same, and takes longer.
#[derive(Debug, Args)]
pub struct PoolArgs {
    /// How many to keep ready for each kind of machine, at least
    #[arg(long, value_name = "N", default_value_t = 2)]
    size: usize,
    /// How many at most, where many are asked for at once [default: as --size, but at least 16]
    #[arg(long, value_name = "N")]
    max: Option<usize>,
    #[command(flatten)]
    vm: VmArgs,
}

/// Carries out `vmm pool`.
pub fn pool(args: &PoolArgs) -> Result<u8, CliError> {
    let failed = |error: std::io::Error| CliError::Monitor(error.to_string());
    let bounds = Bounds {
        floor: args.size,
        ceiling: args.max.unwrap_or_else(|| args.size.max(16)),
    };
    if bounds.ceiling < bounds.floor {
        let message = format!(
            "--max {} is less than --size {}",
            bounds.ceiling, bounds.floor
        );
        return Err(CliError::BadInput(message));
    }
    let vm = args.vm.resolve()?;
    // Where a sandbox will be does not count.
    let paths = SandboxPaths::new(runtime_dir());
    let config = vm.machine_config(BootFiles::find(&vm)?, Some(&paths), ConsoleConfig::Kept);
    let machine =
        describe(&config, &Disks::new()).map_err(|error| CliError::BadInput(error.to_string()))?;
    let signals = Signals::catch().map_err(failed)?;
    host::raise_open_files_limit();
    let dir = make_runtime_dir().map_err(|error| CliError::BadInput(error.to_string()))?;
    let mut pool = Pool::new(&dir, bounds, vec![machine]).map_err(|error| match error {
        PoolError::Running { .. } | PoolError::Io { .. } => CliError::BadInput(error.to_string()),
    })?;
    print(b"ready\n")?;
    let _ = std::io::stdout().flush();
    pool.serve(signals.event()).map_err(failed)?;
    Ok(0)
}
