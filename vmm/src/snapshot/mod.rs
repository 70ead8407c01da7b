//! Snapshots: a running machine written to a directory while it runs on, and brought back in another process.
//!
//! What is on the disk is `snapshot-fmt`'s; where, is the store's. Nothing of the running machine changes by being saved, and a
//! snapshot that fails leaves nothing behind.

pub mod branch;
pub mod chains;
pub mod description;
pub mod disk_layer;
pub mod memory;
pub mod memory_layer;
pub mod restore;
pub mod save;
pub mod shared_disk;

use std::io;
use std::path::PathBuf;

use snapshot_fmt::error::{FormatError, WriteError};
use thiserror::Error;

use crate::machine::SaveError;
use crate::store::StoreError;

/// Why a snapshot could not be taken, or not be used.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The machine would not stand still.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A file of it cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file of it cannot be made or kept.
    #[error("{path}: {source}; is there room on the disk?")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Memory cannot be written.
    #[error("cannot write the guest's memory: {0}; the sandbox runs on, and nothing was kept")]
    Memory(#[source] io::Error),
    /// A disk that the guest may write to cannot be read, or what it was cannot be kept while the guest writes.
    #[error("cannot save drive {drive}: {source}; the sandbox runs on, and nothing was kept")]
    Disk {
        /// Its number.
        drive: usize,
        /// What the system said.
        source: io::Error,
    },
    /// A disk cannot go to another process, or has not come from one as it was.
    #[error("cannot hand over drive {drive}: {source}")]
    SharedDisk {
        /// Its number.
        drive: usize,
        /// What was wrong.
        source: io::Error,
    },
    /// A file of it cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The store of snapshots refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It was taken on another kind of processor.
    #[error(
        "the snapshot was taken on another processor: {what}; restore it on a host like the one it was made on"
    )]
    OtherCpu {
        /// What differs.
        what: String,
    },
    /// A disk is not what it was.
    #[error(
        "{path}: the guest's disk {what} since the snapshot was taken; put the old file back, or take the snapshot anew"
    )]
    OtherDrive {
        /// The disk's file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// The manifest describes no machine of this monitor.
    #[error("the snapshot's description is none of a machine: {what}")]
    Description {
        /// What is wrong.
        what: String,
    },
}
