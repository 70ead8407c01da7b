//! `vmm diff`: how two sandboxes differ, or a sandbox and a snapshot, or a sandbox and its image.

mod files;

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use self::files::{FileChange, compare, since_image};
use super::exec::{Connected, connect};
use super::snap::failed;
use super::snap::inspect::{Region, regions, table};
use super::{CliError, find_failed, print, print_json, snapshot::take};
use crate::agent::{Agent, AgentError, Upper, UpperEntry};
use crate::control::types::SnapshotRequest;
use crate::logger::complain;
use crate::sandbox::list::{FindError, Sandbox, find};
use crate::store::{Held, Store, StoreError};

/// How long guests may take to tell their files, and to have some read.
const PATIENCE: Duration = Duration::from_secs(120);
/// Largest file whose content is compared, in bytes. It is held in memory; a larger one that was written to counts as changed.
const READ_MAX: u64 = 64 << 20;

/// Tell how two sandboxes differ: pages of memory, blocks of disks, files; or which files a sandbox has changed
///
/// With one name: the files that the sandbox has added to its image (A), changed (C) and deleted (D). With two: the pages and blocks that differ, by region,
/// and what B has other files than A: added, changed, deleted, or only touched (T). Files are those of the root and of /tmp, and are told of sandboxes that run.
/// For pages and blocks each is saved, aside from its other snapshots, and what was saved is removed again. They run on meanwhile.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A sandbox or a snapshot: a name, or the beginning of an id
    #[arg(value_name = "A")]
    a: String,
    /// Another
    #[arg(value_name = "B")]
    b: Option<String>,
    /// Print JSON, which names the pages too
    #[arg(long)]
    json: bool,
}

/// One side.
struct Side<'a> {
    store: &'a Store,
    held: Option<Held>,
    /// Where it is there for this alone: what it was saved of.
    sandbox: Option<Sandbox>,
}

impl<'a> Side<'a> {
    /// The sandbox that `reference` means, as it is now, or else the snapshot.
    fn of(store: &'a Store, reference: &str) -> Result<Self, CliError> {
        let (id, sandbox) = match find(reference) {
            Ok(sandbox) => {
                let request = SnapshotRequest {
                    aside: true,
                    ..SnapshotRequest::default()
                };
                (take(&sandbox, &request)?.id, Some(sandbox))
            }
            Err(FindError::Unknown { .. }) => (reference.to_owned(), None),
            Err(error) => return Err(find_failed(error)),
        };
        Ok(Self {
            store,
            held: Some(store.hold(&id).map_err(|error| match error {
                StoreError::Unknown { .. } => CliError::BadInput(format!(
                    "no sandbox and no snapshot is called {reference:?}; `vmm ls` and `vmm snap ls` list them"
                )),
                error => failed(error),
            })?),
            sandbox,
        })
    }
}

impl Drop for Side<'_> {
    fn drop(&mut self) {
        let Some(held) = self.held.take().filter(|_| self.sandbox.is_some()) else {
            return;
        };
        let id = held.snapshot().id();
        // What is held is not removed.
        drop(held);
        if let Err(error) = self.store.remove(&id, false) {
            complain(format_args!("warning: {error}"));
        }
    }
}

/// What is told.
#[derive(Serialize)]
struct Told {
    #[serde(skip_serializing_if = "Option::is_none")]
    regions: Option<Vec<Region>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<Vec<FileChange>>,
    /// Why the files are not told, or not all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    files_missing: Option<String>,
}

/// Carries out `vmm diff`.
pub fn diff(args: &DiffArgs) -> Result<u8, CliError> {
    let told = match &args.b {
        Some(b) => between(&args.a, b)?,
        None => changed(&args.a)?,
    };
    if args.json {
        return print_json(&told);
    }
    let mut text = told.regions.as_deref().map(table).unwrap_or_default();
    for FileChange { change, path } in told.files.iter().flatten() {
        text += &format!("{} {}\n", change.letter(), path.quoted());
    }
    if let Some(why) = &told.files_missing {
        text += &format!("files: {why}\n");
    }
    print(text.as_bytes())
}

