//! `manifest.json`: what a snapshot is, for people and programs; its digest is the snapshot's id.
//!
//! The id is the BLAKE3 digest of the manifest's bytes with the id's own 64 digits as zeros. It names the parent by its id and the files by their
//! digests, so an id stands for everything that a restored VM is made of. The first three lines are always
//! those that [`Manifest::seal`] writes, so that format and id can be read before anything else is understood.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{FormatError, WriteError};
use crate::file::{NamedFile, within};
use crate::json;
use crate::{PAGE_BYTES, PAGES_MAX};

/// File name of a manifest.
pub const MANIFEST: &str = "manifest.json";
/// File name of a VM's state.
pub const STATE: &str = "state.bin";
/// File name of the layer of guest memory.
pub const MEMORY: &str = "memory.layer";
/// What the file name of a disk's layer begins with; the number of its drive and [`LAYER`] follow.
const DISK: &str = "disk-";
/// What the file name of a layer ends with.
const LAYER: &str = ".layer";
/// File name of a working set, which no manifest lists.
pub const WORKING_SET: &str = "working-set";
/// The format that is written, and the newest that is read.
pub const FORMAT: u32 = 1;
/// Most bytes of a manifest.
pub const MANIFEST_MAX: u64 = 1 << 20;
/// Most bytes of a name.
pub const NAME_MAX: usize = 63;
/// Most files of a snapshot.
pub const FILES_MAX: usize = 64;

/// What stands before the id's digits.
const HEAD: &str = "{\n  \"format\": 1,\n  \"id\": \"";
const ID_LEN: usize = 64;
const EXPECTED: &str = "a snapshot's manifest";

/// What a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format of the snapshot.
    pub format: u32,
    /// The snapshot's id; [`Manifest::seal`] sets it.
    pub id: Digest,
    /// What its user calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// When it was taken, in seconds since 1970.
    pub created: u64,
    /// Version of the monitor that took it.
    pub software: String,
    /// The snapshot whose layers lie below; absent for one that is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Digest>,
    /// The VM.
    pub machine: Machine,
    /// How programs are run in it where nobody says otherwise.
    #[serde(default, skip_serializing_if = "Programs::is_default")]
    pub programs: Programs,
    /// The processor that the VM ran on.
    pub cpu: CpuFingerprint,
    /// The interpreter that waits in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<Warm>,
    /// The snapshot's files, but this one.
    pub files: Vec<FileEntry>,
}

/// A VM, as far as a restore must have it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Ranges of guest memory, ascending. A memory layer has them one behind the other.
    pub memory: Vec<MemoryRange>,
    /// What was booted.
    pub kernel: KernelFile,
    /// The guest kernel's command line.
    pub cmdline: String,
    /// The disks, in the order in which the guest has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
    /// The context id of the guest's vsock device; absent where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_cid: Option<u32>,
    /// Whether it has a lane.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lane: bool,
}

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// First guest physical address.
    pub start: u64,
    /// Size in bytes.
    pub bytes: u64,
}

/// A guest kernel's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelFile {
    /// Where it was.
    pub path: String,
    /// What it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// A disk. The content of one that the guest may write to is the snapshot's, in the layer [`disk_layer`]; that of others is none of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Its file; where the guest may write, the one that it had when it booted.
    pub path: String,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The device that it is to the guest: `blk` or `pmem`.
    pub interface: String,
    /// Size in bytes.
    pub bytes: u64,
    /// When the file was last modified, in nanoseconds since 1970; 0 where the guest may write.
    pub mtime_ns: u64,
    /// What it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// How programs are run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Programs {
    /// Variables of every program's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The directory that they start in; absent for the agent's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Who runs them; absent for the agent's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Programs {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a processor is and can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFingerprint {
    /// Its maker, as CPUID has it.
    pub vendor: String,
    /// Family, model and stepping.
    pub model: String,
    /// Words of feature bits as `<leaf>.<subleaf>.<register>=<8 hexadecimal digits>`, sorted.
    pub features: Vec<String>,
}

/// A started interpreter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warm {
    /// Its language.
    pub language: String,
    /// What it has imported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<String>,
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the snapshot's directory.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// The digest in its header, which stands for all of it.
    pub digest: Digest,
}

impl Machine {
    /// Pages of a memory layer; `None` where the ranges are none of a VM's.
    pub fn total_pages(&self) -> Option<u64> {
        let (mut end, mut pages) = (0, 0);
        for range in &self.memory {
            let whole = range.start % PAGE_BYTES == 0 && range.bytes % PAGE_BYTES == 0;
            if !whole || range.bytes == 0 || range.start < end {
                return None;
            }
            end = range.start.checked_add(range.bytes)?;
            pages += range.bytes / PAGE_BYTES;
        }
        (0 < pages && pages <= PAGES_MAX).then_some(pages)
    }

    /// Pages that the layer `name` spans; `None` where this does not say.
    pub fn pages_of(&self, name: &str) -> Option<u64> {
        if name == MEMORY {
            return self.total_pages();
        }
        let drive = self.drives.get(drive_of(name)?)?;
        Some(drive.bytes.div_ceil(PAGE_BYTES))
    }

    /// The numbers of the drives that the guest may write to, each of which has a layer.
    pub fn writable_drives(&self) -> impl Iterator<Item = usize> {
        let drives = self.drives.iter().enumerate();
        drives.filter_map(|(number, drive)| (!drive.read_only).then_some(number))
    }
}

/// File name of the layer of a disk: the drive `drive` of the manifest, counted from 0.
pub fn disk_layer(drive: usize) -> String {
    format!("{DISK}{drive}{LAYER}")
}

