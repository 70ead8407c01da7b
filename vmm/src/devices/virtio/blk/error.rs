//! What can be wrong with a disk.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a file cannot be a disk.
#[derive(Debug, Error)]
pub enum BlockError {
    /// Its size cannot be found.
    #[error("cannot find the size of {path}: {source}")]
    Size {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("{path} is neither a regular file nor a block device")]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// It holds no sector.
    #[error("{path} has {len} bytes, less than one sector of 512")]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
    },
    /// It is open for reading only, and the guest is to write.
    #[error("{path} is open for reading only, but its disk is writable")]
    NotWritable {
        /// The image.
        path: PathBuf,
    },
    /// No event for its queue.
    #[error("cannot make an eventfd for the disk {path}: {source}")]
    EventFd {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no place for what the guest will write.
    #[error("cannot make a file in {dir} for what the guest writes to its disk: {source}")]
    Overlay {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The saved content is that of another disk.
    #[error(
        "the disk's layers have {blocks} pages, which is not what {sectors} sectors are: the snapshot is damaged"
    )]
    SavedBlocks {
        /// Blocks of the content.
        blocks: u64,
        /// Sectors that the disk should have.
        sectors: u64,
    },
    /// It is not the disk that was saved.
    #[error("{path} has {sectors} sectors, the saved disk {saved}")]
    SavedSize {
        /// The image.
        path: PathBuf,
        /// Its size in sectors.
        sectors: u64,
        /// The size that was saved.
        saved: u64,
    },
    /// The saved disk was writable and this one is not, or the other way round.
    #[error("the disk {path} is {}, the saved one was not", if *read_only { "read-only" } else { "writable" })]
    SavedMode {
        /// The image.
        path: PathBuf,
        /// Whether the disk is read-only now.
        read_only: bool,
    },
}
