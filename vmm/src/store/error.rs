//! What can keep a snapshot from being found, used, made or removed.

use std::io;
use std::path::{Path, PathBuf};

use snapshot_fmt::chain::ChainError;
use snapshot_fmt::digest::Digest;
use snapshot_fmt::error::{FormatError, WriteError};
use snapshot_fmt::ops::DiffError;
use thiserror::Error;

use super::short;

/// A failure of the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is nowhere to keep snapshots.
    #[error(
        "neither XDG_DATA_HOME nor HOME is set: one of them must name the directory for snapshots"
    )]
    NoPlace,
    /// Something in the file system refused.
    #[error("cannot {action} {path}: {source}; XDG_DATA_HOME can name another place")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No snapshot is called so.
    #[error("no snapshot is called {reference:?}{}; `vmm snap ls` lists them", nearest(.known))]
    Unknown {
        /// What was asked for.
        reference: String,
        /// A name that is much like it.
        known: Option<String>,
    },
    /// Several ids start so.
    #[error("{reference:?} is the beginning of {}; give more of it, or a name", candidates.join(" and "))]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// What it can be.
        candidates: Vec<String>,
    },
    /// A name has characters that it may not have.
    #[error(
        "{name:?} cannot name a snapshot: letters, digits, '.', '_' and '-', 63 at most, the first a letter or digit"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// The snapshot that another rests on is not there.
    #[error("snapshot {} rests on {}, which is not in the store: unpack that one first, or remove what rests on it", short(.child), short(.parent))]
    NoParent {
        /// The snapshot.
        child: Digest,
        /// What it rests on.
        parent: Digest,
    },
    /// Others rest on it.
    #[error("snapshot {} has others that rest on it ({}): remove those first, or use --recursive", short(.id), shorts(.children))]
    HasChildren {
        /// The snapshot.
        id: Digest,
        /// What rests on it.
        children: Vec<Digest>,
    },
    /// A process works with it.
    #[error("snapshot {} is in use by a running VM or command: end that first", short(.id))]
    InUse {
        /// The snapshot.
        id: Digest,
    },
    /// It was removed just now.
    #[error("snapshot {} has been removed meanwhile; `vmm snap ls` lists what there is", short(.id))]
    Gone {
        /// The snapshot.
        id: Digest,
    },
    /// A directory holds another snapshot than its name says.
    #[error("{}: holds snapshot {}: rename it so, or remove it", path.display(), .id)]
    WrongDirectory {
        /// The directory.
        path: PathBuf,
        /// What it holds.
        id: Digest,
    },
    /// A draft lacks a file, or has another.
    #[error("{}: has {found} bytes, but {listed} were written: something else changed it; take the snapshot again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// What it should be.
        listed: u64,
    },
    /// A file cannot be believed.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Layers do not make a chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl From<DiffError> for StoreError {
    fn from(error: DiffError) -> Self {
        match error {
            DiffError::Format(error) => error.into(),
            DiffError::Chain(error) => error.into(),
        }
    }
}

impl StoreError {
    /// The system, not the input, is at fault.
    pub fn is_system(&self) -> bool {
        matches!(
            self,
            Self::Io { .. } | Self::Changed { .. } | Self::Write(WriteError::Io { .. })
        )
    }
}

fn nearest(known: &Option<String>) -> String {
    known
        .as_ref()
        .map_or(String::new(), |name| format!(" (did you mean {name:?}?)"))
}

fn shorts(ids: &[Digest]) -> String {
    ids.iter().map(short).collect::<Vec<_>>().join(", ")
}

/// Says what was tried on what.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path: path.clone(),
        source,
    }
}