/// The drive whose layer is called so.
fn drive_of(name: &str) -> Option<usize> {
    let number = name.strip_prefix(DISK)?.strip_suffix(LAYER)?;
    let drive = number.parse().ok()?;
    // One disk has one name.
    (disk_layer(drive) == name).then_some(drive)
}

impl Manifest {
    /// Sets format and id, and gives the bytes of the file; `path` names it in messages.
    pub fn seal(&mut self, path: &Path) -> Result<Vec<u8>, WriteError> {
        self.format = FORMAT;
        self.id = Digest([0; 32]);
        if let Some(what) = self.mistake() {
            return Err(WriteError::Manifest {
                file: path.to_owned(),
                what,
            });
        }
        let json = serde_json::to_vec_pretty(self);
        let mut json = json.map_err(|source| WriteError::Json {
            file: path.to_owned(),
            source,
        })?;
        json.push(b'\n');
        within(
            path,
            "the manifest in bytes",
            json.len() as u64,
            MANIFEST_MAX,
        )?;
        self.id = Digest::of(&json);
        json[HEAD.len()..HEAD.len() + ID_LEN].copy_from_slice(self.id.to_string().as_bytes());
        Ok(json)
    }

    /// Reads a manifest and checks that it is the one of its id.
    pub fn read(file: File, path: &Path) -> Result<Self, FormatError> {
        let file = NamedFile::new(file, path, EXPECTED)?;
        let len = file.within(file.len(), MANIFEST_MAX, 0, "its length")?;
        Self::parse(&file.read_vec(0, len, "the manifest")?, path)
    }

    /// Takes the bytes of a manifest, which `path` names in messages, and checks that it is the one of its id.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self, FormatError> {
        check_format(path, json)?;
        let (id, json) = cut_id(path, json)?;
        let corrupt = |offset: usize, what: String| FormatError::Corrupt {
            file: path.to_owned(),
            offset: offset as u64,
            what,
        };
        if Digest::of(&json) != id {
            let what = "the manifest is not the one of its id: it was changed";
            return Err(corrupt(HEAD.len(), what.to_owned()));
        }
        let mut manifest: Self = json::parse(path, &json, 0)?;
        manifest.id = id;
        match manifest.mistake() {
            None => Ok(manifest),
            Some(what) => Err(corrupt(0, what)),
        }
    }

    /// The entry of the file `name`.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    /// What no manifest may say.
    fn mistake(&self) -> Option<String> {
        if let Some(name) = self.name.as_ref().filter(|name| !is_name(name)) {
            return Some(format!("{name:?} is no name of a snapshot"));
        }
        if self.machine.total_pages().is_none() {
            return Some("the memory ranges are none of a VM's".to_owned());
        }
        if self.files.len() > FILES_MAX {
            return Some(format!("it has more than {FILES_MAX} files"));
        }
        let mut names: Vec<_> = self.files.iter().map(|file| &file.name).collect();
        if let Some(name) = names.iter().find(|name| !is_file_name(name)) {
            return Some(format!("{name:?} is no name of a snapshot's file"));
        }
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Some(format!("it has two files {:?}", twice[0]));
        }
        self.mistake_of_disks()
    }

    /// Disks that the guest may write to have a layer each, and no others have.
    fn mistake_of_disks(&self) -> Option<String> {
        let writable: Vec<usize> = self.machine.writable_drives().collect();
        let lacks = |drive: &&usize| self.file(&disk_layer(**drive)).is_none();
        if let Some(drive) = writable.iter().find(lacks) {
            let layer = disk_layer(*drive);
            return Some(format!(
                "the guest may write to drive {drive}, but there is no {layer}"
            ));
        }
        let mut drives = self.files.iter().filter_map(|file| drive_of(&file.name));
        let drive = drives.find(|drive| !writable.contains(drive))?;
        Some(format!(
            "it has a layer of drive {drive}, to which no guest may write"
        ))
    }
}

/// Whether a snapshot may be called so: letters, digits, `.`, `_`, `-`, the first a letter or digit.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(allowed)
}

/// `state.bin` or a layer: nothing that leads out of the directory, nothing that stands for another file of it.
fn is_file_name(name: &str) -> bool {
    name == STATE || name.strip_suffix(LAYER).is_some_and(is_name)
}

/// Refuses what a newer program wrote before it is looked at any closer.
fn check_format(path: &Path, json: &[u8]) -> Result<(), FormatError> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    match serde_json::from_slice(json) {
        Ok(Format { format }) if format > FORMAT => Err(FormatError::TooNew {
            file: path.to_owned(),
            offset: 0,
            what: EXPECTED,
            found: format,
            supported: FORMAT,
        }),
        // What else is wrong with it shows next.
        _ => Ok(()),
    }
}

/// The id, and the manifest's bytes with zeros in its place.
fn cut_id(path: &Path, json: &[u8]) -> Result<(Digest, Vec<u8>), FormatError> {
    let head = HEAD.as_bytes();
    if let Some(at) = (0..head.len()).find(|&at| json.get(at) != Some(&head[at])) {
        return Err(FormatError::NotOurs {
            file: path.to_owned(),
            offset: at as u64,
            expected: EXPECTED,
        });
    }
    let mut json = json.to_vec();
    let digits = json.get_mut(head.len()..head.len() + ID_LEN);
    let id = digits.and_then(|digits| {
        let id = std::str::from_utf8(digits).ok()?.parse().ok()?;
        digits.fill(b'0');
        Some(id)
    });
    match id {
        Some(id) => Ok((id, json)),
        None => Err(FormatError::Corrupt {
            file: path.to_owned(),
            offset: head.len() as u64,
            what: "the id has not 64 lower-case hexadecimal digits".to_owned(),
        }),
    }
}
