//! Starting a program: from an `Exec` to a process group with its pipes.
//!
//! `std::process::Command` does it by `posix_spawn` (a vfork: the agent's page
//! tables are not copied) as long as the program is a path and the working
//! directory is left alone; so both are dealt with here.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use guest_agent::proto::{ErrorCode, Exec};
use rustix::fs::{Access, OFlags, access, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::failure::Failure;

/// The environment that programs get, unless they ask for none of it.
const ENVIRONMENT: [(&str, &str); 5] = [
    ("HOME", "/root"),
    // Not LANG: for that, most programs read twelve files, and C.UTF-8 differs from C in this one.
    ("LC_CTYPE", "C.UTF-8"),
    ("PATH", DEFAULT_PATH),
    ("SHELL", "/bin/sh"),
    ("USER", "root"),
];

/// The C library's settings, which the monitor gives the agent where this machine needs some (registers
/// that its kernel does not preserve, for one). Every program gets them, even in an empty environment.
const TUNABLES: &str = "GLIBC_TUNABLES";

/// Where programs are looked for if their environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process that was started, and our ends of its pipes.
pub struct Spawned {
    /// Its process id, and its process group's.
    pub pid: Pid,
    /// Its standard input, non-blocking, if it was asked for.
    pub stdin: Option<OwnedFd>,
    /// Its standard output. Blocking: it is read only when there is something to read.
    pub stdout: OwnedFd,
    /// Its standard error, likewise.
    pub stderr: OwnedFd,
}

/// Starts a program. `home` is the directory that the agent is in.
///
/// # Errors
/// A failure that says whether the program, its format, its working directory or an argument is at fault.
pub fn spawn(exec: &Exec, home: &Path) -> Result<Spawned, Failure> {
    let program = check(exec)?;
    let _back = enter(&exec.cwd, home)?;
    if program.as_bytes().contains(&b'/') {
        return start(Path::new(program), exec).map_err(|error| explain(program, &error));
    }

    // As execvp(3): the first candidate that can be executed; a forbidden one is mentioned only
    // if there is no other.
    let mut failure = std::io::Error::from(Errno::NOENT);
    for candidate in candidates(program, search_path(exec)) {
        match access(&candidate, Access::EXEC_OK) {
            Ok(()) => match start(&candidate, exec) {
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                    failure = error;
                }
                result => return result.map_err(|error| explain(program, &error)),
            },
            Err(errno @ Errno::ACCESS) => failure = errno.into(),
            Err(_) => {}
        }
    }
    Err(explain(program, &failure))
}

/// The program's name, once everything that the kernel would choke on is ruled out.
fn check(exec: &Exec) -> Result<&OsStr, Failure> {
    let invalid = |message: &str| Failure::new(ErrorCode::InvalidArgument, message);
    let Some(program) = exec.argv.first().filter(|program| !program.is_empty()) else {
        return Err(invalid("argv names no program"));
    };
    if exec.argv.iter().any(|argument| argument.contains(&0)) {
        return Err(invalid("argv holds a NUL byte"));
    }
    if exec.cwd.contains(&0) {
        return Err(invalid("cwd holds a NUL byte"));
    }
    for variable in &exec.env {
        let name = &variable.name;
        if name.is_empty() || name.contains(['=', '\0']) || variable.value.contains(&0) {
            return Err(invalid(&format!("env: bad variable {name:?}")));
        }
    }
    Ok(OsStr::from_bytes(program))
}

fn candidates(program: &OsStr, path: &[u8]) -> impl Iterator<Item = PathBuf> {
    path.split(|&byte| byte == b':')
        .map(move |directory| match directory {
            b"" => Path::new(".").join(program),
            directory => Path::new(OsStr::from_bytes(directory)).join(program),
        })
}

/// The PATH of the environment that the program will have.
fn search_path(exec: &Exec) -> &[u8] {
    match exec.env.iter().rfind(|variable| variable.name == "PATH") {
        Some(variable) => &variable.value,
        None => DEFAULT_PATH.as_bytes(),
    }
}

/// The agent is in the working directory for as long as this lives.
struct Entered<'a> {
    home: &'a Path,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // Should home be gone, the next program says so: it starts where this one did.
        let _ = rustix::process::chdir(self.home);
    }
}

fn enter<'a>(directory: &[u8], home: &'a Path) -> Result<Option<Entered<'a>>, Failure> {
    if directory.is_empty() {
        return Ok(None);
    }
    let directory = Path::new(OsStr::from_bytes(directory));
    match rustix::process::chdir(directory) {
        Ok(()) => Ok(Some(Entered { home })),
        Err(errno) => Err(Failure::new(
            ErrorCode::BadWorkingDirectory,
            format!("working directory {}: {}", directory.display(), io(errno)),
        )),
    }
}

fn start(path: &Path, exec: &Exec) -> std::io::Result<Spawned> {
    let mut command = Command::new(path);
    if let [name, arguments @ ..] = exec.argv.as_slice() {
        command.arg0(OsStr::from_bytes(name));
        command.args(arguments.iter().map(|argument| OsStr::from_bytes(argument)));
    }
    command.env_clear();
    if !exec.clear_env {
        command.envs(ENVIRONMENT);
    }
    if let Some(tunables) = std::env::var_os(TUNABLES) {
        command.env(TUNABLES, tunables);
    }
    for variable in &exec.env {
        command.env(&variable.name, OsStr::from_bytes(&variable.value));
    }
    command.process_group(0);
    let stdin = if exec.stdin {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());

    let mut child = command.spawn()?;
    let stdin = child.stdin.take().map(OwnedFd::from);
    if let Some(stdin) = &stdin {
        fcntl_setfl(stdin, OFlags::NONBLOCK)?;
    }
    let missing = || std::io::Error::other("the process has no pipe");
    Ok(Spawned {
        pid: i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| std::io::Error::other("the process has no id"))?,
        stdin,
        stdout: child.stdout.take().ok_or_else(missing)?.into(),
        stderr: child.stderr.take().ok_or_else(missing)?.into(),
    })
}

fn explain(program: &OsStr, error: &std::io::Error) -> Failure {
    let code = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::NOTDIR) => ErrorCode::NotFound,
        Some(Errno::ACCESS | Errno::PERM) => ErrorCode::PermissionDenied,
        Some(Errno::NOEXEC) => ErrorCode::NotExecutable,
        Some(Errno::TOOBIG | Errno::NAMETOOLONG | Errno::LOOP) => ErrorCode::InvalidArgument,
        Some(Errno::AGAIN | Errno::MFILE | Errno::NFILE) => ErrorCode::TooMany,
        _ => ErrorCode::Internal,
    };
    Failure::new(
        code,
        format!("{}: {}", Path::new(program).display(), plain(error)),
    )
}

fn io(errno: Errno) -> String {
    plain(&errno.into())
}

/// The system's words for an error, without the number that std adds.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text.get(..end).unwrap_or(&text).to_owned(),
        None => text,
    }
}
