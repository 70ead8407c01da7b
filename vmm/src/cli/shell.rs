//! `vmm shell`: the process of a child, before it is told which. For monitors only.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use clap::Args;

use super::CliError;
use super::detached::{self, Announce};
use super::launch::{Launch, Source};
use super::vm_spec::VmSpec;
use crate::control::types::ChildView;
use crate::handover;
use crate::sandbox::SandboxDir;
use crate::snapshot::SnapshotError;
use crate::snapshot::branch::Begun;
use crate::snapshot::restore::Base;
use crate::store::Store;
use crate::timings::Timings;

/// Go on from a moment of another sandbox, which its monitor hands over on standard input
#[derive(Debug, Args)]
pub struct ShellArgs {}

/// Carries out `vmm shell`.
pub fn shell(_: &ShellArgs, start: Instant) -> Result<u8, CliError> {
    let broken = |error: io::Error| CliError::Monitor(format!("the handover failed: {error}"));
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(broken)?;
    let socket = UnixStream::from(socket);
    let Some((handover, files)) = handover::receive(&socket).map_err(broken)? else {
        return Ok(0);
    };
    let mut files = files.into_iter();
    let state = files.next();
    let state = state.ok_or_else(|| broken(io::Error::other("no state was sent")))?;
    let bad = |error: SnapshotError| CliError::BadInput(error.to_string());
    let base = handover.base.map(|id| {
        let store = Store::of_user()?;
        Base::open(&store, &id.to_string())
    });
    let begun = Begun {
        machine: handover.machine,
        programs: handover.programs,
        warm: handover.warm.as_ref().map(Into::into),
        state,
        layers: files.collect(),
        base: base.transpose().map_err(bad)?,
    };
    let saved = begun.open().map_err(bad)?;
    let launch = Launch {
        spec: VmSpec {
            name: handover.name,
            labels: handover.labels,
            timeout: handover.timeout_ms.map(Duration::from_millis),
            ..VmSpec::of_saved(&saved)
        },
        source: Source::Saved(Box::new(saved)),
        cached: false,
        branch: Some(handover.branch),
    };
    let since = handover.since;
    detached::monitor(launch, false, start, &Parent { socket, since })
}

/// The monitor that has started this process.
struct Parent {
    socket: UnixStream,
    /// When it was asked for it.
    since: u64,
}

impl Announce for Parent {
    /// Says that this child is ready, and waits to be told that its siblings are, too.
    fn ready(&self, sandbox: &SandboxDir, timings: &Timings) -> io::Result<()> {
        let at = |name| timings.since_us(name, self.since).unwrap_or(0);
        let view = ChildView {
            id: sandbox.id().to_owned(),
            name: sandbox.name().to_owned(),
            running_us: at("first KVM_RUN"),
            answered_us: at("guest told"),
        };
        let mut word = serde_json::to_vec(&view)?;
        word.push(b'\n');
        (&self.socket).write_all(&word)?;
        (&self.socket).read_exact(&mut [0])
    }
}
