//! A sandbox that lives on by itself.
//!
//! A subcommand starts itself a second time as the sandbox's monitor, which says on its standard output when the guest is ready,
//! and then leaves the terminal. Until then both belong to the same process group: an interrupt ends them both.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use snapshot_fmt::state::agent::AgentState;

use super::launch::{Launch, become_monitor};
use super::ready::{Boot, listen_for_agent};
use super::{CliError, ending_status, print};
use crate::agent::{AGENT_PORT, Agent, Child};
use crate::config::{ConsoleConfig, VmConfig};
use crate::control::rollback::Reception;
use crate::control::routes::Control;
use crate::control::server::Server;
use crate::control::snapshot::{Past, Snapshots};
use crate::exit::ExitReason;
use crate::machine::Machine;
use crate::pager::Mode;
use crate::sandbox::budget::Budget;
use crate::sandbox::record::{ExitRecord, Record, now};
use crate::sandbox::{SandboxDir, SandboxPaths, remove_dead};
use crate::sizes::memory_mib;
use crate::snapshot::description::describe;
use crate::supervisor::{Ending, Supervisor, end_by_force};
use crate::sys::{heap, stack};
use crate::timings::Timings;

/// How long a guest may take to end where its monitor is told to end by a signal.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(10);
/// How long the last requests may take to be answered.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// What every sandbox that lives on may be given.
#[derive(Debug, Args)]
pub struct DetachedArgs {
    /// Give it a label to be told apart by
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = label)]
    pub label: Vec<(String, String)>,
    /// Refuse children where the memory that the sandbox and all that branch off it have for themselves would be over this: MiB, or with M, G, T
    #[arg(long, value_name = "SIZE", value_parser = memory_mib)]
    pub tree_memory: Option<u64>,
    /// Refuse children where the sandbox and all that branch off it would be more than this
    #[arg(long, value_name = "N")]
    pub tree_sandboxes: Option<u32>,
    /// Let programs of the guest make children of the sandbox (`bough branch`), at most N alive at a time; the children make none
    #[arg(long, value_name = "N")]
    pub guest_branch: Option<u32>,
    /// Keep at most this of what its writable drives were for those that branch off it, and each of those for theirs; beyond it the children that would need more lose their drives, and the
    /// sandbox writes on: MiB, or with M, G, T [default: as the file system of its directory has room]
    #[arg(long, value_name = "SIZE", value_parser = memory_mib)]
    pub drive_backup: Option<u64>,
    /// Print JSON: what `vmm inspect` prints
    #[arg(long)]
    pub json: bool,
    /// Be the monitor
    #[arg(long, hide = true)]
    pub monitor: bool,
}

impl DetachedArgs {
    /// What the sandbox and all that branch off it may have together.
    pub fn budget(&self) -> Budget {
        Budget {
            memory_mib: self.tree_memory,
            sandboxes: self.tree_sandboxes,
            drive_backup_mib: self.drive_backup,
        }
    }
}

pub fn label(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("give KEY=VALUE"),
    }
}

/// Starts this command again as the monitor, and prints the sandbox's name once it is ready. `doing` is what a terminal shows meanwhile.
pub fn start(args: &DetachedArgs, doing: &str) -> Result<u8, CliError> {
    let failed = |error: io::Error| CliError::Monitor(format!("cannot start the monitor: {error}"));
    let mut words: Vec<_> = std::env::args_os().skip(1).collect();
    // Directly behind the subcommand, which is the first word.
    words.insert(1.min(words.len()), "--monitor".into());
    let mut child = Command::new("/proc/self/exe")
        .arg0("vmm")
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let terminal = io::stderr().is_terminal();
    if terminal {
        let _ = write!(io::stderr(), "{doing}\u{2026}");
    }
    let mut id = String::new();
    let read = child
        .stdout
        .take()
        .map_or(Ok(0), |stdout| BufReader::new(stdout).read_line(&mut id));
    if terminal {
        let _ = write!(io::stderr(), "\r\u{1b}[K");
    }
    if read.map_err(failed)? == 0 {
        // It has said why.
        let status = child.wait().map_err(failed)?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return code.map_or_else(
            || {
                Err(CliError::Monitor(format!(
                    "the monitor was killed ({status})"
                )))
            },
            Ok,
        );
    }
    print_name(args, id.trim())
}

/// Prints what a user gets of a sandbox that is ready: its name, or all that is known.
pub fn print_name(args: &DetachedArgs, id: &str) -> Result<u8, CliError> {
    if args.json {
        return super::inspect::show(id);
    }
    let found = crate::sandbox::list::find(id);
    let name = found.map_or_else(|_| id.to_owned(), |sandbox| sandbox.record.name);
    print((name + "\n").as_bytes())
}