/// What the sandbox `name` has changed of its image.
fn changed(name: &str) -> Result<Told, CliError> {
    let Connected { sandbox, agent } = connect(name)?;
    let name = &sandbox.record.name;
    let deadline = Some(Instant::now() + PATIENCE);
    let upper = written(&agent, name, deadline).map_err(CliError::Monitor)?;
    let more = || format!("{name} has more of them than are told");
    Ok(Told {
        regions: None,
        files: Some(since_image(&upper)),
        files_missing: upper.is_cut.then(more),
    })
}

/// How `b` differs from `a`.
fn between(a: &str, b: &str) -> Result<Told, CliError> {
    let store = Store::of_user().map_err(failed)?;
    let sides = [Side::of(&store, a)?, Side::of(&store, b)?];
    let [Some(one), Some(other)] = sides.each_ref().map(|side| side.held.as_ref()) else {
        return Err(CliError::Monitor("a snapshot is not held".to_owned()));
    };
    let regions = regions(&store, one.snapshot(), other.snapshot()).map_err(failed)?;
    let (files, files_missing) = match files(&sides, [a, b]) {
        Ok(files) => (Some(files), None),
        Err(why) => (None, Some(format!("not told: {why}"))),
    };
    Ok(Told {
        regions: Some(regions),
        files,
        files_missing,
    })
}

/// The files in which two sandboxes differ, or why they cannot be told.
fn files(sides: &[Side<'_>; 2], names: [&str; 2]) -> Result<Vec<FileChange>, String> {
    let deadline = Some(Instant::now() + PATIENCE);
    let ask = |number: usize| {
        let name = names[number];
        let Some(sandbox) = &sides[number].sandbox else {
            return Err(format!(
                "{name} is a snapshot, which nobody runs in who could"
            ));
        };
        let agent = connect(&sandbox.record.id)
            .map_err(|error| error.to_string())?
            .agent;
        let upper = written(&agent, name, deadline)?;
        if upper.is_cut {
            return Err(format!("{name} has written more of them than are compared"));
        }
        let moment = sandbox.record.branch.as_ref().map(|branch| branch.at);
        Ok((agent.as_user("root"), upper, moment))
    };
    let (a, b) = (ask(0)?, ask(1)?);
    let moments: Vec<_> = [a.2, b.2].into_iter().flatten().collect();
    compare(&a.1, &b.1, &moments, |entry| is_equal(&a.0, &b.0, entry))
        .map_err(|error| format!("a file could not be compared: {error}"))
}

/// What the guest has written, or why that is not known.
fn written(agent: &Agent, name: &str, deadline: Option<Instant>) -> Result<Upper, String> {
    agent.set_deadline(deadline);
    let upper = agent.upper().map_err(|error| format!("{name}: {error}"))?;
    upper.ok_or_else(|| {
        format!("{name} has no agent that could: its image is an older one, or its root is no layer above an image")
    })
}

/// Whether a file, which has one size in both, has one content.
fn is_equal(a: &Agent, b: &Agent, entry: &UpperEntry) -> Result<bool, AgentError> {
    if entry.size > READ_MAX {
        return Ok(false);
    }
    let path = Path::new(OsStr::from_bytes(&entry.path));
    let differs = |result: Result<u64, AgentError>| match result {
        Ok(_) => Ok(false),
        // It has grown, or is gone, or another.
        Err(AgentError::Output { .. } | AgentError::Refused { .. }) => Ok(true),
        Err(error) => Err(error),
    };
    let mut content = Bounded(Vec::new());
    if differs(a.read_file(path, &mut content))? {
        return Ok(false);
    }
    let mut rest = Expected(&content.0);
    Ok(!differs(b.read_file(path, &mut rest))? && rest.0.is_empty())
}

/// Takes up to [`READ_MAX`] bytes.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.0.len() + bytes.len()) as u64 > READ_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes these bytes and no others.
struct Expected<'a>(&'a [u8]);

impl Write for Expected<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let rest = self.0.strip_prefix(bytes);
        self.0 = rest.ok_or(io::ErrorKind::InvalidData)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
