//! `vmm boot`: boots a kernel with its console on standard error, and waits until it ends.
//!
//! It needs no agent, so it boots any kernel and image; `vmm run` is what runs programs.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use super::launch::{BootFiles, become_monitor};
use super::vm_args::{VmArgs, installed_image, installed_kernel};
use super::{CliError, ending_status};
use crate::builder::{self, Origin};
use crate::config::ConsoleConfig;
use crate::exit::ExitReason;
use crate::supervisor::{Ending, end_by_force};
use crate::timings::Timings;

/// Boot a kernel without an agent, its console on standard error, and wait until it ends
///
/// Without an image the first drive holds the root file system. A guest that resets or powers itself off ends well, with status 0; so does one that panics and then resets.
#[derive(Debug, Args)]
pub struct BootArgs {
    #[command(flatten)]
    vm: VmArgs,
}

/// Carries out `vmm boot`.
pub fn boot(args: &BootArgs, start: Instant) -> Result<u8, CliError> {
    if args.vm.warm.is_some() {
        let message =
            "--warm needs the guest's agent, which boot does without: give it to run or start";
        return Err(CliError::BadInput(message.to_owned()));
    }
    let timings = Arc::new(Timings::since(start));
    let vm = args.vm.resolve()?;
    let image = vm.image.as_deref().map(|path| installed_image(Some(path)));
    let files = BootFiles {
        kernel: installed_kernel(vm.kernel.as_deref())?,
        image: image.transpose()?,
    };
    let signals = become_monitor()?;
    let config = vm.machine_config(files, None, ConsoleConfig::Stderr);
    let machine = builder::build(&config, Origin::Boot, None, &timings)?;

    let ending = vm.supervisor(&machine, signals, start, None).wait_for_end();
    timings.mark("VM ended");
    end_by_force(ending_status(&ending), None);
    drop(machine);
    if args.vm.timings {
        let _ = write!(std::io::stderr(), "{timings}");
    }
    match ending {
        Ending::Vm(ExitReason::Reset) => Ok(0),
        // The console was printed as it came.
        Ending::Vm(reason) => Err(CliError::Vm {
            reason,
            console: String::new(),
        }),
        Ending::Signal(signal) => Err(CliError::Signal(signal)),
        Ending::TimedOut => Err(CliError::Timeout(start.elapsed())),
    }
}
