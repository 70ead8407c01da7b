//! Starting a program: from an `Exec` to a process group with its pipes, or a session with its terminal.
//!
//! The child shares the agent's memory until it executes the program (`sys::vfork`), so
//! everything that needs memory is made before: the child makes system calls only.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use guest_agent::proto::{ErrorCode, Exec, Pty};
use rustix::fs::{Mode, OFlags, Uid, fchown, fcntl_setfl, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Pid, chdir, ioctl_tiocsctty, setpgid, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::cgroup::Cgroup;
use crate::failure::{Failure, plain};
use crate::identity::Identity;
use crate::loan::PIPE_SIZE;
use crate::sys::{self, Image};

/// What an ordinary process that serves as agent gives its programs for HOME, USER and SHELL.
const NOBODY_ELSE: [(&str, &str); 3] = [("HOME", "/root"), ("SHELL", "/bin/sh"), ("USER", "root")];

/// The C library's settings, which the monitor gives the agent where this machine needs some (registers
/// that its kernel does not preserve, for one). Every program gets them, even in an empty environment.
const TUNABLES: &str = "GLIBC_TUNABLES";

/// Where programs are looked for if their environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const DEFAULT_TERM: &str = "xterm-256color";

/// A process that was started, and our ends of its pipes or its terminal.
pub struct Spawned {
    /// Its process id, and its process group's.
    pub pid: Pid,
    /// Its standard input, non-blocking, if it was asked for.
    pub stdin: Option<OwnedFd>,
    /// Its standard output. A pipe blocks: it is read only when there is something to read.
    pub stdout: OwnedFd,
    /// Its standard error, likewise; a terminal has none.
    pub stderr: Option<OwnedFd>,
    /// Whether input and output are a terminal.
    pub is_terminal: bool,
}

/// The ends that the child gets.
pub struct Theirs {
    /// Its standard input.
    pub stdin: OwnedFd,
    /// Its standard output.
    pub stdout: OwnedFd,
    /// Its standard error.
    pub stderr: OwnedFd,
}

/// What the child could not do.
#[derive(Clone, Copy)]
enum Trouble {
    Setup(&'static str, Errno),
    Directory(Errno),
    Execute(Errno),
}

/// Starts a program as `identity`, or as who the agent is, in `cgroup`.
///
/// # Errors
/// A failure that says whether the program, its format, its working directory or an argument is at fault.
pub fn spawn(
    exec: &Exec,
    identity: Option<&Identity>,
    cgroup: Option<&Cgroup>,
) -> Result<Spawned, Failure> {
    let (theirs, mut spawned) = match &exec.pty {
        Some(pty) => terminal(pty, identity)?,
        None => pipes(exec.stdin, identity)?,
    };
    spawned.pid = start(exec, identity, cgroup, &theirs)?;
    Ok(spawned)
}

/// Starts a program as [`spawn`] does, with streams that were made before.
///
/// # Errors
/// As [`spawn`].
pub fn start(
    exec: &Exec,
    identity: Option<&Identity>,
    cgroup: Option<&Cgroup>,
    theirs: &Theirs,
) -> Result<Pid, Failure> {
    let program = check(exec)?;
    let image = image(program, exec, identity);
    let directory = c_string(exec.cwd.clone());
    let home = identity.map(|identity| c_string(identity.home.as_os_str().as_bytes().to_vec()));
    let groups = identity.map(Identity::group_ids).unwrap_or_default();

    let mut trouble = None;
    let mut child = || {
        let prepare = || -> Result<(), Trouble> {
            sys::usual_signals();
            let setup = |call| move |errno| Trouble::Setup(call, errno);
            dup2_stdin(&theirs.stdin).map_err(setup("dup2"))?;
            dup2_stdout(&theirs.stdout).map_err(setup("dup2"))?;
            dup2_stderr(&theirs.stderr).map_err(setup("dup2"))?;
            if exec.pty.is_some() {
                setsid().map_err(setup("setsid"))?;
                ioctl_tiocsctty(&theirs.stdin).map_err(setup("TIOCSCTTY"))?;
            } else {
                setpgid(None, None).map_err(setup("setpgid"))?;
            }
            if let Some(identity) = identity {
                identity.assume(&groups).map_err(setup("change user"))?;
            }
            if !directory.is_empty() {
                chdir(&*directory).map_err(Trouble::Directory)?;
            } else if let Some(home) = &home {
                // Nobody asked for it, so a home that is not there stops nothing.
                let _ = chdir(&**home).or_else(|_| chdir(c"/"));
            }
            Ok(())
        };
        trouble = Some(match prepare() {
            Ok(()) => Trouble::Execute(execute(&image)),
            Err(trouble) => trouble,
        });
    };
    let pid =
        sys::vfork(cgroup.map(Cgroup::fd), &mut child).map_err(|errno| explain(program, errno))?;
    match trouble {
        None => Ok(pid),
        Some(Trouble::Execute(errno)) => Err(explain(program, errno)),
        Some(Trouble::Setup(call, errno)) => Err(Failure::internal(call, errno)),
        Some(Trouble::Directory(errno)) => Err(bad_directory(&exec.cwd, errno)),
    }
}

/// A program cannot run in the directory that it was to.
pub fn bad_directory(cwd: &[u8], errno: Errno) -> Failure {
    let directory = Path::new(OsStr::from_bytes(cwd)).display();
    let why = plain(&errno.into());
    let message = format!("working directory {directory}: {why}");
    Failure::new(ErrorCode::BadWorkingDirectory, message)
}

/// As execvp(3): the first candidate that can be executed; a forbidden one is mentioned only if there
/// is no other.
fn execute(image: &Image) -> Errno {
    let mut failure = Errno::NOENT;
    for path in &image.paths {
        match image.execute(path) {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => failure = Errno::ACCESS,
            errno => return errno,
        }
    }
    failure
}

/// A text for the kernel. [`check`] has ruled NUL bytes out; what follows one would be cut off.
fn c_string(bytes: Vec<u8>) -> CString {
    CString::new(bytes).unwrap_or_default()
}

/// The program's name, once everything that the kernel would choke on is ruled out.
///
/// # Errors
/// A failure that names the field.
pub fn check(exec: &Exec) -> Result<&OsStr, Failure> {
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
    if exec.pty.as_ref().is_some_and(|pty| pty.term.contains('\0')) {
        return Err(invalid("pty: term holds a NUL byte"));
    }
    Ok(OsStr::from_bytes(program))
}

fn image(program: &OsStr, exec: &Exec, identity: Option<&Identity>) -> Image {
    let paths = if program.as_bytes().contains(&b'/') {
        vec![program.into()]
    } else {
        candidates(program, search_path(exec)).collect()
    };
    let bytes = |path: PathBuf| c_string(path.into_os_string().into_encoded_bytes());
    Image::new(
        paths.into_iter().map(bytes).collect(),
        exec.argv.iter().cloned().map(c_string).collect(),
        environment(exec, identity),
    )
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

/// The environment that the program will have, each variable as "NAME=value".
pub fn environment(exec: &Exec, identity: Option<&Identity>) -> Vec<CString> {
    let tunables = std::env::var_os(TUNABLES);
    let mut variables: Vec<(&[u8], &[u8])> = Vec::new();
    if !exec.clear_env {
        match identity {
            Some(identity) => variables.extend([
                (&b"HOME"[..], identity.home.as_os_str().as_bytes()),
                (b"SHELL", identity.shell.as_bytes()),
                (b"USER", identity.name.as_bytes()),
            ]),
            None => variables
                .extend(NOBODY_ELSE.map(|(name, value)| (name.as_bytes(), value.as_bytes()))),
        }
        // Not LANG: for that, most programs read twelve files, and C.UTF-8 differs from C in this one.
        variables.push((b"LC_CTYPE", b"C.UTF-8"));
        variables.push((b"PATH", DEFAULT_PATH.as_bytes()));
        if let Some(pty) = &exec.pty {
            let term = match pty.term.as_str() {
                "" => DEFAULT_TERM,
                term => term,
            };
            variables.push((b"TERM", term.as_bytes()));
        }
    }
    if let Some(tunables) = &tunables {
        variables.push((TUNABLES.as_bytes(), tunables.as_bytes()));
    }
    for variable in &exec.env {
        let (name, value) = (variable.name.as_bytes(), variable.value.as_slice());
        match variables.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => variables.push((name, value)),
        }
    }
    let join = |(name, value): (&[u8], &[u8])| c_string([name, b"=", value].concat());
    variables.into_iter().map(join).collect()
}

/// Lets the user open it again, by way of /dev/stdout or /dev/pts.
fn give(fd: BorrowedFd<'_>, identity: Option<&Identity>) {
    if let Some((uid @ 1.., _)) = identity.map(Identity::ids) {
        // Without it, only opening anew fails.
        let _ = fchown(fd, Some(Uid::from_raw(uid)), None);
    }
}

/// Pipes for a program, not yet with its process id; /dev/null for a standard input that is not wanted.
///
/// # Errors
/// There are too many open files.
pub fn pipes(stdin: bool, identity: Option<&Identity>) -> Result<(Theirs, Spawned), Failure> {
    let make = || -> Result<(Theirs, Spawned), Errno> {
        let (their_stdin, our_stdin) = if stdin {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
            fcntl_setfl(&writer, OFlags::NONBLOCK)?;
            (reader, Some(writer))
        } else {
            (
                open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?,
                None,
            )
        };
        let (our_stdout, their_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let (our_stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
        give(their_stdout.as_fd(), identity);
        give(their_stderr.as_fd(), identity);
        let theirs = Theirs {
            stdin: their_stdin,
            stdout: their_stdout,
            stderr: their_stderr,
        };
        let ours = Spawned {
            pid: Pid::INIT,
            stdin: our_stdin,
            stdout: our_stdout,
            stderr: Some(our_stderr),
            is_terminal: false,
        };
        Ok((theirs, ours))
    };
    make().map_err(|errno| resources("pipe", errno))
}

/// The pipes of a helper, which needs no third party's eyes on them.
///
/// # Errors
/// There are too many open files.
pub fn helper_pipes(stdin: bool) -> Result<(impl FnOnce() -> Result<(), Errno>, Spawned), Failure> {
    let (theirs, ours) = pipes(stdin, None)?;
    // The one that content goes through. As it was, it would serve as well, in smaller steps.
    let content = ours.stdin.as_ref().unwrap_or(&ours.stdout);
    let _ = fcntl_setpipe_size(content, PIPE_SIZE);
    let become_standard = move || {
        dup2_stdin(&theirs.stdin)?;
        dup2_stdout(&theirs.stdout)?;
        dup2_stderr(&theirs.stderr)
    };
    Ok((become_standard, ours))
}

/// The size of a terminal. Its fields are 16 bits wide, and 0 by 0 is of no use to a program.
pub fn window(rows: u32, columns: u32) -> Winsize {
    let size = |given: u32, default| match given {
        0 => default,
        given => u16::try_from(given).unwrap_or(u16::MAX),
    };
    Winsize {
        ws_row: size(rows, 24),
        ws_col: size(columns, 80),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn terminal(pty: &Pty, identity: Option<&Identity>) -> Result<(Theirs, Spawned), Failure> {
    let make = || -> Result<(Theirs, Spawned), Errno> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags)?;
        unlockpt(&ours)?;
        let theirs = ioctl_tiocgptpeer(&ours, flags)?;
        tcsetwinsize(&theirs, window(pty.rows, pty.columns))?;
        give(theirs.as_fd(), identity);
        fcntl_setfl(&ours, OFlags::NONBLOCK)?;
        let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
        let ours = Spawned {
            pid: Pid::INIT,
            stdin: Some(copy(&ours)?),
            stdout: ours,
            stderr: None,
            is_terminal: true,
        };
        let theirs = Theirs {
            stdout: copy(&theirs)?,
            stderr: copy(&theirs)?,
            stdin: theirs,
        };
        Ok((theirs, ours))
    };
    make().map_err(|errno| resources("pty", errno))
}

fn resources(call: &str, errno: Errno) -> Failure {
    match errno {
        Errno::MFILE | Errno::NFILE | Errno::NOSPC => {
            Failure::new(ErrorCode::TooMany, format!("{call}: {errno}"))
        }
        errno => Failure::internal(call, errno),
    }
}

fn explain(program: &OsStr, errno: Errno) -> Failure {
    let code = match errno {
        Errno::NOENT | Errno::NOTDIR => ErrorCode::NotFound,
        Errno::ACCESS | Errno::PERM => ErrorCode::PermissionDenied,
        Errno::NOEXEC => ErrorCode::NotExecutable,
        Errno::TOOBIG | Errno::NAMETOOLONG | Errno::LOOP => ErrorCode::InvalidArgument,
        Errno::AGAIN | Errno::MFILE | Errno::NFILE => ErrorCode::TooMany,
        _ => ErrorCode::Internal,
    };
    let program = Path::new(program).display();
    Failure::new(code, format!("{program}: {}", plain(&errno.into())))
}
