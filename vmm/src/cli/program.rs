//! A program or a piece of code that is to be run in a guest: from the command line to its exit status.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{Args, ValueEnum};
use rustix::event::{PollFd, PollFlags, poll};

use super::terminal::{self, Forwarder, RawInput};
use super::{CliError, status};
use crate::agent::{
    Agent, AgentError, EnvVar, ExecRequest, ExitStatus, Language, Limits, RunCodeRequest, Stdin,
    Stdio,
};
use crate::logger::complain;
use crate::sizes::memory_mib;

/// Longest source that is taken from standard input or a file, in bytes: what fits in a frame of the agent's.
const SOURCE_MAX: u64 = 1_000_000;

/// What to run.
#[derive(Debug, Args)]
pub struct ProgramArgs {
    /// Run code in this language: from -c, else from the file that is named first, else (or for -) from standard input
    #[arg(long, value_enum)]
    lang: Option<Lang>,
    /// The code to run, with --lang
    #[arg(short, long, value_name = "CODE", requires = "lang")]
    code: Option<String>,
    /// Set a variable of the program's environment
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = env_var)]
    env: Vec<EnvVar>,
    /// Directory of the guest to run in
    #[arg(long, value_name = "DIR")]
    cwd: Option<OsString>,
    /// Who runs it in the guest: a name, or UID[:GID] [default: the unprivileged user]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// For the habit of others: standard input is the program's in any case, as in a shell; < /dev/null keeps it from it
    #[arg(short, long)]
    interactive: bool,
    /// Kill it, with all that it has started, where together they use more memory: MiB, or with a unit
    #[arg(long, value_name = "SIZE", value_parser = memory_mib)]
    limit_memory: Option<u64>,
    /// Processors that it may use: 0.5 is half of one
    #[arg(long, value_name = "N", value_parser = processors)]
    limit_cpus: Option<u32>,
    /// Processes and threads that it may be at once
    #[arg(long, value_name = "N")]
    limit_processes: Option<u32>,
    /// The program and its arguments; with --lang, a file of code and its arguments
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lang {
    Python,
    Shell,
}

/// A variable's name and value.
pub fn variable(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("give NAME=VALUE"),
    }
}

fn env_var(text: &str) -> Result<EnvVar, &'static str> {
    let (name, value) = variable(text)?;
    let value = value.into_bytes();
    Ok(EnvVar { name, value })
}

/// Thousandths of a processor.
fn processors(text: &str) -> Result<u32, &'static str> {
    let number: f64 = text.parse().map_err(|_| "give a number, such as 0.5")?;
    if !(0.01..=1024.0).contains(&number) {
        return Err("give a number from 0.01 to 1024");
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is in range"
    )]
    Ok((number * 1000.0) as u32)
}

/// What is to be run.
pub enum Work {
    /// A program.
    Exec(ExecRequest),
    /// Source code.
    Code {
        /// The code.
        request: RunCodeRequest,
        /// It came from standard input, where nothing is left for the program.
        stdin_is_source: bool,
    },
}

impl Work {
    /// Who runs it; empty for the unprivileged user.
    pub fn user(&self) -> &str {
        match self {
            Self::Exec(request) => &request.user,
            Self::Code { request, .. } => &request.user,
        }
    }
}

impl ProgramArgs {
    /// What the arguments ask for, in a sandbox whose programs get `env`, start in `cwd`, and are run by `user`, unless told
    /// otherwise.
    pub fn work(
        &self,
        env: &[EnvVar],
        cwd: Option<&str>,
        user: Option<&str>,
    ) -> Result<Work, CliError> {
        // The last of a name counts.
        let env: Vec<_> = env.iter().chain(&self.env).cloned().collect();
        let cwd = self.cwd.clone().or(cwd.map(OsString::from));
        let cwd = cwd.unwrap_or_default().into_vec();
        let bytes = |words: &[OsString]| -> Vec<Vec<u8>> {
            words.iter().map(|word| word.as_bytes().to_vec()).collect()
        };
        let user = self.user.as_deref().or(user).unwrap_or_default().to_owned();
        let pty = self.tty.then(terminal::pty);
        let limits = self.limits();
        let Some(lang) = self.lang else {
            if self.command.is_empty() {
                let message = "nothing to run: give a command after --, or code with --lang";
                return Err(CliError::BadInput(message.to_owned()));
            }
            let argv = bytes(&self.command);
            return Ok(Work::Exec(ExecRequest {
                argv,
                env,
                cwd,
                user,
                pty,
                limits,
                ..Default::default()
            }));
        };
        let Source {
            code,
            filename,
            args,
            stdin_is_source,
        } = self.source()?;
        let language = match lang {
            Lang::Python => Language::Python,
            Lang::Shell => Language::Shell,
        };
        let request = RunCodeRequest {
            language: language.into(),
            source: code,
            args: bytes(args),
            env,
            cwd,
            filename,
            user,
            pty,
            limits,
            ..Default::default()
        };
        Ok(Work::Code {
            request,
            stdin_is_source,
        })
    }

