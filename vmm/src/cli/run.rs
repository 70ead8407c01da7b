//! `vmm run`: boots a sandbox, runs one program or piece of code in it, and ends as that ends.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rustix::event::{PollFd, PollFlags, poll};

use super::vm_args::{VmArgs, installed_image, installed_kernel};
use super::vm_spec::VmSpec;
use super::{CliError, ending_status, status};
use crate::agent::{
    AGENT_PORT, Agent, AgentError, EnvVar, ExecRequest, ExitStatus, Language, RunCodeRequest,
    ShutdownMode, Stdin, Stdio,
};
use crate::builder;
use crate::config::{ConsoleConfig, GUEST_CID, VmConfig, VsockConfig};
use crate::exit::ExitReason;
use crate::host;
use crate::kvm::install_kick_handler;
use crate::logger::complain;
use crate::machine::Machine;
use crate::sandbox::SandboxDir;
use crate::supervisor::{Ending, Signals, Supervisor, end_by_force};
use crate::timings::Timings;

/// A guest whose agent is not there by then never will be. Generous: on a software KVM a guest of 24 GiB takes a minute.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);
/// How long a guest that has closed the agent's connection may take to end.
const RESET_GRACE: Duration = Duration::from_secs(5);
/// How long a guest may take, after its program has ended, to write out the disks that it may write to.
const WRITE_OUT_TIME: Duration = Duration::from_secs(60);
/// Longest source that is taken from standard input or a file, in bytes: what fits in a frame of the agent's.
const SOURCE_MAX: u64 = 1_000_000;

/// Boot a sandbox, run a program or code in it, and end with its exit status
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    vm: VmArgs,
    /// Write the guest's console to this file, or to standard error for -
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
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
    /// The program and its arguments; with --lang, a file of code and its arguments
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Lang {
    Python,
    Shell,
}

fn env_var(text: &str) -> Result<EnvVar, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok(EnvVar {
            name: name.to_owned(),
            value: value.as_bytes().to_vec(),
        }),
        _ => Err("give NAME=VALUE".to_owned()),
    }
}

/// What is to be run.
enum Work {
    Exec(ExecRequest),
    Code {
        request: RunCodeRequest,
        stdin_is_source: bool,
    },
}