fn record(sandbox: &SandboxDir, launch: &Launch, config: &VmConfig) -> Record {
    let vm = &launch.spec;
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let env = vm.env.iter().map(|var| {
        let value = String::from_utf8_lossy(&var.value).into_owned();
        (var.name.clone(), value)
    });
    Record {
        id: sandbox.id().to_owned(),
        name: sandbox.name().to_owned(),
        pid: std::process::id(),
        created: now(),
        kept: true,
        cpus: config.cpus,
        memory_mib: config.memory_mib,
        kernel: text(&config.kernel),
        image: config
            .drives
            .first()
            .map_or(String::new(), |drive| text(&drive.path)),
        labels: vm.labels.clone(),
        env: env.collect(),
        cwd: vm.cwd.clone(),
        user: vm.user.clone(),
        warm: vm.warm.clone(),
        branch: launch.branch.clone(),
        budget: vm.budget,
        guest_branch: vm.guest_branch,
    }
}

/// Who is told that a sandbox is ready.
pub trait Announce {
    /// Tells it. False, or an error, where nobody wants the sandbox any more.
    fn ready(
        &self,
        sandbox: &SandboxDir,
        timings: &Timings,
        supervisor: &Supervisor,
        machine: &Machine,
    ) -> io::Result<bool>;

    /// Its agent has answered, and not everything is ready yet.
    fn answered(&self, _: &Machine) {}

    /// Tells that the sandbox is listed as one of its own.
    fn listed(&self) {}

    /// Whether the sandbox is to be listed after its end although nobody has said yet that it is wanted.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// Whoever started this process waits for the sandbox's id on its standard output.
pub struct Starter;

impl Announce for Starter {
    fn ready(
        &self,
        sandbox: &SandboxDir,
        _: &Timings,
        _: &Supervisor,
        _: &Machine,
    ) -> io::Result<bool> {
        writeln!(io::stdout(), "{}", sandbox.id())?;
        io::stdout().flush()?;
        Ok(true)
    }
}

/// Is the sandbox itself: makes its machine, and serves it until it ends. When it is ready, `starter` is told.
pub fn monitor(
    mut launch: Launch,
    show_timings: bool,
    start: Instant,
    starter: &impl Announce,
) -> Result<u8, CliError> {
    let timings = Arc::new(Timings::since(start));
    let broken = |error: io::Error| CliError::Monitor(error.to_string());
    let bad = |error: crate::sandbox::SandboxError| CliError::BadInput(error.to_string());
    let signals = become_monitor()?;

    if launch.branch.is_none() {
        // Children's parents have done it.
        remove_dead();
    }
    let mut sandbox = SandboxDir::create(launch.spec.name.as_deref()).map_err(bad)?;
    let paths = sandbox.paths().clone();
    let config = launch.config(&paths, ConsoleConfig::Log(paths.console()))?;
    let record = record(&sandbox, &launch, &config);
    let published = Record {
        kept: starter.is_wanted(),
        ..record.clone()
    };
    sandbox.publish(&published).map_err(bad)?;
    let ready = listen_for_agent(&paths)?;
    let (machine, cache) = launch.make(&config, &paths, &timings)?;
    let described = match launch.source.saved() {
        Some(saved) => saved.machine.clone(),
        None => describe(&config, machine.disks())
            .map_err(|error| CliError::Monitor(error.to_string()))?,
    };
    let machine = Arc::new(machine);
    let supervisor = launch
        .spec
        .supervisor(&machine, signals, start, Some(&sandbox));
    let boot = Boot {
        machine: &machine,
        supervisor: supervisor.clone(),
        start,
        timings: &timings,
    };
    let (agent, watch) = boot.agent(ready, &launch, cache, sandbox.name())?;
    starter.answered(&machine);
    if let Some(ending) = watch.end() {
        return Err(boot.cut_short(ending));
    }
    let past = Past {
        began: launch.source.saved().cloned(),
        base: launch.source.base(),
    };
    let reception = Doorman {
        paths: paths.clone(),
        // The sandbox ends in its own way.
        supervisor: Supervisor {
            forces: false,
            ..supervisor.clone()
        },
        name: launch.branch.as_ref().map(|_| record.name.clone()),
        child: launch.child(&record.name),
    };
    let control = Control::new(
        record.clone(),
        paths.clone(),
        Arc::clone(&timings),
        &machine,
        agent,
        Box::new(reception),
        Snapshots::new(described, past),
    );
    let is_guests = launch.ask.is_some();
    let wants_working_set = launch
        .source
        .saved()
        .filter(|saved| saved.mode == Mode::Fault);
    let wants_working_set = wants_working_set.cloned();
    // A sandbox that goes back elsewhere has no use for the files that it began with.
    drop(launch);
    let server = Server::start(&paths.api_socket(), Arc::clone(&control)).map_err(broken)?;
    if show_timings {
        let _ = write!(io::stderr(), "{timings}");
    }
    let unwanted =
        |error| CliError::Monitor(format!("nobody waits for the sandbox any more: {error}"));
    let wanted = starter.ready(&sandbox, &timings, &supervisor, &machine);
    if !wanted.map_err(unwanted)? {
        end_by_force(0, Some(sandbox.path()));
        return Ok(0);
    }
    control.be_born();
    if !starter.is_wanted() {
        sandbox.rewrite(&record).map_err(bad)?;
    }
    starter.listed();
    leave_terminal(&sandbox).map_err(unwanted)?;
    // What making the machine took.
    stack::trim();
    heap::trim();

    let ending = supervisor.wait_for_end();
    if let Ending::Signal(_) = ending {
        control.stop(SIGNAL_PATIENCE);
    }
    if let (Some(saved), Some(pager)) = (wants_working_set, machine.pager()) {
        saved.keep_working_set(&pager);
    }
    let exit = exit_record(&machine, &ending, control.is_stopping());
    let status = exit.status;
    // Before anything can hang: a forced end leaves at least this.
    // What a guest makes leaves nothing: it could make it for ever.
    let recorded = match is_guests {
        false => sandbox.end(&exit),
        true => Ok(()),
    };
    end_by_force(status, None);
    server.drain(DRAIN_PATIENCE);
    drop(machine);
    if let Err(error) = recorded.and_then(|()| sandbox.remove_sockets()) {
        log::warn!("cannot write down how the sandbox ended: {error}");
    }
    Ok(status)
}

/// Receives the agent of a guest that is taken back.
struct Doorman {
    paths: SandboxPaths,
    supervisor: Supervisor,
    /// The guest's own, where it is a child.
    name: Option<String>,
    /// Which child it is, to a program that asked and is where it was then.
    child: Option<Child>,
}

impl Reception for Doorman {
    fn listen(&self) -> Result<UnixListener, String> {
        let _ = std::fs::remove_file(self.paths.vsock_listener(AGENT_PORT));
        listen_for_agent(&self.paths).map_err(|error| error.to_string())
    }

