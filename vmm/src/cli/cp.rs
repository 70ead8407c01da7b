//! `vmm cp`: files and trees into a sandbox, and out of it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::exec::connect;
use super::{CliError, status};
use crate::agent::{Agent, AgentError, FileKind, WriteOptions};

/// Copy files and trees into a sandbox (FILE NAME:PATH), or out of it (NAME:PATH FILE)
///
/// As with cp, what is copied to a directory that exists lands in it under its own name. A directory is copied with all
/// that is in it. - is standard input or output.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// FILE, NAME:PATH or -
    #[arg(value_name = "FROM")]
    from: OsString,
    /// NAME:PATH, FILE or -
    #[arg(value_name = "TO")]
    to: OsString,
    /// Who does it in the guest: a name, or UID[:GID] [default: the unprivileged user]
    #[arg(short, long, value_name = "USER", default_value = "")]
    user: String,
}

/// `NAME:PATH` apart; `None` for a file of the host.
fn remote(word: &OsStr) -> Option<(&str, &Path)> {
    let bytes = word.as_bytes();
    let colon = bytes.iter().position(|&byte| byte == b':')?;
    let (name, path) = (&bytes[..colon], &bytes[colon + 1..]);
    // ./a:b and /a:b are files.
    if name.is_empty() || name.contains(&b'/') {
        return None;
    }
    let path = if path.is_empty() { b"." } else { path };
    let path = Path::new(OsStr::from_bytes(path));
    Some((std::str::from_utf8(name).ok()?, path))
}

/// Carries out `vmm cp`.
pub fn cp(args: &CpArgs) -> Result<u8, CliError> {
    match (remote(&args.from), remote(&args.to)) {
        (None, Some((name, path))) => {
            let agent = connect(name)?.agent.as_user(&args.user);
            copy_in(&agent, Path::new(&args.from), path).map_err(|error| failed(name, error))
        }
        (Some((name, path)), None) => {
            let agent = connect(name)?.agent.as_user(&args.user);
            match copy_out(&agent, path, Path::new(&args.to)) {
                Err(CopyError::Agent(AgentError::Output { source, .. }))
                    if source.kind() == io::ErrorKind::BrokenPipe =>
                {
                    return Ok(status::BROKEN_PIPE);
                }
                result => result.map_err(|error| failed(name, error)),
            }
        }
        (Some(_), Some(_)) => Err(CliError::BadInput(
            "one of the two must be on the host: copy out of one sandbox, then into the other"
                .to_owned(),
        )),
        (None, None) => Err(CliError::BadInput(
            "neither is in a sandbox: give NAME:PATH for one of the two".to_owned(),
        )),
    }?;
    Ok(0)
}

#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("{}: {source}", .path.display())]
    Host { path: PathBuf, source: io::Error },
}

/// What is not there, or may not be read, is bad input, on either side.
fn failed(name: &str, error: CopyError) -> CliError {
    match error {
        CopyError::Agent(AgentError::Refused { message, .. }) => {
            CliError::BadInput(format!("{name}: {message}"))
        }
        CopyError::Agent(error @ (AgentError::Tree(_) | AgentError::Output { .. })) => {
            CliError::BadInput(error.to_string())
        }
        CopyError::Agent(error) => CliError::Monitor(format!("{name}: {error}")),
        CopyError::Host { .. } => CliError::BadInput(error.to_string()),
    }
}

fn host(path: &Path) -> impl FnOnce(io::Error) -> CopyError {
    let path = path.to_owned();
    |source| CopyError::Host { path, source }
}

/// `path`, or what is called `own` in it where `path` is a directory or is written like one.
fn target(path: &Path, is_directory: bool, own: &Path) -> PathBuf {
    let like_one = path.as_os_str().as_bytes().ends_with(b"/");
    match own.file_name() {
        Some(name) if is_directory || like_one => path.join(name),
        _ => path.to_owned(),
    }
}

