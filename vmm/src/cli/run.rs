//! `vmm run`: boots a sandbox, runs one program or piece of code in it, and ends as that ends.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use super::CliError;
use super::launch::{BootFiles, Launch, Source, become_monitor};
use super::program::{ProgramArgs, Work, failed, perform};
use super::ready::{Boot, listen_for_agent};
use super::vm_args::{CacheArgs, VmArgs};
use crate::agent::{Agent, AgentError, ShutdownMode};
use crate::config::ConsoleConfig;
use crate::exit::ExitReason;
use crate::logger::complain;
use crate::sandbox::{SandboxDir, remove_dead};
use crate::supervisor::{Ending, Supervisor, Watch, end_by_force};
use crate::timings::Timings;

/// How long a guest may take, after its program has ended, to write out the disks that it may write to.
const WRITE_OUT_TIME: Duration = Duration::from_secs(60);

/// Boot a sandbox, run a program or code in it, and end with its exit status
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    vm: VmArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Write the guest's console to this file, or to standard error for -
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    #[command(flatten)]
    program: ProgramArgs,
}

/// Carries out `vmm run`.
pub fn run(args: &RunArgs, start: Instant) -> Result<u8, CliError> {
    let timings = Arc::new(Timings::since(start));
    let vm = args.vm.resolve()?;
    let files = BootFiles::find(&vm)?;
    let work = args
        .program
        .work(&vm.env, vm.cwd.as_deref(), vm.user.as_deref())?;
    let mut launch = Launch {
        spec: vm,
        source: Source::Boot(files),
        // Who wants to see the console wants to see the boot.
        cached: !args.cache.cold && args.console.is_none(),
        branch: None,
        ask: None,
        shell: None,
    };
    // The interpreter stands ready for whoever runs this work.
    launch.spec.user = Some(work.user().to_owned());
    let signals = become_monitor()?;

    remove_dead();
    let sandbox =
        SandboxDir::create(None).map_err(|error| CliError::BadInput(error.to_string()))?;
    let ready = listen_for_agent(sandbox.paths())?;
    let console = match args.console.as_deref() {
        None => ConsoleConfig::Kept,
        Some(path) if path.as_os_str() == "-" => ConsoleConfig::Stderr,
        Some(path) => ConsoleConfig::File(path.to_owned()),
    };
    let config = launch.config(sandbox.paths(), console)?;
    let (machine, cache) = launch.make(&config, sandbox.paths(), &timings)?;
    let supervisor = launch
        .spec
        .supervisor(&machine, signals, start, Some(&sandbox));
    let writable = config.drives.iter().any(|drive| !drive.read_only);
    let boot = Boot {
        machine: &machine,
        supervisor,
        start,
        timings: &timings,
    };
    let result = boot
        .agent(ready, &launch, cache, sandbox.name())
        .and_then(|agent| work_in(&boot, agent, work, writable));
    timings.mark("program ended");
    let status = result
        .as_ref()
        .map_or_else(CliError::status, |status| *status);
    end_by_force(status, Some(sandbox.path()));
    drop(machine);
    drop(sandbox);
    if args.vm.timings {
        timings.mark("VM torn down");
        let _ = write!(io::stderr(), "{timings}");
    }
    result
}

/// Has the agent do the work. A guest with a `writable` disk is then ended in order.
fn work_in(
    boot: &Boot<'_>,
    (agent, watch): (Agent, Watch),
    work: Work,
    writable: bool,
) -> Result<u8, CliError> {
    let error = match perform(&agent, work, false) {
        // Done is done, even where the time was over just then.
        Ok(ended) => {
            if writable && watch.end().is_none() {
                write_out(agent, boot.supervisor.clone());
                boot.timings.mark("drives written out");
            }
            return Ok(ended.shell_status());
        }
        Err(error) => error,
    };
    match boot.why(&error, watch) {
        Some(why) => Err(why),
        None => failed(&error, ""),
    }
}

/// Ends the guest in order, so that it writes out what its kernel still holds back of its disks.
fn write_out(agent: Agent, supervisor: Supervisor) {
    let deadline = Some(Instant::now() + WRITE_OUT_TIME);
    agent.set_deadline(deadline);
    let asked = agent.shutdown(ShutdownMode::PowerOff, Duration::ZERO);
    let why = match asked {
        // A guest that resets itself lets go of its connections first.
        Ok(()) | Err(AgentError::Disconnected | AgentError::Socket(_)) => {
            let supervisor = Supervisor {
                deadline,
                ..supervisor
            };
            match supervisor.wait_for_end() {
                Ending::Vm(ExitReason::Reset) => return,
                Ending::Vm(reason) => reason.to_string(),
                Ending::Signal(signal) => format!("signal {signal} came first"),
                Ending::TimedOut => format!("it took longer than {WRITE_OUT_TIME:?}"),
            }
        }
        Err(error) => error.to_string(),
    };
    complain(format_args!(
        "warning: the guest may not have written out all of its drives: {why}; check the file systems on them"
    ));
}
