//! `vmm doctor`: what this host offers, what is missing, what that costs and how to mend it.

use std::io::Write;

use clap::Args;
use serde::Serialize;

use super::{CliError, vm_args};
use crate::doctor::{Finding, Verdict, examine};

/// Look at what this host offers: KVM and its kind, userfaultfd, huge pages, TDX, permissions, limits
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    usable: bool,
    findings: &'a [Finding],
}

/// Carries out `vmm doctor`; its status is 1 where no sandbox can run.
pub fn doctor(args: &DoctorArgs) -> Result<u8, CliError> {
    let mut findings = examine();
    findings.push(examine_installed(
        "guest kernel",
        vm_args::installed_kernel(None),
    ));
    findings.push(examine_installed(
        "guest image",
        vm_args::installed_image(None),
    ));
    let usable = findings
        .iter()
        .all(|finding| finding.verdict != Verdict::Fatal);
    let mut text;
    if args.json {
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            usable,
            findings: &findings,
        };
        let json = serde_json::to_string_pretty(&report)
            .map_err(|error| CliError::Monitor(error.to_string()))?;
        text = json + "\n";
    } else {
        text = findings.iter().map(describe).collect();
        text += if usable {
            "Sandboxes can run here.\n"
        } else {
            "No sandbox can run here.\n"
        };
    }
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| CliError::Monitor(format!("cannot write standard output: {error}")))?;
    Ok(u8::from(!usable))
}

fn describe(finding: &Finding) -> String {
    let mark = match finding.verdict {
        Verdict::Good => "ok     ",
        Verdict::Lacking => "lacking",
        Verdict::Fatal => "FATAL  ",
    };
    let Finding {
        name,
        found,
        costs,
        remedy,
        verdict,
    } = finding;
    let line = format!("{mark}  {name}: {found}\n");
    match verdict {
        Verdict::Good => line,
        _ => format!("{line}           costs: {costs}\n           mend:  {remedy}\n"),
    }
}

fn examine_installed(name: &'static str, path: Result<std::path::PathBuf, CliError>) -> Finding {
    match path {
        Ok(path) => Finding {
            name,
            verdict: Verdict::Good,
            found: path.display().to_string(),
            costs: "",
            remedy: String::new(),
        },
        Err(error) => {
            let message = error.to_string();
            let (found, remedy) = message.split_once(": ").unwrap_or((&message, ""));
            Finding {
                name,
                verdict: Verdict::Lacking,
                found: found.to_owned(),
                costs: "sandboxes start only where one is named",
                remedy: remedy.to_owned(),
            }
        }
    }
}
