//! `bough`: what a program of the guest calls to have children made of the guest that it runs in.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::process::ExitCode;

use crate::branching::SOCKET;

/// The name that this program is called by.
pub const NAME: &str = "bough";

/// The longest answer, in bytes: a thousand names.
const MAX_ANSWER: u64 = 256 << 10;

const USAGE: &str = "\
usage: bough branch [-n COUNT]

Makes children of this virtual machine, as fork(2) does of a process. All go on from here:
  in the parent it prints \"parent\" and the children's names,
  in each child \"child\", its number from 1, and its name,
each on a line of its own. If the host does not allow it, it fails.";

/// Whether the program was called by its name.
pub fn is_meant(program: Option<OsString>) -> bool {
    program.is_some_and(|program| Path::new(&program).file_name() == Some(NAME.as_ref()))
}

/// Carries out what `arguments` ask for.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<_> = arguments.collect();
    let words: Vec<_> = arguments.iter().filter_map(|word| word.to_str()).collect();
    let count = match &words[..] {
        _ if words.len() < arguments.len() => None,
        ["help" | "--help" | "-h"] | ["branch", "--help" | "-h"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["branch"] => Some(1),
        ["branch", "-n", count] => count.parse::<u32>().ok().filter(|&count| count > 0),
        _ => None,
    };
    let Some(count) = count else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match branch(count) {
        Ok(answer) => {
            // Who does not read it has it all the same.
            let _ = io::stdout().write_all(answer.as_bytes());
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{NAME}: error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Asks for children; what it is now, and who they are, a word to a line.
fn branch(count: u32) -> Result<String, String> {
    let ask = || -> io::Result<String> {
        let mut socket = UnixStream::connect_addr(&SocketAddr::from_abstract_name(SOCKET)?)?;
        socket.write_all(format!("branch {count}\n").as_bytes())?;
        let mut answer = String::new();
        socket.take(MAX_ANSWER).read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|error| format!("the agent of this machine: {error}"))?;
    match answer.trim_end().split_once(' ') {
        Some(("error", why)) => Err(why.to_owned()),
        Some(("parent" | "child", _)) => Ok(answer.replace(' ', "\n")),
        _ => Err("the agent of this machine has hung up".to_owned()),
    }
}
