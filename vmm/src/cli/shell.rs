//! `vmm shell`: the process of a sandbox that goes on from a moment of another, before it is told which. For monitors and pools only.
//!
//! Its standard input is a socket. With a machine described it makes what it can of that, and says so by a byte. Then it is handed what it is to
//! be; says, as a line of JSON, that it is ready, or why it is not; and lives on when it is told so by a byte. When the socket closes before, it ends.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use snapshot_fmt::manifest::Machine;

use super::CliError;
use super::detached::{self, Announce};
use super::launch::{Launch, Source, confine, vsock};
use super::vm_spec::VmSpec;
use crate::builder::Shell;
use crate::config::ConsoleConfig;
use crate::confinement;
use crate::control::types::ChildView;
use crate::handover::{self, Word};
use crate::pool::kind;
use crate::sandbox::{SandboxDir, SandboxPaths, runtime_dir};
use crate::snapshot::branch::Begun;
use crate::snapshot::restore::Base;
use crate::snapshot::{SnapshotError, description};
use crate::store::Store;
use crate::supervisor::Supervisor;
use crate::timings::Timings;

/// Go on from a moment of another sandbox, which its monitor hands over on standard input
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// Make a machine like this ahead
    #[arg(long, value_name = "JSON")]
    machine: Option<String>,
    /// Whoever starts this is confined, and so is this
    #[arg(long)]
    confined: bool,
}

/// Longest reason that is told, in characters: it may have the end of the guest's console.
const WHY_MAX: usize = 8000;

/// Carries out `vmm shell`.
pub fn shell(args: &ShellArgs) -> Result<u8, CliError> {
    let broken = |error: io::Error| CliError::Monitor(format!("the handover failed: {error}"));
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(broken)?;
    let parent = Parent {
        socket: UnixStream::from(socket),
    };
    match be(args, &parent) {
        Err(error) => {
            // Nobody may be there to hear it.
            let why = error.to_string().chars().take(WHY_MAX).collect();
            let _ = parent.say(&Word::Failed(why));
            Err(error)
        }
        done => done,
    }
}

/// What was made ahead, and of what.
fn prepare(args: &ShellArgs) -> Result<Option<(Machine, Shell)>, CliError> {
    let Some(json) = &args.machine else {
        return Ok(None);
    };
    let bad = |error: &dyn std::fmt::Display| CliError::BadInput(format!("--machine: {error}"));
    let machine: Machine = serde_json::from_str(json).map_err(|error| bad(&error))?;
    // Where the sandbox will be does not count.
    let vsock = vsock(&SandboxPaths::new(runtime_dir()));
    let config = description::config(&machine, Some(vsock), ConsoleConfig::Kept)
        .map_err(|error| bad(&error))?;
    Ok(Some((machine, Shell::new(&config)?)))
}

fn be(args: &ShellArgs, parent: &Parent) -> Result<u8, CliError> {
    let broken = |error: io::Error| CliError::Monitor(format!("the handover failed: {error}"));
    if args.confined {
        confinement::inherit();
    }
    confine()?;
    let made = prepare(args)?;
    if made.is_some() {
        (&parent.socket).write_all(b"\n").map_err(broken)?;
    }
    let Some((handover, files)) = handover::receive(&parent.socket).map_err(broken)? else {
        return Ok(0);
    };
    // However long it has waited for this.
    let start = Instant::now();
    let bad = |error: SnapshotError| CliError::BadInput(error.to_string());
    let base = handover
        .base
        .map(|(store, id)| Base::open(&Store::at(&store), &id.to_string()));
    let made = made.filter(|(machine, _)| *machine == kind(&handover.machine));
    let begun = Begun {
        machine: handover.machine,
        programs: handover.programs,
        warm: handover.warm.as_ref().map(Into::into),
        files,
        disks: handover.disks,
        base: base.transpose().map_err(bad)?,
        moment: handover.moment,
    };
    let saved = begun.open().map_err(bad)?;
    let launch = Launch {
        spec: VmSpec {
            name: handover.name,
            labels: handover.labels,
            budget: handover.budget,
            guest_branch: handover.guest_branch,
            timeout: handover.timeout_ms.map(Duration::from_millis),
            ..VmSpec::of_saved(&saved)
        },
        source: Source::Saved(Arc::new(saved)),
        cached: false,
        branch: handover.branch,
        ask: handover.ask.map(|ask| (ask, handover.number)),
        shell: made.map(|(_, shell)| shell),
    };
    let child = Child {
        parent,
        since: handover.since,
    };
    detached::monitor(launch, false, start, &child)
}

/// Who has started this process, or taken it from a pool.
struct Parent {
    socket: UnixStream,
}

impl Parent {
    fn say(&self, word: &Word) -> io::Result<()> {
        let mut line = serde_json::to_vec(word)?;
        line.push(b'\n');
        (&self.socket).write_all(&line)
    }
}

/// What this process is now.
struct Child<'a> {
    parent: &'a Parent,
    /// When the parent was asked for it.
    since: u64,
}

impl Announce for Child<'_> {
    /// Says that this child is ready, and waits to be told that its siblings are, too.
    fn ready(
        &self,
        sandbox: &SandboxDir,
        timings: &Timings,
        supervisor: &Supervisor,
    ) -> io::Result<bool> {
        let at = |name| timings.since_us(name, self.since).unwrap_or(0);
        self.parent.say(&Word::Ready(ChildView {
            id: sandbox.id().to_owned(),
            name: sandbox.name().to_owned(),
            running_us: at("first KVM_RUN"),
            answered_us: at("guest told"),
        }))?;
        // A guest that ends meanwhile is no child, and what is connected to it must not wait.
        let told = supervisor.wait(self.parent.socket.as_fd(), supervisor.deadline);
        Ok(told.is_ok() && (&self.parent.socket).read(&mut [0])? > 0)
    }

    fn listed(&self) {
        // Nobody may wait for it any more.
        let _ = (&self.parent.socket).write_all(b"\n");
    }

    /// Nothing is left of a child that is killed before it is wanted.
    fn is_wanted(&self) -> bool {
        false
    }
}
