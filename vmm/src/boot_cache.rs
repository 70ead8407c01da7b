//! Snapshots of guests that have just booted, so that the next one like it need not boot.
//!
//! The key is made of everything that decides a boot: the machine's description, kernel and disks by their size and the time of their last change,
//! the monitor's own file, the processor. What has another key is never found; the store is bounded, and its content can be removed at any time.

use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use prost::Message;
use serde::Serialize;
use snapshot_fmt::digest::Digest;
use snapshot_fmt::manifest::{self, CpuFingerprint, Programs};

use crate::agent::{Agent, WarmRequest};
use crate::config::VmConfig;
use crate::devices::live::Disks;
use crate::logger::complain;
use crate::machine::Machine;
use crate::pager::Mode;
use crate::snapshot::SnapshotError;
use crate::snapshot::description::{cpu, describe};
use crate::snapshot::memory_layer::Lineage;
use crate::snapshot::restore::Saved;
use crate::snapshot::save::{Order, take};
use crate::store::remove::GcLimits;
use crate::store::{Store, StoreError};
use crate::user_dirs::cache_dir;
use crate::warm::WarmRuntime;

/// Bytes that the cache may have.
const BYTES_MAX: u64 = 1 << 30;
/// Digits of the key in a snapshot's name.
const KEY_DIGITS: usize = 32;

/// Where a guest like the one that is wanted may be found.
pub struct BootCache {
    store: Store,
    key: String,
    machine: manifest::Machine,
}

/// A file, as far as its content can be told from outside.
#[derive(Serialize)]
struct Identity {
    path: PathBuf,
    bytes: u64,
    mtime: (i64, i64),
    inode: u64,
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let meta = fs::metadata(&path)?;
        Ok(Self {
            path,
            bytes: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            inode: meta.ino(),
        })
    }
}

/// Everything that decides what a guest is once it has booted.
#[derive(Serialize)]
struct Inputs {
    machine: manifest::Machine,
    kernel: Identity,
    monitor: Identity,
    cpu: CpuFingerprint,
    /// The request for the interpreter that stands ready.
    interpreter: Option<Vec<u8>>,
}

impl BootCache {
    /// The cache for the guest of `config`, in which an interpreter stands ready, if one is wanted. None where it cannot be cached: the guest may write to a disk, or there is no place.
    pub fn of(config: &VmConfig, interpreter: Option<WarmRequest>) -> Option<Self> {
        if config.drives.iter().any(|drive| !drive.read_only) {
            return None;
        }
        let inputs = Inputs {
            machine: describe(config, &Disks::new()).ok()?,
            kernel: Identity::of(&config.kernel).ok()?,
            monitor: Identity::of(Path::new("/proc/self/exe")).ok()?,
            cpu: cpu(),
            interpreter: interpreter.map(|request| request.encode_to_vec()),
        };
        let key = Digest::of(&serde_json::to_vec(&inputs).ok()?).to_string();
        Some(Self {
            store: store()?,
            key: key[..KEY_DIGITS].to_owned(),
            machine: inputs.machine,
        })
    }

    /// The guest, if it is there. One that cannot be used is as good as none, and is removed.
    pub fn find(&self) -> Option<Saved> {
        match Saved::open(&self.store, &self.key, Mode::Map) {
            Ok(saved) => Some(saved),
            // There is none, or it was removed just now.
            Err(SnapshotError::Store(StoreError::Unknown { .. } | StoreError::Gone { .. })) => None,
            Err(error) => {
                self.forget_unusable(&error);
                None
            }
        }
    }

    /// Removes the guest, which cannot be used for this reason, so that the next is booted.
    pub fn forget_unusable(&self, why: &dyn Error) {
        complain(format_args!("warning: a cached boot cannot be used: {why}"));
        if let Ok(id) = self.store.resolve(&self.key) {
            // Somebody else may use it, or have removed it.
            let _ = self.store.remove(&id, false);
        }
    }

    /// Keeps the guest that has just booted.
    pub fn keep(
        &self,
        machine: &Machine,
        agent: &Agent,
        warm: Option<&WarmRuntime>,
    ) -> Result<(), SnapshotError> {
        let order = Order {
            machine,
            description: &self.machine,
            agent: Some(agent),
            programs: Programs::default(),
            warm: warm.map(Into::into),
            name: Some(self.key.clone()),
            owner: None,
            lineage: Lineage::default(),
            parent_disks: None,
            parent: None,
            is_given_up: &|| false,
        };
        take(order, &self.store)?;
        let limits = GcLimits {
            before: None,
            bytes: Some(BYTES_MAX),
        };
        self.store.collect(&limits, false)?;
        Ok(())
    }
}

/// The store of the cache: `$XDG_CACHE_HOME/bough/boots`.
pub fn store() -> Option<Store> {
    Some(Store::at(&cache_dir()?.join("boots")))
}
