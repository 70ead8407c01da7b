//! `vmm explore`: tries several programs or pieces of code at once, each in a child of its own.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::{Args, ValueEnum};

use super::lifecycle::{failed, living};
use super::program::{Lang, variable};
use super::{CliError, find_failed, print, status};
use crate::control::client::{ClientError, Lines};
use crate::control::types::{
    CodeLanguage, ExecBody, ExploreBody, ExploreEvent, ExploreResult, Keep,
};
use crate::sandbox::list::find;
use crate::sizes::duration;
use crate::timings::millis;

/// How long the children may take to be made.
const PATIENCE: Duration = Duration::from_secs(300);

/// Try several programs at once, each in a child of a running sandbox
///
/// All go on from the same moment of the sandbox and know nothing of each other. Results are printed in the order of the command line. Ends with status 0 where a child was
/// kept, or, where none is to be, where all ended with status 0.
#[derive(Debug, Args)]
pub struct ExploreArgs {
    /// The sandbox: its name, or the beginning of its id
    #[arg(value_name = "SANDBOX")]
    sandbox: String,
    /// How many run at once [default: as many as the host has processors]
    #[arg(
        short = 'j',
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true
    )]
    parallel: u32,
    /// Which child lives on: none, the first that succeeds, the one with the greatest score (a number on the last line of its output), or all
    #[arg(long, value_name = "WHICH", value_enum, default_value = "none")]
    keep: KeepArg,
    /// What to call the children: NAME-1, NAME-2 and so on [default: their ids]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Give up each after this time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// What is given is code in this language, and its arguments
    #[arg(long, value_enum)]
    lang: Option<Lang>,
    /// Set a variable of the environment of each
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Who runs them in the guest: a name, or UID[:GID] [default: the unprivileged user]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Print each event as a line of JSON, as it comes
    #[arg(long)]
    json: bool,
    /// The programs and their arguments, with -- before each
    #[arg(last = true, required = true, value_name = "COMMAND")]
    commands: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KeepArg {
    None,
    FirstSuccess,
    Score,
    All,
}

impl ExploreArgs {
    /// What to run, one behind the other.
    fn runs(&self) -> Result<Vec<ExecBody>, CliError> {
        let runs = self.commands.split(|word| word == "--");
        runs.map(|words| {
            let mut words = words.to_vec();
            if words.is_empty() {
                let message = "nothing is between two --: give a program there";
                return Err(CliError::BadInput(message.to_owned()));
            }
            let code = match self.lang {
                None => String::new(),
                Some(_) => words.remove(0),
            };
            Ok(ExecBody {
                argv: words,
                code,
                lang: match self.lang {
                    Some(Lang::Shell) => CodeLanguage::Shell,
                    Some(Lang::Python) | None => CodeLanguage::Python,
                },
                env: self.env.iter().cloned().collect(),
                user: self.user.clone().unwrap_or_default(),
                timeout_ms: self.timeout.map_or(0, millis),
                ..ExecBody::default()
            })
        })
        .collect()
    }
}

/// What has been told so far.
struct Told {
    count: usize,
    /// Results that wait for one that comes before them.
    waiting: BTreeMap<usize, ExploreResult>,
    next: usize,
    succeeded: usize,
    kept: Option<Vec<String>>,
}

