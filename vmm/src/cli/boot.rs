//! `vmm boot`: boots a kernel with its console on standard error, and waits until it ends.
//!
//! It needs no agent, so it boots any kernel and image; `vmm run` is what runs programs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::sizes::duration;
use super::vm_args::{VmArgs, installed_image, installed_kernel};
use super::{CliError, status};
use crate::builder;
use crate::config::{ConsoleConfig, DriveConfig, VmConfig};
use crate::exit::ExitReason;
use crate::kvm::install_kick_handler;
use crate::timings::Timings;

/// Boot a kernel without an agent, its console on standard error, and wait until it ends
#[derive(Debug, Args)]
pub struct BootArgs {
    #[command(flatten)]
    vm: VmArgs,
    /// Disk that the guest may only read; the first disk is /dev/vda
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Stop after this time: seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// Print how long each phase took
    #[arg(long)]
    timings: bool,
}

/// Carries out `vmm boot`.
pub fn boot(args: &BootArgs, start: Instant) -> Result<u8, CliError> {
    let timings = Arc::new(Timings::since(start));
    let mut drives = Vec::new();
    if let Some(path) = &args.image {
        let path = installed_image(Some(path))?;
        drives.push(DriveConfig { path, read_only: true });
    }
    let config = VmConfig {
        cpus: args.vm.cpus,
        memory_mib: args.vm.memory,
        kernel: installed_kernel(args.vm.kernel.as_deref())?,
        cmdline: args.vm.cmdline.clone(),
        drives,
        vsock: None,
        console: ConsoleConfig::Stderr,
    };
    install_kick_handler().map_err(|error| CliError::Monitor(error.to_string()))?;
    let machine = builder::build(&config, &timings)?;

    let rest = args
        .timeout
        .map(|timeout| timeout.saturating_sub(start.elapsed()));
    let timespec = rest.and_then(|rest| Timespec::try_from(rest).ok());
    let mut fds = [PollFd::new(machine.exit().event(), PollFlags::IN)];
    poll(&mut fds, timespec.as_ref()).map_err(|errno| CliError::Monitor(errno.to_string()))?;
    let reason = machine.exit().get();
    timings.mark("VM ended");
    drop(machine);
    if args.timings {
        eprint!("{timings}");
    }
    match reason {
        Some(ExitReason::Reset) => Ok(0),
        Some(reason) => Err(CliError::Vm {
            reason,
            console: String::new(),
        }),
        None => {
            eprintln!(
                "vmm: timed out after {:?}",
                args.timeout.unwrap_or_default()
            );
            Ok(status::TIMEOUT)
        }
    }
}
