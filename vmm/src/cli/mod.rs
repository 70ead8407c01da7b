//! The command line: arguments to calls, one file per subcommand.
//!
//! Exit statuses: a program's own where one ran (128 + n if signal n killed it), 2 for bad input, and those of [`status`]
//! where the VM or the monitor failed.

mod boot;
mod branch;
mod cache;
mod completions;
mod cp;
mod detached;
mod diff;
mod doctor;
mod exec;
mod explore;
mod inspect;
mod launch;
mod lifecycle;
mod logs;
mod ls;
mod man;
mod metrics;
mod pool;
mod program;
mod ready;
mod restore;
mod rollback;
mod run;
mod shell;
mod snap;
mod snapshot;
mod start;
mod terminal;
mod usage;
mod vm_args;
mod vm_spec;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use thiserror::Error;

use crate::builder::BuildError;
use crate::devices::virtio::vsock::VsockError;
use crate::exit::ExitReason;
use crate::kvm::KvmError;
use crate::logger::complain;
use crate::supervisor::Ending;

/// Exit statuses of `vmm` where no program's own is to be had.
pub mod status {
    /// Bad input: an argument, a file or the host is not as it must be.
    pub const BAD_INPUT: u8 = 2;
    /// A virtual processor died, or KVM gave up.
    pub const VCPU_DIED: u8 = 120;
    /// KVM could not emulate an instruction.
    pub const EMULATION_FAILURE: u8 = 121;
    /// The guest ended in a triple fault.
    pub const TRIPLE_FAULT: u8 = 122;
    /// The guest reset, panicked or powered off before the work was done.
    pub const GUEST_ENDED: u8 = 123;
    /// The time given by `--timeout` was over.
    pub const TIMEOUT: u8 = 124;
    /// The monitor itself failed.
    pub const MONITOR: u8 = 125;
    /// Stopped by force: what SIGKILL makes of a process.
    pub const KILLED: u8 = 137;
    /// Nobody reads the output any more: what SIGPIPE would have made of it.
    pub const BROKEN_PIPE: u8 = 141;
}

/// A microVM monitor that branches.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Start(start::StartArgs),
    Restore(restore::RestoreArgs),
    Snapshot(snapshot::SnapshotArgs),
    Rollback(rollback::RollbackArgs),
    Diff(diff::DiffArgs),
    Branch(branch::BranchArgs),
    Explore(explore::ExploreArgs),
    Pool(pool::PoolArgs),
    Exec(exec::ExecArgs),
    Cp(cp::CpArgs),
    Logs(logs::LogsArgs),
    Metrics(metrics::MetricsArgs),
    Ls(ls::LsArgs),
    Inspect(inspect::InspectArgs),
    Pause(lifecycle::PauseArgs),
    Resume(lifecycle::ResumeArgs),
    Stop(lifecycle::StopArgs),
    Rm(lifecycle::RmArgs),
    Snap(snap::SnapArgs),
    Cache(cache::CacheArgs),
    Boot(boot::BootArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
    #[command(hide = true)]
    Shell(shell::ShellArgs),
}

/// A failure that ends the process: a message of one line or more, and a status.
#[derive(Debug, Error)]
pub enum CliError {
    /// Bad input.
    #[error("{0}")]
    BadInput(String),
    /// The machine could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The VM ended before the work was done.
    #[error("{reason}{}", console_tail(.console))]
    Vm {
        /// Why.
        reason: ExitReason,
        /// The last of what the guest printed.
        console: String,
    },
    /// The guest's agent did not say that it is ready.
    #[error(
        "the guest's agent was not ready after {waited:?}: look at the console (--console -); the image must be one of tools/build-image, or start that agent as its init{}",
        console_tail(.console)
    )]
    NoAgent {
        /// How long it was waited for.
        waited: Duration,
        /// The last of what the guest printed.
        console: String,
    },
    /// The monitor was told to end.
    #[error("ended by signal {0}")]
    Signal(u8),
    /// The time was over.
    #[error("timed out after {0:.1?} (--timeout)")]
    Timeout(Duration),
    /// The monitor itself failed.
    #[error("{0}")]
    Monitor(String),
}

impl CliError {
    fn status(&self) -> u8 {
        use KvmError::{ApiVersion, Capability, Missing, Open, Permission};
        match self {
            Self::BadInput(_) => status::BAD_INPUT,
            Self::Build(error) => match error {
                BuildError::Config(_)
                | BuildError::Kernel(_)
                | BuildError::Boot(_)
                | BuildError::Memory(_)
                | BuildError::Drive(_)
                | BuildError::Block(_)
                | BuildError::TooManyDevices { .. }
                | BuildError::Console { .. }
                | BuildError::Vsock(VsockError::Listen { .. })
                | BuildError::Kvm(Missing | Permission | Open(_) | ApiVersion(_) | Capability(_)) => {
                    status::BAD_INPUT
                }
                _ => status::MONITOR,
            },
            Self::Vm { reason, .. } => reason_status(reason),
            Self::NoAgent { .. } => status::GUEST_ENDED,
            Self::Signal(signal) => signal.saturating_add(128),
            Self::Timeout(_) => status::TIMEOUT,
            Self::Monitor(_) => status::MONITOR,
        }
    }
}

