//! A VM described in one TOML or JSON file.
//!
//! Text becomes a [`VmFile`], in which everything is optional: what a file leaves open is the command line's to say, and what
//! both say is the command line's. Nothing here looks at what the file names; [`crate::config`] and the builder do.

mod error;
mod values;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use self::error::ConfigFileError;
use self::values::Table;
use crate::config::DriveInterface;
use crate::warm::WarmRuntime;

/// Longest file that is read, in bytes.
pub const SIZE_MAX: u64 = 1 << 20;

/// What a file says of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmFile {
    /// The sandbox's name.
    pub name: Option<String>,
    /// Words of the user's own, by which sandboxes can be told apart.
    pub labels: BTreeMap<String, String>,
    /// Virtual processors.
    #[serde(deserialize_with = "values::cpus")]
    pub cpus: Option<u32>,
    /// Guest memory in MiB: a number, or text such as `"2G"`.
    #[serde(deserialize_with = "values::memory")]
    pub memory: Option<u64>,
    /// The kernel: an uncompressed `vmlinux`, or a bzImage.
    #[serde(deserialize_with = "values::path")]
    pub kernel: Option<PathBuf>,
    /// The image with the root file system.
    #[serde(deserialize_with = "values::path")]
    pub image: Option<PathBuf>,
    /// What the image is to the guest: `"pmem"` or `"block"`.
    pub image_as: Option<DriveInterface>,
    /// Disks besides the image, in the guest's order.
    #[serde(deserialize_with = "values::tables")]
    pub drives: Vec<DriveEntry>,
    /// Words to add to the kernel's command line.
    pub cmdline: Option<String>,
    /// How long the VM may live: a number of seconds, or text such as `"5m"`.
    #[serde(deserialize_with = "values::timeout")]
    pub timeout: Option<Duration>,
    /// What the sandbox and all that branch off it may have for themselves, in MiB: a number, or text such as `"2G"`.
    #[serde(deserialize_with = "values::memory")]
    pub tree_memory: Option<u64>,
    /// How many they may be.
    #[serde(deserialize_with = "values::sandboxes")]
    pub tree_sandboxes: Option<u32>,
    /// How many children programs of the guest may have made that are alive.
    #[serde(deserialize_with = "values::sandboxes")]
    pub guest_branch: Option<u32>,
    /// What each of them may keep of its drives for those that branch off it, in MiB: a number, or text such as `"2G"`.
    #[serde(deserialize_with = "values::memory")]
    pub drive_backup: Option<u64>,
    /// What the agent gives to each program.
    #[serde(deserialize_with = "values::table")]
    pub agent: AgentEntry,
}

/// A disk besides the image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveEntry {
    /// The file that backs it.
    #[serde(deserialize_with = "values::required_path")]
    pub path: PathBuf,
    /// The guest may not write to it.
    #[serde(default)]
    pub read_only: bool,
}

/// What the agent gives to each program that does not say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentEntry {
    /// Variables of the environment.
    #[serde(deserialize_with = "values::env")]
    pub env: BTreeMap<String, String>,
    /// The directory of the guest to run in.
    pub cwd: Option<String>,
    /// Who runs them: a name, or `UID[:GID]`.
    pub user: Option<String>,
    /// The interpreter that stands ready for code: `"python"`, or `"python:json,re"`.
    #[serde(deserialize_with = "values::warm")]
    pub warm: Option<WarmRuntime>,
}

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// TOML 1.1.
    Toml,
    /// JSON, one object.
    Json,
}

impl Syntax {
    /// By the file's extension, else by how the text begins: no TOML begins with a brace.
    pub fn of(path: &Path, text: &str) -> Self {
        let extension = path
            .extension()
            .map(|extension| extension.to_string_lossy());
        match extension.as_deref().map(str::to_ascii_lowercase).as_deref() {
            Some("toml") => Self::Toml,
            Some("json") => Self::Json,
            _ if text.trim_start().starts_with('{') => Self::Json,
            _ => Self::Toml,
        }
    }
}

impl VmFile {
    /// Reads the file at `path`. Relative paths in it become relative to its directory.
    pub fn read(path: &Path) -> Result<Self, ConfigFileError> {
        let unreadable = |source| ConfigFileError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let file = File::options()
            .read(true)
            // Nobody may be at the other end of a pipe.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(unreadable)?;
        if !file.metadata().map_err(unreadable)?.is_file() {
            let path = path.to_owned();
            return Err(ConfigFileError::NotAFile { path });
        }
        let mut bytes = Vec::new();
        file.take(SIZE_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        if bytes.len() as u64 > SIZE_MAX {
            let path = path.to_owned();
            return Err(ConfigFileError::TooLong { path });
        }
        Self::parse(path, &bytes)
    }

    /// Understands `bytes` as the contents of the file at `path`.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ConfigFileError> {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
            Err(error) => return Err(ConfigFileError::not_text(path, bytes, error.valid_up_to())),
        };
        let mut file = match Syntax::of(path, text) {
            Syntax::Toml => Self::parse_toml(path, text)?,
            Syntax::Json => Self::parse_json(path, text)?,
        };
        let directory = path.parent().unwrap_or(Path::new(""));
        let paths = [&mut file.kernel, &mut file.image].into_iter().flatten();
        for path in paths.chain(file.drives.iter_mut().map(|drive| &mut drive.path)) {
            *path = directory.join(&*path);
        }
        Ok(file)
    }

    fn parse_toml(path: &Path, text: &str) -> Result<Self, ConfigFileError> {
        let deserializer = toml::Deserializer::parse(text)
            .map_err(|error| ConfigFileError::toml_syntax(path, text, &error))?;
        serde_path_to_error::deserialize(deserializer)
            .map(|Table(file)| file)
            .map_err(|error| ConfigFileError::toml_value(path, text, &error))
    }

    fn parse_json(path: &Path, text: &str) -> Result<Self, ConfigFileError> {
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let Table(file) = serde_path_to_error::deserialize(&mut deserializer)
            .map_err(|error| ConfigFileError::json(path, &error))?;
        deserializer
            .end()
            .map_err(|error| ConfigFileError::json_syntax(path, &error))?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests;