    fn deadline(&self) -> Option<Instant> {
        self.supervisor.deadline
    }

    fn receive(
        &self,
        machine: &Machine,
        ready: UnixListener,
        state: Option<&AgentState>,
    ) -> Result<Agent, String> {
        let start = Instant::now();
        let boot = Boot {
            machine,
            supervisor: self.supervisor.clone(),
            start,
            timings: &Timings::since(start),
        };
        let (agent, watch) = boot
            .restored_agent(ready, state, self.name.as_deref(), self.child.clone())
            .map_err(|error| error.to_string())?;
        match watch.end() {
            None => Ok(agent),
            Some(ending) => Err(boot.cut_short(ending).to_string()),
        }
    }
}

/// Belongs to nobody from now on. What is logged goes to a file.
fn leave_terminal(sandbox: &SandboxDir) -> io::Result<()> {
    // It fails only for the leader of a process group, which has left its starter's already.
    let _ = rustix::process::setsid();
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    let log = File::create(sandbox.path().join("monitor.log"))?;
    rustix::stdio::dup2_stderr(&log)?;
    Ok(())
}

/// How it ended, for those who ask later.
fn exit_record(machine: &Machine, ending: &Ending, asked: bool) -> ExitRecord {
    let (status, reason) = match (ending, machine.exit().get()) {
        (Ending::TimedOut, _) => (
            ending_status(ending),
            "its time (--timeout) was over".to_owned(),
        ),
        (_, Some(ExitReason::Reset)) if asked => (0, "stopped".to_owned()),
        (_, Some(reason)) => (super::reason_status(&reason), reason.to_string()),
        (Ending::Vm(reason), None) => (super::reason_status(reason), reason.to_string()),
        (Ending::Signal(signal), None) => (ending_status(ending), format!("signal {signal}")),
    };
    ExitRecord {
        status,
        reason,
        ended: now(),
    }
}
