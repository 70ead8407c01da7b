//! Bough's guest agent: PID 1 of the guest, or an ordinary process for tests.
//!
//! As PID 1 it makes the guest usable (`init`), says so to the host, and then runs
//! programs for whoever connects (`server`). It never returns: a PID 1 that ends
//! panics the kernel. Each system call and each touched page before "ready" costs
//! boot time, so the order here is deliberate: see `docs` in `proto/agent.proto`
//! for what a client may rely on.
#![deny(unsafe_code)]

mod branching;
mod cgroup;
mod command;
mod connection;
mod epoll;
mod failure;
mod files;
mod identity;
mod init;
mod lane;
mod listen;
mod loan;
mod machine_id;
mod output;
mod power;
mod program;
mod restored;
mod runners;
mod server;
mod signals;
mod source;
mod spawn;
mod sys;
mod warm;
mod window;
mod wire;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use failure::Failure;
use lane::Lane;
use server::Server;
use wire::Wire;

const USAGE: &str = "\
usage: guest-agent [--listen-unix PATH] [--dial-unix PATH]     as an ordinary process
       init [--upper=DEVICE] [--hostname=NAME]                 as PID 1
       bough branch [-n COUNT]                                 in a guest";

/// What the command line, or as PID 1 the kernel's command line after `--`, asks for.
#[derive(Default)]
struct Options {
    init: init::InitConfig,
    listen_unix: Option<PathBuf>,
    dial_unix: Option<PathBuf>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            let text = argument.to_string_lossy();
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(OsString::from(value))),
                None => (&*text, None),
            };
            let mut value = || {
                value
                    .clone()
                    .or_else(|| arguments.next())
                    .ok_or_else(|| format!("{name} needs a value"))
            };
            match name {
                "--upper" => options.init.upper = Some(value()?.into()),
                "--hostname" => options.init.hostname = Some(value()?),
                "--listen-unix" => options.listen_unix = Some(value()?.into()),
                "--dial-unix" => options.dial_unix = Some(value()?.into()),
                _ => return Err(format!("unknown argument {name}")),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        power::reset_on_panic();
        let error = match run_as_init() {
            Ok(never) => match never {},
            Err(error) => error,
        };
        // Through the panic hook: it prints on the console and ends the guest.
        panic!("the guest agent cannot go on: {}", error.message);
    }
    let mut arguments = std::env::args_os();
    if command::is_meant(arguments.next()) {
        return command::run(arguments);
    }
    match run_as_process() {
        Ok(never) => match never {},
        Err(message) => {
            eprintln!("guest-agent: error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run_as_init() -> Result<std::convert::Infallible, Failure> {
    // The kernel passes on every word that it does not know itself.
    let ours = |argument: &OsString| argument.as_encoded_bytes().starts_with(b"--");
    let options =
        Options::parse(std::env::args_os().skip(1).filter(ours)).unwrap_or_else(|message| {
            init::warn(&message);
            Options::default()
        });
    let root = init::writable_root(&options.init);
    // A guest that wakes up has housekeeping to do, which can wait until somebody has his answer.
    if let Err(errno) = sys::go_first() {
        init::warn(&format!("sched_setattr: {errno}"));
    }
    let mut server = Server::new(true, root.layers)?;
    server.listen(listen::vsock()?);
    let has_dev = init::devices();
    if let Err(failure) = server.dial(Box::new(call_host)) {
        init::warn(&failure.message);
    }
    init::the_rest(&options.init, root.has_run, has_dev);
    server.prepare_restored();
    if let Err(failure) = server.take_asks() {
        init::warn(&failure.message);
    }
    server.run()
}

/// Calls the host: on the lane where there is one, by vsock elsewhere.
fn call_host() -> std::io::Result<Wire> {
    match Lane::open() {
        Ok(lane) => Ok(Wire::Lane(lane)),
        Err(_) => Ok(Wire::socket(listen::dial_host()?)?),
    }
}

fn run_as_process() -> Result<std::convert::Infallible, String> {
    let options =
        Options::parse(std::env::args_os().skip(1)).map_err(|error| format!("{error}\n{USAGE}"))?;
    if options.listen_unix.is_none() && options.dial_unix.is_none() {
        return Err(format!("nothing to serve\n{USAGE}"));
    }
    // Orphans of programs become our children, as they do for PID 1.
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))
        .map_err(|errno| format!("prctl: {errno}"))?;
    let mut server = Server::new(false, None).map_err(|failure| failure.message)?;
    if let Some(path) = &options.listen_unix {
        let listener =
            listen::unix(path).map_err(|error| format!("{}: {error}", path.display()))?;
        server.listen(listener);
    }
    if let Some(path) = options.dial_unix {
        let dialled = server.dial(Box::new(move || {
            Ok(Wire::socket(listen::dial_unix(&path)?)?)
        }));
        dialled.map_err(|failure| failure.message)?;
    }
    server.run().map_err(|failure| failure.message)
}
