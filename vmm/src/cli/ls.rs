//! `vmm ls`: the sandboxes of this user, alive and dead.

use std::fmt::Write;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{CliError, find_failed, print, print_json};
use crate::control::client::ask;
use crate::control::types::{SandboxView, State};
use crate::sandbox::list::{Sandbox, all};
use crate::sandbox::record::{ExitRecord, Record, now};

/// How long a sandbox may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// List the sandboxes
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print names only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Leave out those that have ended
    #[arg(short, long)]
    running: bool,
    /// Print those that branched off another below that
    #[arg(short, long, conflicts_with_all = ["json", "quiet"])]
    tree: bool,
}

/// What there is to say about a sandbox.
#[derive(Debug, Serialize)]
pub struct Listed {
    #[serde(flatten)]
    record: Record,
    /// `running`, `paused`, `stopping`, `starting`, `unresponsive`, `ended`, `killed`.
    pub state: &'static str,
    exit: Option<ExitRecord>,
    dir: String,
    uptime_ms: Option<u64>,
    resident_bytes: Option<u64>,
    private_bytes: Option<u64>,
}

impl Listed {
    /// Looks at a sandbox, and asks it if it lives.
    pub fn new(sandbox: &Sandbox) -> Self {
        let mut listed = Self {
            record: sandbox.record.clone(),
            state: "running",
            exit: sandbox.exit.clone(),
            dir: sandbox.paths.dir().to_string_lossy().into_owned(),
            uptime_ms: None,
            resident_bytes: None,
            private_bytes: None,
        };
        listed.state = match (sandbox.alive, &sandbox.exit) {
            (false, Some(_)) => "ended",
            (false, None) => "killed",
            // A `vmm run`, which has no API.
            (true, _) if !sandbox.record.kept => "running",
            (true, _) if !sandbox.paths.api_socket().exists() => "starting",
            (true, _) => match ask(
                &sandbox.paths.api_socket(),
                "GET",
                "/v1/sandbox",
                &(),
                PATIENCE,
            ) {
                Ok(SandboxView {
                    state,
                    uptime_ms,
                    resident_bytes,
                    private_bytes,
                    ..
                }) => {
                    listed.uptime_ms = Some(uptime_ms);
                    listed.resident_bytes = Some(resident_bytes);
                    listed.private_bytes = Some(private_bytes);
                    match state {
                        State::Running => "running",
                        State::Paused => "paused",
                        State::Stopping => "stopping",
                    }
                }
                Err(_) => "unresponsive",
            },
        };
        listed
    }

    fn status(&self) -> String {
        match &self.exit {
            Some(exit) => format!("{} ({}: {})", self.state, exit.status, exit.reason),
            None => self.state.to_owned(),
        }
    }
}

/// Carries out `vmm ls`.
pub fn ls(args: &LsArgs) -> Result<u8, CliError> {
    let mut found = all().map_err(find_failed)?;
    found.retain(|sandbox| sandbox.alive || !args.running);
    if args.quiet {
        let names: String = found
            .iter()
            .map(|sandbox| sandbox.record.name.clone() + "\n")
            .collect();
        return print(names.as_bytes());
    }
    let listed: Vec<_> = found.iter().map(Listed::new).collect();
    if args.json {
        return print_json(&listed);
    }
    let rows = if args.tree {
        tree(&listed)
    } else {
        listed.iter().map(|one| (0, one)).collect()
    };
    let indent = |depth: usize| "  ".repeat(depth);
    let width = |(depth, one): &(usize, &Listed)| indent(*depth).len() + one.record.name.len();
    let name = rows.iter().map(width).fold(4, usize::max);
    let mut text = format!(
        "{:name$}  {:8}  {:>4}  {:>7}  {:>8}  STATE\n",
        "NAME", "ID", "CPUS", "MEMORY", "AGE"
    );
    for (depth, sandbox) in rows {
        let Record {
            id,
            name: own,
            cpus,
            memory_mib,
            created,
            ..
        } = &sandbox.record;
        let (age, status) = (age(now().saturating_sub(*created)), sandbox.status());
        let memory = format!("{memory_mib}M");
        let own = indent(depth) + own;
        // A string takes all that is written to it.
        let _ = writeln!(
            text,
            "{own:name$}  {id:8}  {cpus:>4}  {memory:>7}  {age:>8}  {status}"
        );
    }
    print(text.as_bytes())
}

/// Each below its parent, one step further in; those whose parent is not there any more are at the edge.
fn tree(listed: &[Listed]) -> Vec<(usize, &Listed)> {
    let parent = |one: &Listed| {
        one.record
            .branch
            .as_ref()
            .map(|branch| branch.parent.clone())
    };
    let is_there = |id: &String| listed.iter().any(|one| one.record.id == *id);
    let mut rows = Vec::new();
    // What is still to be put, the last first.
    let mut next: Vec<_> = listed
        .iter()
        .rev()
        .filter(|one| !parent(one).is_some_and(|id| is_there(&id)))
        .map(|one| (0, one))
        .collect();
    while let Some((depth, one)) = next.pop() {
        rows.push((depth, one));
        let children = listed.iter().rev();
        let children = children.filter(|child| parent(child).as_ref() == Some(&one.record.id));
        next.extend(children.map(|child| (depth + 1, child)));
    }
    rows
}

/// A time in its largest unit, as people say it.
pub(super) fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::record::BranchPoint;

    fn listed(id: &str, parent: Option<&str>) -> Listed {
        let branch = parent.map(|parent| BranchPoint {
            parent: parent.to_owned(),
            parent_name: parent.to_owned(),
            root: "r".to_owned(),
            depth: 1,
            at: 0,
        });
        Listed {
            record: Record {
                id: id.to_owned(),
                name: id.to_owned(),
                pid: 1,
                created: 0,
                kept: true,
                cpus: 1,
                memory_mib: 128,
                kernel: String::new(),
                image: String::new(),
                labels: Default::default(),
                budget: Default::default(),
                guest_branch: 0,
                env: Default::default(),
                cwd: None,
                user: None,
                warm: None,
                branch,
            },
            state: "running",
            exit: None,
            dir: String::new(),
            uptime_ms: None,
            resident_bytes: None,
            private_bytes: None,
        }
    }

    #[test]
    fn children_are_below_their_parents() {
        let all = [
            listed("a", None),
            listed("b", Some("a")),
            listed("c", Some("gone")),
            listed("d", Some("b")),
            listed("e", Some("a")),
            listed("loop", Some("loop")),
        ];
        let rows: Vec<_> = tree(&all)
            .into_iter()
            .map(|(depth, one)| (depth, &*one.record.id))
            .collect();
        assert_eq!(rows, [(0, "a"), (1, "b"), (2, "d"), (1, "e"), (0, "c")]);
    }

    #[test]
    fn ages_are_short() {
        let ages = [0, 119, 120, 7200, 172_800].map(age);
        assert_eq!(ages, ["0 s", "119 s", "2 min", "2 h", "2 d"]);
    }
}
