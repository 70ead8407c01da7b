//! Running source code: a `RunCode` becomes an `Exec` of the language's interpreter.
//!
//! The source goes into a file of its own in a directory of its own, which last as
//! long as the program: standard input stays the program's, tracebacks show lines,
//! and no limit on arguments applies. A shell gets its source as an argument when
//! it fits, which spares the file.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, fchown};
use std::path::{Path, PathBuf};

use guest_agent::proto::{EnvVar, ErrorCode, Exec, Language, RunCode};
use rustix::fs::{FallocateFlags, fallocate};

use crate::failure::Failure;

/// Where sources live: in the guest a tmpfs. Users can go through the directory, not look around.
const GUEST_DIRECTORY: &str = "/run/code";

/// The longest source that is passed as an argument. The kernel's limit is 128 KiB (MAX_ARG_STRLEN).
const MAX_ARGUMENT: usize = 64 * 1024;

/// A source file; it and its directory go when this is dropped.
pub struct SourceFile {
    directory: PathBuf,
    file: PathBuf,
    /// The directory, open. To close it takes longer than to keep it.
    handle: Option<File>,
}

impl Drop for SourceFile {
    fn drop(&mut self) {
        // Whatever is left behind, the guest's tmpfs goes with the guest.
        // A directory that its user has put more into goes with all of that.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// The name of a file of Python that its client gives none.
const PYTHON_FILE: &str = "main.py";

/// Memory that a file has before its content is known, in bytes: a page.
const ROOM: u64 = 4096;

/// A source file that is empty yet. Its user cannot get at it: the directory is the agent's.
pub struct Draft {
    source: SourceFile,
    content: File,
    /// Who runs its program.
    pub owner: Option<(u32, u32)>,
}

impl Draft {
    /// One for a program that `owner` runs. `id` is no other directory's.
    fn new(id: &str, name: &str, owner: Option<(u32, u32)>) -> std::io::Result<Self> {
        let base = if std::process::id() == 1 {
            match DirBuilder::new().mode(0o711).create(GUEST_DIRECTORY) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error)?,
                _ => PathBuf::from(GUEST_DIRECTORY),
            }
        } else {
            std::env::temp_dir()
        };
        let directory = base.join(format!("code-{}-{id}", std::process::id()));
        let mut builder = DirBuilder::new();
        builder.mode(0o700).create(&directory)?;
        let file = directory.join(name);
        let mut source = SourceFile {
            directory,
            file,
            handle: None,
        };
        let content = File::create_new(&source.file)?;
        if let Some((uid, gid)) = owner {
            fchown(&content, Some(uid), Some(gid))?;
        }
        source.handle = Some(File::open(&source.directory)?);
        Ok(Self {
            source,
            content,
            owner,
        })
    }

    /// One that is ready before its program is known, which is Python. To make it takes an emulated kernel as long as a short program.
    ///
    /// # Errors
    /// The directory or the file cannot be made.
    pub fn ahead(number: u64, owner: Option<(u32, u32)>) -> std::io::Result<Self> {
        // No other number begins with a zero.
        let draft = Self::new(&format!("0{number}"), PYTHON_FILE, owner)?;
        // Where that cannot be had ahead, it is had when it is written.
        let _ = fallocate(&draft.content, FallocateFlags::KEEP_SIZE, 0, ROOM);
        Ok(draft)
    }

    /// Fills it and calls it `name`. From then on the directory is its user's to play with.
    fn fill(mut self, name: &str, source: &[u8]) -> std::io::Result<SourceFile> {
        self.content.write_all(source)?;
        if self.source.file.file_name() != Some(OsStr::new(name)) {
            let named = self.source.directory.join(name);
            std::fs::rename(&self.source.file, &named)?;
            self.source.file = named;
        }
        if let (Some((uid, gid)), Some(directory)) = (self.owner, &self.source.handle) {
            fchown(directory, Some(uid), Some(gid))?;
        }
        Ok(self.source)
    }
}

/// What to execute for a piece of source code, and the file to keep for as long as it runs.
/// `number` makes the file's directory unique within this agent; `owner` is who runs it; so does
/// that of `draft`.
///
/// # Errors
/// A failure that names the field that is wrong, or the file that cannot be written.
pub fn prepare(
    code: RunCode,
    number: u64,
    owner: Option<(u32, u32)>,
    draft: Option<Draft>,
) -> Result<(Exec, Option<SourceFile>), Failure> {
    let invalid = |message: String| Failure::new(ErrorCode::InvalidArgument, message);
    let (interpreter, default_name) = match code.language() {
        Language::Python => (python(&code.env), PYTHON_FILE),
        Language::Shell => ("/bin/sh", "main.sh"),
        Language::Unspecified => {
            return Err(invalid(format!("unknown language {}", code.language)));
        }
    };
    let name = match code.filename.as_str() {
        "" => default_name,
        name => name,
    };
    if name.contains(['/', '\0']) || name == "." || name == ".." || name.len() > 255 {
        return Err(invalid(format!("filename {name:?} is not a plain name")));
    }

    let mut argv = vec![interpreter.as_bytes().to_vec()];
    let as_argument = code.language() == Language::Shell
        && code.source.len() <= MAX_ARGUMENT
        && !code.source.contains(&0);
    let file = if as_argument {
        argv.extend([b"-c".to_vec(), code.source, name.as_bytes().to_vec()]);
        None
    } else {
        let is_ahead = draft.is_some();
        let draft = draft.map_or_else(|| Draft::new(&number.to_string(), name, owner), Ok);
        let mut file = draft
            .and_then(|draft| draft.fill(name, &code.source))
            .map_err(|error| Failure::internal("write the source file", error))?;
        // Many may run at once, and one was ready.
        file.handle.take_if(|_| !is_ahead);
        argv.push(file.file.as_os_str().as_bytes().to_vec());
        Some(file)
    };
    argv.extend(code.args);

    let mut env = code.env;
    if code.language == i32::from(Language::Python) && !code.cwd.is_empty() {
        import_from(&mut env, Path::new(OsStr::from_bytes(&code.cwd)));
    }
    let exec = Exec {
        argv,
        env,
        clear_env: code.clear_env,
        cwd: code.cwd,
        stdin: code.stdin,
        pty: code.pty,
        user: code.user,
        limits: code.limits,
        timeout_ms: code.timeout_ms,
    };
    Ok((exec, file))
}

/// The Python of programs that have these variables.
pub fn python(env: &[EnvVar]) -> &'static str {
    if env.iter().any(|variable| variable.name == "PATH") {
        "python3"
    } else {
        // Each directory that is searched in vain costs a guest some disk reads.
        "/usr/bin/python3"
    }
}

/// Puts a directory in front of what PYTHONPATH the client gave: as a script lies in a
/// directory of its own, Python would not look for modules in the working directory.
fn import_from(env: &mut Vec<EnvVar>, directory: &Path) {
    const NAME: &str = "PYTHONPATH";
    let mut value = directory.as_os_str().as_bytes().to_vec();
    if let Some(given) = env.iter().rfind(|variable| variable.name == NAME) {
        value.push(b':');
        value.extend(&given.value);
    }
    env.push(EnvVar {
        name: NAME.into(),
        value,
    });
}