    fn limits(&self) -> Option<Limits> {
        let limits = Limits {
            memory_bytes: self.limit_memory.unwrap_or(0).saturating_mul(1 << 20),
            cpu_millis: self.limit_cpus.unwrap_or(0),
            processes: self.limit_processes.unwrap_or(0),
        };
        (limits != Limits::default()).then_some(limits)
    }

    fn source(&self) -> Result<Source<'_>, CliError> {
        if let Some(code) = &self.code {
            let (code, args) = (code.as_bytes().to_vec(), self.command.as_slice());
            return Ok(Source {
                code,
                filename: String::new(),
                args,
                stdin_is_source: false,
            });
        }
        let (name, args) = match self.command.split_first() {
            Some((name, args)) => (name.as_os_str(), args),
            None => ("-".as_ref(), &[][..]),
        };
        if name == "-" {
            if self.command.is_empty() && io::stdin().is_terminal() {
                let message =
                    "no code: give it with -c, as a file, or on standard input (- for a terminal)";
                return Err(CliError::BadInput(message.to_owned()));
            }
            let code = read_source(io::stdin().lock(), "standard input")?;
            return Ok(Source {
                code,
                filename: "stdin".to_owned(),
                args,
                stdin_is_source: true,
            });
        }
        let shown = name.to_string_lossy();
        let file = std::fs::File::open(name).map_err(|error| {
            CliError::BadInput(format!("cannot read the code in {shown}: {error}"))
        })?;
        let code = read_source(file, &shown)?;
        let filename = std::path::Path::new(name).file_name().unwrap_or(name);
        let filename = filename.to_string_lossy().into_owned();
        Ok(Source {
            code,
            filename,
            args,
            stdin_is_source: false,
        })
    }
}

struct Source<'a> {
    code: Vec<u8>,
    filename: String,
    args: &'a [OsString],
    stdin_is_source: bool,
}

fn read_source(reader: impl Read, name: &str) -> Result<Vec<u8>, CliError> {
    let mut code = Vec::new();
    reader
        .take(SOURCE_MAX + 1)
        .read_to_end(&mut code)
        .map_err(|error| CliError::BadInput(format!("cannot read the code in {name}: {error}")))?;
    if code.len() as u64 > SOURCE_MAX {
        let message =
            format!("the code in {name} is longer than {SOURCE_MAX} bytes: put it into the image");
        return Err(CliError::BadInput(message));
    }
    Ok(code)
}

/// Runs it with the process's own standard streams. Signals are the program's where `forward_signals`.
pub fn perform(agent: &Agent, work: Work, forward_signals: bool) -> Result<ExitStatus, AgentError> {
    let stdin = io::stdin();
    let fd = Stdin::Fd(stdin.as_fd());
    let (tty, source, running) = match work {
        Work::Exec(mut request) => {
            request.stdin = true;
            (request.pty.is_some(), fd, agent.start(request)?)
        }
        Work::Code {
            mut request,
            stdin_is_source,
        } => {
            request.stdin = !stdin_is_source;
            let source = if stdin_is_source { Stdin::Null } else { fd };
            (request.pty.is_some(), source, agent.start_code(request)?)
        }
    };
    let raw = if tty { RawInput::enter() } else { Ok(None) };
    let raw = raw.map_err(AgentError::Stdin)?;
    let forwarder = (tty || forward_signals)
        .then(|| Forwarder::start(running.controller(), tty, forward_signals))
        .transpose()
        .map_err(AgentError::Stdin)?;
    // Not locked: other threads print warnings and the console meanwhile.
    let (mut stdout, mut stderr) = (Patient(io::stdout()), Patient(io::stderr()));
    let ended = running.communicate(Stdio {
        stdin: source,
        stdout: &mut stdout,
        stderr: &mut stderr,
    });
    drop(forwarder);
    drop(raw);
    let ended = ended?;
    if ended.oom_killed {
        complain(
            "warning: a process was killed, since together they used more memory than they may",
        );
    }
    Ok(ended.status)
}

/// What the command that ran a program ends with where it failed: the status that a shell has for it, else an error, behind `place`.
pub fn failed(error: &AgentError, place: &str) -> Result<u8, CliError> {
    match error {
        AgentError::Output { source, .. } if source.kind() == io::ErrorKind::BrokenPipe => {
            Ok(status::BROKEN_PIPE)
        }
        _ => match error.shell_status() {
            Some(status) => {
                complain(error);
                Ok(status)
            }
            None => Err(CliError::Monitor(format!("{place}{error}"))),
        },
    }
}

/// A stream whose descriptor may be non-blocking, as a shared terminal's can be: it is waited for.
struct Patient<W>(W);

impl<W: Write + AsFd> Patient<W> {
    fn persist<T>(&mut self, mut attempt: impl FnMut(&mut W) -> io::Result<T>) -> io::Result<T> {
        loop {
            match attempt(&mut self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
                    match poll(&mut fds, None) {
                        Ok(_) | Err(rustix::io::Errno::INTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                }
                result => return result,
            }
        }
    }
}

impl<W: Write + AsFd> Write for Patient<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.persist(|inner| inner.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.persist(Write::flush)
    }
}
