//! What is written down about a sandbox: what it is, and how it ended.
//!
//! Both are JSON files in the sandbox's directory, replaced as a whole, and readable after the sandbox is gone.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::budget::Budget;
use crate::warm::WarmRuntime;

/// Largest record that is read, in bytes.
const SIZE_MAX: u64 = 1 << 20;

/// File name of a [`Record`].
pub const RECORD: &str = "sandbox.json";
/// File name of an [`ExitRecord`].
pub const EXIT_RECORD: &str = "exit.json";

/// What a sandbox is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Eight hexadecimal digits, unique on this host.
    pub id: String,
    /// What its user calls it; unique among the sandboxes that are listed.
    pub name: String,
    /// Process id of its monitor.
    pub pid: u32,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// It was started detached: it is listed after its end, until it is removed.
    pub kept: bool,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The kernel's file.
    pub kernel: String,
    /// The image's file.
    pub image: String,
    /// The user's own labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What every program's environment has.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The directory that programs start in; absent for the agent's choice.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Who runs programs; absent for the agent's choice, the unprivileged user.
    #[serde(default)]
    pub user: Option<String>,
    /// The interpreter that stands ready for code; absent for none.
    #[serde(default)]
    pub warm: Option<WarmRuntime>,
    /// Where it branched off; absent for one that did not.
    #[serde(default)]
    pub branch: Option<BranchPoint>,
    /// What it and all that branch off it may have together.
    #[serde(default, skip_serializing_if = "Budget::is_empty")]
    pub budget: Budget,
    /// How many children its guest may have made that are alive.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub guest_branch: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Where a sandbox branched off another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchPoint {
    /// The parent's id.
    pub parent: String,
    /// The parent's name at that time.
    pub parent_name: String,
    /// The id of the first of the tree, which did not branch off another.
    pub root: String,
    /// How many steps from there: at least 1.
    pub depth: u32,
    /// When, in seconds since 1970. Children of one call have it in common, and the memory of one moment.
    pub at: u64,
}

impl Record {
    /// The id of the first of its tree.
    pub fn root(&self) -> &str {
        self.branch.as_ref().map_or(&self.id, |own| &own.root)
    }

    /// Where children of this sandbox branch off it now.
    pub fn branch_point(&self) -> BranchPoint {
        let own = self.branch.as_ref();
        BranchPoint {
            parent: self.id.clone(),
            parent_name: self.name.clone(),
            root: self.root().to_owned(),
            depth: own.map_or(1, |own| own.depth.saturating_add(1)),
            at: now(),
        }
    }
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Exit status of its monitor, as `vmm run` would have it.
    pub status: u8,
    /// Why, in a few words.
    pub reason: String,
    /// When, in seconds since 1970.
    pub ended: u64,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Writes `value` to the file `name` in `dir`, whole or not at all.
pub fn write<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    write_aside(dir, name, value)?;
    put_in_place(dir, name)
}

/// The first half of [`write`].
pub fn write_aside<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    fs::write(dir.join(aside(name)), serde_json::to_vec_pretty(value)?)
}

/// The second half of [`write`].
pub fn put_in_place(dir: &Path, name: &str) -> io::Result<()> {
    fs::rename(dir.join(aside(name)), dir.join(name))
}

/// What the file `name` is called until it is whole.
pub fn aside(name: &str) -> String {
    format!("{name}.new")
}

/// Reads the file `name` in `dir`; `None` where there is none.
pub fn read<T: for<'a> Deserialize<'a>>(dir: &Path, name: &str) -> io::Result<Option<T>> {
    let file = match File::open(dir.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut json = Vec::new();
    file.take(SIZE_MAX).read_to_end(&mut json)?;
    Ok(Some(serde_json::from_slice(&json)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read::<ExitRecord>(dir.path(), EXIT_RECORD).unwrap(), None);
        let record = ExitRecord {
            status: 3,
            reason: "tried".to_owned(),
            ended: now(),
        };
        write(dir.path(), EXIT_RECORD, &record).unwrap();
        assert_eq!(read(dir.path(), EXIT_RECORD).unwrap(), Some(record));
    }

    #[test]
    fn a_record_cut_short_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(RECORD), "{\"id\":").unwrap();
        assert!(read::<Record>(dir.path(), RECORD).is_err());
    }
}
