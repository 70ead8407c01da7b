//! What can be wrong with a file that is read, and what can keep one from being written.
//!
//! Every message names the file; where a place in it is at fault, its offset in bytes; and what to do.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::chain::ChainError;

/// A file cannot be read, or not be believed.
#[derive(Debug, Error)]
pub enum FormatError {
    /// It is a file of another kind, or of another program.
    #[error("{}: this is not {expected} of Bough (offset {offset}); name the file or directory that vmm wrote", file.display())]
    NotOurs {
        /// The file.
        file: PathBuf,
        /// Where that shows, in bytes.
        offset: u64,
        /// What it should be, with its article.
        expected: &'static str,
    },
    /// A newer version of the program wrote it.
    #[error("{}: {what} of format version {found} (offset {offset}); this vmm reads versions up to {supported}: use the vmm that wrote it or a newer one", file.display())]
    TooNew {
        /// The file.
        file: PathBuf,
        /// Where the version stands, in bytes.
        offset: u64,
        /// What it is, with its article.
        what: &'static str,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// It ends too early.
    #[error("{}: cut short: {what} at offset {offset} takes {needed} bytes, but the file has {len}; take it from a copy, or remove this snapshot", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Where what is missing begins, in bytes.
        offset: u64,
        /// What is missing or incomplete.
        what: &'static str,
        /// Its length in bytes.
        needed: u64,
        /// The file's length in bytes.
        len: u64,
    },
    /// Its content contradicts itself or its digest.
    #[error("{}: corrupt at offset {offset}: {what}; take it from a copy, or remove this snapshot", file.display())]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A stored page is not what its hash says.
    #[error("{}: page {page} is corrupt (offset {offset}): it does not have the hash that the index gives; take the layer from a copy, or remove this snapshot", file.display())]
    Page {
        /// The layer.
        file: PathBuf,
        /// The page's number in the space that the layer spans.
        page: u64,
        /// Where it is stored, in bytes.
        offset: u64,
    },
    /// It asks for more than any file of ours needs.
    #[error("{}: {what} at offset {offset} is {value}, more than the {limit} allowed; vmm does not write such a file", file.display())]
    OverLimit {
        /// The file.
        file: PathBuf,
        /// Where it says so, in bytes.
        offset: u64,
        /// What is too large.
        what: &'static str,
        /// How large.
        value: u64,
        /// How large it may be.
        limit: u64,
    },
    /// The system refused.
    #[error("{}: cannot read {what} at offset {offset}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What was wanted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A file cannot be written. What there is of it has no header yet and cannot be opened.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The system refused.
    #[error("{}: cannot write at offset {offset}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// More than a reader would take.
    #[error("{}: {what} would be {value}, more than the {limit} allowed", file.display())]
    OverLimit {
        /// The file.
        file: PathBuf,
        /// What is too large.
        what: &'static str,
        /// How large.
        value: u64,
        /// How large it may be.
        limit: u64,
    },
    /// A value has no JSON text.
    #[error("{}: the state cannot be written as JSON: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A manifest would say what no reader takes.
    #[error("{}: {what}", file.display())]
    Manifest {
        /// The file.
        file: PathBuf,
        /// What.
        what: String,
    },
    /// Pages came out of order, beyond the end, or in parts: the caller's mistake.
    #[error("{}: pages {first_page} to {end} do not follow page {next} within {total_pages} pages of 4096 bytes", file.display())]
    Pages {
        /// The file.
        file: PathBuf,
        /// The first page.
        first_page: u64,
        /// The page behind the last.
        end: u64,
        /// The lowest page that may come.
        next: u64,
        /// Pages of the layer's space.
        total_pages: u64,
    },
    /// What is written rests on a file that cannot be read.
    #[error(transparent)]
    Source(#[from] FormatError),
    /// The two chains of an operation are of different machines.
    #[error(transparent)]
    Chain(#[from] ChainError),
}
