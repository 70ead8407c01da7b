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
                    ..
                }) => {
                    listed.uptime_ms = Some(uptime_ms);
                    listed.resident_bytes = Some(resident_bytes);
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
    let width = |of: fn(&Listed) -> usize, least| listed.iter().map(of).fold(least, usize::max);
    let name = width(|l| l.record.name.len(), 4);
    let mut text = format!(
        "{:name$}  {:8}  {:>4}  {:>7}  {:>8}  STATE\n",
        "NAME", "ID", "CPUS", "MEMORY", "AGE"
    );
    for sandbox in &listed {
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
        // A string takes all that is written to it.
        let _ = writeln!(
            text,
            "{own:name$}  {id:8}  {cpus:>4}  {memory:>7}  {age:>8}  {status}"
        );
    }
    print(text.as_bytes())
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

    #[test]
    fn ages_are_short() {
        let ages = [0, 119, 120, 7200, 172_800].map(age);
        assert_eq!(ages, ["0 s", "119 s", "2 min", "2 h", "2 d"]);
    }
}