/// Why it ended early.
enum Failure {
    Client(ClientError),
    Cli(CliError),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

/// Carries out `vmm explore`.
pub fn explore(args: &ExploreArgs) -> Result<u8, CliError> {
    let runs = args.runs()?;
    let sandbox = find(&args.sandbox).map_err(find_failed)?;
    living(&sandbox)?;
    let mut told = Told {
        count: runs.len(),
        waiting: BTreeMap::new(),
        next: 0,
        succeeded: 0,
        kept: None,
    };
    let body = ExploreBody {
        runs,
        parallel: args.parallel,
        keep: match args.keep {
            KeepArg::None => Keep::None,
            KeepArg::FirstSuccess => Keep::FirstSuccess,
            KeepArg::Score => Keep::Score,
            KeepArg::All => Keep::All,
        },
        name: args.name.clone(),
    };
    let socket = sandbox.paths.api_socket();
    let explored = Lines::ask(&socket, "/v1/explore", &body, PATIENCE)
        .map_err(Failure::from)
        .and_then(|lines| lines.read(|event| told.take(event, args).map_err(Failure::Cli)));
    explored.map_err(|failure| match failure {
        Failure::Client(error) => failed(&sandbox, &error),
        Failure::Cli(error) => error,
    })?;
    let Some(kept) = told.kept else {
        let name = &sandbox.record.name;
        return Err(CliError::Monitor(format!(
            "{name} ended in the middle of it"
        )));
    };
    let well = match args.keep {
        KeepArg::None => told.succeeded == told.count,
        _ => !kept.is_empty(),
    };
    Ok(u8::from(!well))
}

impl Told {
    fn take(&mut self, event: ExploreEvent, args: &ExploreArgs) -> Result<(), CliError> {
        if args.json {
            let json = serde_json::to_string(&event);
            let json = json.map_err(|error| CliError::Monitor(error.to_string()))? + "\n";
            wrote(print(json.as_bytes())?)?;
        }
        match event {
            ExploreEvent::Branched(_) => {}
            ExploreEvent::Result(result) => {
                let ended = result.ended.as_ref();
                self.succeeded += usize::from(ended.is_some_and(|ended| ended.status == 0));
                self.waiting.insert(result.index, result);
                while let Some(result) = self.waiting.remove(&self.next) {
                    self.next += 1;
                    if !args.json {
                        show(&result, self.count)?;
                    }
                }
            }
            ExploreEvent::Kept(kept) => {
                if !args.json && !kept.is_empty() {
                    wrote(print(format!("== kept: {}\n", kept.join(" ")).as_bytes())?)?;
                }
                self.kept = Some(kept);
            }
        }
        Ok(())
    }
}

/// Nobody reads any more: what is under way is given up.
fn wrote(status: u8) -> Result<(), CliError> {
    match status {
        0 => Ok(()),
        _ => Err(CliError::Signal(status::BROKEN_PIPE - 128)),
    }
}

fn show(result: &ExploreResult, count: usize) -> Result<(), CliError> {
    let how = match (&result.ended, &result.error) {
        (Some(ended), _) if ended.timed_out => "its time was over".to_owned(),
        (Some(ended), _) => format!("status {}", ended.status),
        (None, Some(error)) => error.message.clone(),
        (None, None) => "no end".to_owned(),
    };
    let score = result
        .score
        .map_or(String::new(), |score| format!(", score {score}"));
    let cut = if result.truncated {
        ", output cut short"
    } else {
        ""
    };
    let (number, took) = (result.index + 1, result.took_us as f64 / 1e3);
    let mut text =
        format!("== {number} of {count}: {how}{score}, {took:.0} ms{cut}\n").into_bytes();
    text.extend(BASE64_STANDARD.decode(&result.stdout).unwrap_or_default());
    wrote(print(&text)?)?;
    let stderr = BASE64_STANDARD.decode(&result.stderr).unwrap_or_default();
    // Who does not read it does not want it.
    let _ = io::stderr().write_all(&stderr);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ExploreArgs,
    }

    fn argvs(words: &str) -> Vec<Vec<String>> {
        let line = Line::try_parse_from(words.split(' ')).unwrap();
        let runs = line.args.runs().unwrap();
        runs.into_iter().map(|run| run.argv).collect()
    }

    #[test]
    fn each_command_has_its_own_dashes() {
        assert_eq!(
            argvs("explore box --keep score -- a -x -- b -- c --keep"),
            [vec!["a", "-x"], vec!["b"], vec!["c", "--keep"]]
        );
        let line =
            Line::try_parse_from(["explore", "box", "--lang", "python", "--", "print(1)", "2"]);
        let runs = line.unwrap().args.runs().unwrap();
        assert_eq!(
            (&*runs[0].code, &runs[0].argv[..]),
            ("print(1)", &["2".to_owned()][..])
        );
        let empty = Line::try_parse_from(["explore", "box", "--", "a", "--", "--", "b"]).unwrap();
        assert!(empty.args.runs().is_err());
        assert!(Line::try_parse_from(["explore", "box"]).is_err());
    }
}