impl RunArgs {
    fn work(&self, vm: &VmSpec) -> Result<Work, CliError> {
        let cwd = self.cwd.clone().or(vm.cwd.clone().map(OsString::from));
        let cwd = cwd.unwrap_or_default().into_vec();
        let bytes = |words: &[OsString]| -> Vec<Vec<u8>> {
            words.iter().map(|word| word.as_bytes().to_vec()).collect()
        };
        let Some(lang) = self.lang else {
            if self.command.is_empty() {
                let message = "nothing to run: give a command after --, or code with --lang";
                return Err(CliError::BadInput(message.to_owned()));
            }
            let argv = bytes(&self.command);
            return Ok(Work::Exec(ExecRequest {
                argv,
                env: vm.env_with(&self.env),
                cwd,
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
            env: vm.env_with(&self.env),
            cwd,
            filename,
            ..Default::default()
        };
        Ok(Work::Code {
            request,
            stdin_is_source,
        })
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

/// Carries out `vmm run`.
pub fn run(args: &RunArgs, start: Instant) -> Result<u8, CliError> {
    let timings = Arc::new(Timings::since(start));
    let vm = args.vm.resolve()?;
    let kernel = installed_kernel(vm.kernel.as_deref())?;
    let image = installed_image(vm.image.as_deref())?;
    let work = args.work(&vm)?;
    let monitor = |error: io::Error| CliError::Monitor(error.to_string());
    let signals = Arc::new(Signals::catch().map_err(monitor)?);
    install_kick_handler().map_err(monitor)?;

    host::raise_open_files_limit();

    let sandbox =
        SandboxDir::create(None).map_err(|error| CliError::BadInput(error.to_string()))?;
    let ready = UnixListener::bind(sandbox.paths().vsock_listener(AGENT_PORT)).map_err(monitor)?;
    let config = VmConfig {
        cpus: vm.cpus,
        memory_mib: vm.memory,
        kernel,
        cmdline: vm.cmdline.clone(),
        drives: vm.drives(Some(image)),
        vsock: Some(VsockConfig {
            cid: GUEST_CID,
            socket: sandbox.paths().vsock_socket(),
        }),
        console: match args.console.as_deref() {
            None => ConsoleConfig::Kept,
            Some(path) if path.as_os_str() == "-" => ConsoleConfig::Stderr,
            Some(path) => ConsoleConfig::File(path.to_owned()),
        },
    };
    let machine = builder::build(&config, &timings)?;
    let supervisor = Supervisor {
        exit: machine.exit().clone(),
        signals,
        deadline: vm.timeout.and_then(|timeout| start.checked_add(timeout)),
        leftover: Some(sandbox.path().to_owned()),
        status: ending_status,
    };
    let writable = config.drives.iter().any(|drive| !drive.read_only);
    let result = work_in(&machine, supervisor, ready, work, writable, &timings, start);
    timings.mark("program ended");
    let status = result
        .as_ref()
        .map_or_else(CliError::status, |status| *status);
    end_by_force(status, Some(sandbox.path()));
    drop(machine);
    drop(sandbox);
    if args.vm.timings {
        timings.mark("VM torn down");
        let _ = write!(io::stderr(), "{timings}");
    }
    result
}

/// Waits for the agent and has it do the work. A guest with a `writable` disk is then ended in order.
fn work_in(
    machine: &Machine,
    supervisor: Supervisor,
    ready: UnixListener,
    work: Work,
    writable: bool,
    timings: &Timings,
    start: Instant,
) -> Result<u8, CliError> {
    let cut_short = |ending| match ending {
        Ending::Vm(reason) => Err(CliError::Vm {
            reason,
            console: machine.console().text(),
        }),
        Ending::Signal(signal) => Err(CliError::Signal(signal)),
        Ending::TimedOut => Err(CliError::Timeout(start.elapsed())),
    };
    let no_agent = || CliError::NoAgent {
        waited: BOOT_DEADLINE,
        console: machine.console().text(),
    };
    let boot_deadline = start + BOOT_DEADLINE;
    let timed = supervisor
        .deadline
        .is_some_and(|deadline| deadline <= boot_deadline);
    let stream = match supervisor.accept(&ready, boot_deadline) {
        Ok(stream) => stream,
        Err(Ending::TimedOut) if !timed => return Err(no_agent()),
        Err(ending) => return cut_short(ending),
    };
    // The agent was the first to call, being the guest's first process. Nobody else in there shall.
    drop(ready);
    let watch = supervisor
        .clone()
        .watch(&stream)
        .map_err(|error| CliError::Monitor(error.to_string()))?;
    let result = Agent::from_stream(stream, Some(boot_deadline)).and_then(|mut agent| {
        timings.mark("agent ready");
        agent.set_deadline(None);
        let ended = perform(&mut agent, work)?;
        Ok((ended, agent))
    });
    let error = match result {
        // Done is done, even where the time was over just then.
        Ok((ended, agent)) => {
            if writable && watch.end().is_none() {
                write_out(agent, supervisor);
                timings.mark("drives written out");
            }
            return Ok(ended.shell_status());
        }
        Err(error) => error,
    };
    if let Some(ending) = watch.end() {
        return cut_short(ending);
    }
    match &error {
        AgentError::Output { source, .. } if source.kind() == io::ErrorKind::BrokenPipe => {
            return Ok(status::BROKEN_PIPE);
        }
        AgentError::TimedOut => return Err(no_agent()),
        // A guest that resets itself lets go of its connections first.
        AgentError::Disconnected | AgentError::Socket(_) => {
            let deadline = Some(Instant::now() + RESET_GRACE);
            let ending = Supervisor {
                deadline,
                ..supervisor
            }
            .wait_for_end();
            if ending != Ending::TimedOut {
                return cut_short(ending);
            }
        }
        _ => {}
    }
    match error.shell_status() {
        Some(status) => {
            complain(&error);
            Ok(status)
        }
        None => Err(CliError::Monitor(error.to_string())),
    }
}

/// Ends the guest in order, so that it writes out what its kernel still holds back of its disks.
fn write_out(mut agent: Agent, supervisor: Supervisor) {
    let deadline = Some(Instant::now() + WRITE_OUT_TIME);
    agent.set_deadline(deadline);
    let asked = agent.shutdown(ShutdownMode::PowerOff, Duration::ZERO);
    let why = match asked {
        // A guest that resets itself lets go of its connections first.
        Ok(()) | Err(AgentError::Disconnected | AgentError::Socket(_)) => {
            let supervisor = Supervisor {
                deadline,
                ..supervisor
            };
            match supervisor.wait_for_end() {
                Ending::Vm(ExitReason::Reset) => return,
                Ending::Vm(reason) => reason.to_string(),
                Ending::Signal(signal) => format!("signal {signal} came first"),
                Ending::TimedOut => format!("it took longer than {WRITE_OUT_TIME:?}"),
            }
        }
        Err(error) => error.to_string(),
    };
    complain(format_args!(
        "warning: the guest may not have written out all of its drives: {why}; check the file systems on them"
    ));
}

fn perform(agent: &mut Agent, work: Work) -> Result<ExitStatus, AgentError> {
    let stdin = io::stdin();
    // Not locked: other threads print warnings and the console meanwhile.
    let (mut stdout, mut stderr) = (Patient(io::stdout()), Patient(io::stderr()));
    let (stdout, stderr): (&mut dyn Write, &mut dyn Write) = (&mut stdout, &mut stderr);
    let stdin = Stdin::Fd(stdin.as_fd());
    match work {
        Work::Exec(request) => agent.exec(
            request,
            Stdio {
                stdin,
                stdout,
                stderr,
            },
        ),
        Work::Code {
            request,
            stdin_is_source,
        } => {
            let stdin = if stdin_is_source { Stdin::Null } else { stdin };
            agent.run_code(
                request,
                Stdio {
                    stdin,
                    stdout,
                    stderr,
                },
            )
        }
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