fn copy_in(agent: &Agent, from: &Path, to: &Path) -> Result<(), CopyError> {
    let is_directory = || -> Result<bool, CopyError> {
        match agent.stat(to, true) {
            Ok(info) => Ok(info.kind() == FileKind::Directory),
            // It may be about to be made.
            Err(AgentError::Refused { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    };
    if from == Path::new("-") {
        let mut stdin = Progress::new(io::stdin().lock());
        agent.write_file(to, &mut stdin, WriteOptions::default())?;
        return Ok(());
    }
    // The directory's own name, also for "." and "..".
    let own = fs::canonicalize(from).map_err(host(from))?;
    let to = target(to, is_directory()?, &own);
    let metadata = fs::metadata(from).map_err(host(from))?;
    if metadata.is_dir() {
        return Ok(agent.write_tree(from, &to)?);
    }
    let file = File::open(from).map_err(host(from))?;
    let options = WriteOptions {
        mode: Some(metadata.permissions().mode() & 0o777),
        ..WriteOptions::default()
    };
    agent.write_file(&to, &mut Progress::new(file), options)?;
    Ok(())
}

fn copy_out(agent: &Agent, from: &Path, to: &Path) -> Result<(), CopyError> {
    if to == Path::new("-") {
        agent.read_file(from, &mut Progress::new(io::stdout().lock()))?;
        return Ok(());
    }
    let info = agent.stat(from, true)?;
    let to = target(to, to.is_dir(), from);
    if info.kind() == FileKind::Directory {
        return Ok(agent.read_tree(from, &to)?);
    }
    // Whole or not at all: aside, then renamed.
    let directory = to.parent().filter(|dir| !dir.as_os_str().is_empty());
    let mut name = OsString::from(".");
    name.push(to.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    let aside = directory.unwrap_or(Path::new(".")).join(name);
    let copy = || -> Result<(), CopyError> {
        let file = File::create(&aside).map_err(host(&to))?;
        let mut writer = Progress::new(file);
        agent.read_file(from, &mut writer)?;
        let permissions = fs::Permissions::from_mode(info.mode & 0o777);
        fs::set_permissions(&aside, permissions).map_err(host(&to))?;
        fs::rename(&aside, &to).map_err(host(&to))
    };
    copy().inspect_err(|_| {
        let _ = fs::remove_file(&aside);
    })
}

/// How long a copy takes before it says how far it is, and how often it does then.
const SHOW_EVERY: Duration = Duration::from_secs(1);

/// Says on a terminal how much has passed.
struct Progress<T> {
    inner: T,
    bytes: u64,
    start: Instant,
    shown: Instant,
    terminal: bool,
    visible: bool,
}

impl<T> Progress<T> {
    fn new(inner: T) -> Self {
        let now = Instant::now();
        Self {
            inner,
            bytes: 0,
            start: now,
            shown: now,
            terminal: io::stderr().is_terminal(),
            visible: false,
        }
    }

    fn pass(&mut self, count: usize) {
        self.bytes += count as u64;
        if self.terminal && self.shown.elapsed() >= SHOW_EVERY {
            self.shown = Instant::now();
            self.visible = true;
            let mib = self.bytes as f64 / f64::from(1 << 20);
            let rate = mib / self.start.elapsed().as_secs_f64();
            let _ = write!(io::stderr(), "\r\u{1b}[K{mib:.1} MiB, {rate:.1} MiB/s");
        }
    }
}

impl<T> Drop for Progress<T> {
    fn drop(&mut self) {
        if self.visible {
            let _ = write!(io::stderr(), "\r\u{1b}[K");
        }
    }
}

impl<T: Read> Read for Progress<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.pass(count);
        Ok(count)
    }
}

impl<T: Write> Write for Progress<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.pass(count);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_a_path_are_told_from_a_file() {
        let parts = |word| remote(OsStr::new(word)).map(|(name, path)| (name, path.to_str()));
        assert_eq!(parts("box:/etc/passwd"), Some(("box", Some("/etc/passwd"))));
        assert_eq!(parts("box:a:b"), Some(("box", Some("a:b"))));
        assert_eq!(parts("box:"), Some(("box", Some("."))));
        for file in ["file", "./a:b", "/a:b", ":b", "-"] {
            assert_eq!(parts(file), None);
        }
    }

    #[test]
    fn a_directory_takes_what_is_copied_under_its_own_name() {
        let target = |path, is, own| target(Path::new(path), is, Path::new(own));
        assert_eq!(target("/tmp", true, "/x/file"), Path::new("/tmp/file"));
        assert_eq!(target("/new/", false, "/x/file"), Path::new("/new/file"));
        assert_eq!(target("/new", false, "/x/file"), Path::new("/new"));
    }
}