/// Prints a value as JSON for programs and people.
fn print_json(value: &impl serde::Serialize) -> Result<u8, CliError> {
    let json = serde_json::to_string_pretty(value);
    let json = json.map_err(|error| CliError::Monitor(error.to_string()))? + "\n";
    print(json.as_bytes())
}

/// Prints for `--timings` what a sandbox's answer says of its steps: microseconds, and what was done by then.
fn print_timings(steps: &[(u64, &str)]) {
    for (us, what) in steps {
        // Who does not read it does not want it.
        let _ = writeln!(std::io::stderr(), "{:10.2} ms  {what}", *us as f64 / 1e3);
    }
}

/// No sandbox of that name is bad input.
fn find_failed(error: crate::sandbox::list::FindError) -> CliError {
    CliError::BadInput(error.to_string())
}

fn reason_status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::Reset => status::GUEST_ENDED,
        ExitReason::TripleFault { .. } => status::TRIPLE_FAULT,
        ExitReason::Emulation { .. } => status::EMULATION_FAILURE,
        ExitReason::VcpuDied { .. } => status::VCPU_DIED,
        ExitReason::Stopped => status::KILLED,
        ExitReason::Monitor(_) => status::MONITOR,
    }
}

/// The exit status for what cut a sandbox's work short.
fn ending_status(ending: &Ending) -> u8 {
    match ending {
        Ending::Vm(reason) => reason_status(reason),
        Ending::Signal(signal) => signal.saturating_add(128),
        Ending::TimedOut => status::TIMEOUT,
    }
}

/// The last lines of the console, indented below a message.
fn console_tail(console: &str) -> String {
    const LINES: usize = 12;
    // The guest wrote it: no control character of it reaches a terminal.
    let shown = |line: &str| -> String {
        let shown = |c: char| {
            if c.is_control() && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        };
        line.trim_end().chars().map(shown).collect()
    };
    let lines: Vec<String> = console
        .lines()
        .map(shown)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() {
        return String::new();
    }
    let shown = &lines[lines.len().saturating_sub(LINES)..];
    format!(
        "\nthe guest's console ended with:\n  {}",
        shown.join("\n  ")
    )
}

/// Prints `bytes` on standard output: the last thing that a command does.
fn print(bytes: &[u8]) -> Result<u8, CliError> {
    match std::io::stdout().write_all(bytes) {
        Ok(()) => Ok(0),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(status::BROKEN_PIPE),
        Err(error) => Err(CliError::Monitor(format!(
            "cannot write standard output: {error}"
        ))),
    }
}

/// Parses the arguments and carries them out. `start` is when the process began.
pub fn main(start: Instant) -> ExitCode {
    crate::logger::install();
    // A mistake of ours ends the sandbox at once and with a status, in whatever thread it shows.
    std::panic::set_hook(Box::new(|panic| {
        complain(format_args!(
            "the monitor failed: {panic}; please report it"
        ));
        signal_hook::low_level::exit(status::MONITOR.into());
    }));
    let parsed = match shell::ShellArgs::of_process() {
        Some(args) => Ok(Command::Shell(args)),
        None => Cli::try_parse().map(|cli| cli.command),
    };
    let command = match parsed {
        Ok(command) => command,
        Err(error) => {
            if let Some(line) = usage::one_line(&error) {
                complain(line);
                return ExitCode::from(status::BAD_INPUT);
            }
            // Nothing is left to do if even this cannot be printed.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() {
                status::BAD_INPUT
            } else {
                0
            });
        }
    };
    let result = match command {
        Command::Run(args) => run::run(&args, start),
        Command::Start(args) => start::start(&args, start),
        Command::Restore(args) => restore::restore(&args, start),
        Command::Snapshot(args) => snapshot::snapshot(&args),
        Command::Rollback(args) => rollback::rollback(&args),
        Command::Diff(args) => diff::diff(&args),
        Command::Branch(args) => branch::branch(&args),
        Command::Explore(args) => explore::explore(&args),
        Command::Pool(args) => pool::pool(&args),
        Command::Shell(args) => shell::shell(&args),
        Command::Exec(args) => exec::exec(&args),
        Command::Cp(args) => cp::cp(&args),
        Command::Logs(args) => logs::logs(&args),
        Command::Metrics(args) => metrics::metrics(&args),
        Command::Ls(args) => ls::ls(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Pause(args) => lifecycle::pause(&args),
        Command::Resume(args) => lifecycle::resume(&args),
        Command::Stop(args) => lifecycle::stop(&args),
        Command::Rm(args) => lifecycle::rm(&args),
        Command::Snap(args) => snap::snap(&args),
        Command::Cache(args) => cache::cache(&args),
        Command::Boot(args) => boot::boot(&args, start),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Completions(args) => completions::completions(&args),
        Command::Man(args) => man::man(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(&error);
            ExitCode::from(error.status())
        }
    }
}
