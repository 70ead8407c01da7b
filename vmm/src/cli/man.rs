//! `vmm man`: the manual's pages, made from the command line's definition.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man;

use super::{Cli, CliError, print};

/// Print the manual, or write it as one page per command: `vmm man | man -l -`
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write the pages vmm.1, vmm-run.1 and so on into this directory, which is made if it is not there
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Carries out `vmm man`.
pub fn man(args: &ManArgs) -> Result<u8, CliError> {
    let pages = pages().map_err(|error| CliError::Monitor(error.to_string()))?;
    let Some(directory) = &args.output else {
        let whole: Vec<u8> = pages.into_iter().flat_map(|page| page.text).collect();
        return print(&whole);
    };
    fs::create_dir_all(directory).map_err(unwritable(directory))?;
    for page in pages {
        let path = directory.join(page.name);
        fs::write(&path, page.text).map_err(unwritable(&path))?;
    }
    Ok(0)
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> CliError {
    move |error| {
        let path = path.display();
        CliError::BadInput(format!(
            "cannot write {path}: {error}; name another directory with --output"
        ))
    }
}

/// A page of the manual.
struct Page {
    name: String,
    text: Vec<u8>,
}

/// A page for `vmm` and one for each subcommand but `help`.
fn pages() -> io::Result<Vec<Page>> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let mut pages = Vec::new();
    add(root, &mut pages)?;
    Ok(pages)
}

fn add(command: Command, pages: &mut Vec<Page>) -> io::Result<()> {
    let shown = |below: &&Command| !below.is_hide_set();
    let below: Vec<Command> = command.get_subcommands().filter(shown).cloned().collect();
    let page = Man::new(command);
    let mut text = Vec::new();
    page.render(&mut text)?;
    let name = page.get_filename();
    pages.push(Page { name, text });
    below.into_iter().try_for_each(|below| add(below, pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let pages = pages().unwrap();
        let command = Cli::command();
        for command in command.get_subcommands().filter(|one| !one.is_hide_set()) {
            let name = format!("vmm-{}.1", command.get_name());
            let page = pages.iter().find(|page| page.name == name).unwrap();
            assert!(String::from_utf8_lossy(&page.text).contains(".SH SYNOPSIS"));
        }
        assert_eq!(pages[0].name, "vmm.1");
    }
}
