//! `vmm shell`: the process of a sandbox that goes on from a moment of another, before it is told which. For monitors and pools only.
//!
//! Its standard input is a socket. Where it is sent a machine first, with layers that memory is likely to begin with, it makes what it can of that, and says so by a byte. Then it is handed what it is to
//! be; says, as a line of JSON, that it is ready, or why it is not; and lives on when it is told so by a byte. When the socket closes before, it ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use snapshot_fmt::manifest::Machine as Described;

use super::CliError;
use super::detached::{self, Announce};
use super::launch::{Launch, Source, confine, vsock};
use super::vm_spec::VmSpec;
use crate::builder::Shell;
use crate::config::ConsoleConfig;
use crate::confinement;
use crate::control::types::ChildView;
use crate::handover::{Handover, Word};
use crate::machine::Machine;
use crate::message;
use crate::pool::kind;
use crate::sandbox::{SandboxDir, SandboxPaths, runtime_dir};
use crate::snapshot::branch::{Begun, open_layers};
use crate::snapshot::restore::Base;
use crate::snapshot::{SnapshotError, description};
use crate::store::Store;
use crate::supervisor::Supervisor;
use crate::timings::Timings;

/// Go on from a moment of another sandbox, which its monitor hands over on standard input
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The first message is of a machine to be made ahead
    #[arg(long)]
    ahead: bool,
    /// Whoever starts this is confined, and so is this
    #[arg(long)]
    confined: bool,
}

impl ShellArgs {
    /// What this process was started with, if that was by a monitor or a pool. Clap would say the same, and leave every child with a heap that has holes.
    pub fn of_process() -> Option<Self> {
        let mut words = std::env::args_os().skip(1);
        if words.next()? != "shell" {
            return None;
        }
        let mut args = Self {
            ahead: false,
            confined: false,
        };
        for word in words {
            match word.to_str()? {
                "--ahead" => args.ahead = true,
                "--confined" => args.confined = true,
                _ => return None,
            }
        }
        Some(args)
    }
}

/// Longest reason that is told, in characters: it may have the end of the guest's console.
const WHY_MAX: usize = 8000;

/// Carries out `vmm shell`.
pub fn shell(args: &ShellArgs) -> Result<u8, CliError> {
    let broken = |error: io::Error| CliError::Monitor(format!("the handover failed: {error}"));
    let socket = rustix::stdio::stdin()
        .try_clone_to_owned()
        .map_err(broken)?;
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

/// Makes a machine like `machine`, as far as that goes, with `layers` over its memory.
fn prepare(machine: &Described, layers: Vec<File>) -> Result<Shell, CliError> {
    let bad = |error: &dyn std::fmt::Display| CliError::BadInput(error.to_string());
    // Where the sandbox will be does not count.
    let vsock = vsock(&SandboxPaths::new(runtime_dir()));
    let config = description::config(machine, Some(vsock), ConsoleConfig::Kept)
        .map_err(|error| bad(&error))?;
    let mut shell = Shell::new(&config)?;
    if !layers.is_empty() {
        shell.lay(open_layers(layers).map_err(|error| bad(&error))?)?;
    }
    Ok(shell)
}

/// Waits for the layer that the parent is still writing.
fn newest_layer(socket: &UnixStream) -> io::Result<File> {
    let received = message::receive::<()>(socket)?;
    let layer = received.and_then(|((), mut files)| files.pop());
    layer.ok_or_else(|| io::Error::other("the parent's memory was not written"))
}

fn be(args: &ShellArgs, parent: &Parent) -> Result<u8, CliError> {
    let broken = |error: io::Error| CliError::Monitor(format!("the handover failed: {error}"));
    if args.confined {
        confinement::inherit();
    }
    confine()?;
    let mut made = None;
    if args.ahead {
        let Some((machine, layers)) = message::receive(&parent.socket).map_err(broken)? else {
            return Ok(0);
        };
        made = Some((prepare(&machine, layers)?, machine));
        (&parent.socket).write_all(b"\n").map_err(broken)?;
    }
    let received = message::receive::<Handover>(&parent.socket);
    let Some((handover, files)) = received.map_err(broken)? else {
        return Ok(0);
    };
    // However long it has waited for this.
    let start = Instant::now();
    let bad = |error: SnapshotError| CliError::BadInput(error.to_string());
    let base = handover
        .base
        .map(|(store, id)| Base::open(&Store::at(&store), &id.to_string()));
    let made = made.filter(|(_, machine)| *machine == kind(&handover.machine));
    let socket = parent.socket.try_clone().map_err(broken)?;
    let newest: Box<dyn FnOnce() -> _ + Send> = Box::new(move || newest_layer(&socket));
    let begun = Begun {
        machine: handover.machine,
        programs: handover.programs,
        warm: handover.warm.as_ref().map(Into::into),
        files,
        newest: handover.is_late.then_some(newest),
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
        shell: made.map(|(shell, _)| shell),
    };
    let child = Child {
        parent,
        since: handover.since,
        stands_still: handover.stands_still,
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
    /// Whether it stands still until it is told to live on.
    stands_still: bool,
}

impl Announce for Child<'_> {
    /// Says that this child is ready, and waits to be told that its siblings are, too.
    fn ready(
        &self,
        sandbox: &SandboxDir,
        timings: &Timings,
        supervisor: &Supervisor,
        machine: &Machine,
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
        let is_wanted = told.is_ok() && (&self.parent.socket).read(&mut [0])? > 0;
        if self.stands_still && is_wanted {
            machine.resume();
        }
        Ok(is_wanted)
    }

    fn answered(&self, machine: &Machine) {
        if self.stands_still {
            // One that does not, takes time from its siblings.
            let _ = machine.pause();
        }
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
