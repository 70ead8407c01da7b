//! A file under its name, read at offsets: every failure says which file and where.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{FormatError, WriteError};

/// A file that is open for reading.
#[derive(Debug)]
pub(crate) struct NamedFile {
    file: File,
    path: PathBuf,
    len: u64,
}

/// Opens a file to read `what`.
pub(crate) fn open(path: &Path, what: &'static str) -> Result<File, FormatError> {
    File::open(path).map_err(|source| FormatError::Io {
        file: path.to_owned(),
        offset: 0,
        what,
        source,
    })
}

/// Writes `bytes` to `file`, which `path` names in messages.
pub(crate) fn write_at(
    file: &File,
    path: &Path,
    bytes: &[u8],
    offset: u64,
) -> Result<(), WriteError> {
    file.write_all_at(bytes, offset)
        .map_err(|source| WriteError::Io {
            file: path.to_owned(),
            offset,
            source,
        })
}

/// `value` of `what`, which would be written to `path`, if it is at most `limit`.
pub(crate) fn within(
    path: &Path,
    what: &'static str,
    value: u64,
    limit: u64,
) -> Result<(), WriteError> {
    if value <= limit {
        return Ok(());
    }
    Err(WriteError::OverLimit {
        file: path.to_owned(),
        what,
        value,
        limit,
    })
}

impl NamedFile {
    /// Takes `file`, which `path` names in messages. `expected` is what it should be.
    pub(crate) fn new(
        file: File,
        path: &Path,
        expected: &'static str,
    ) -> Result<Self, FormatError> {
        let metadata = file.metadata().map_err(|source| FormatError::Io {
            file: path.to_owned(),
            offset: 0,
            what: "its length",
            source,
        })?;
        if !metadata.is_file() {
            return Err(FormatError::NotOurs {
                file: path.to_owned(),
                offset: 0,
                expected,
            });
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            len: metadata.len(),
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when it was opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Checks that `what` is there: `needed` bytes from `offset`.
    pub(crate) fn holds(
        &self,
        offset: u64,
        needed: u64,
        what: &'static str,
    ) -> Result<(), FormatError> {
        match offset.checked_add(needed) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(self.truncated(offset, needed, what)),
        }
    }

    /// Reads `what` at `offset`, whole.
    pub(crate) fn read(
        &self,
        bytes: &mut [u8],
        offset: u64,
        what: &'static str,
    ) -> Result<(), FormatError> {
        self.file.read_exact_at(bytes, offset).map_err(|source| {
            if source.kind() == io::ErrorKind::UnexpectedEof {
                return self.truncated(offset, bytes.len() as u64, what);
            }
            FormatError::Io {
                file: self.path.clone(),
                offset,
                what,
                source,
            }
        })
    }

    /// Reads `what`, `len` bytes at `offset`. The caller has bounded `len`.
    pub(crate) fn read_vec(
        &self,
        offset: u64,
        len: u64,
        what: &'static str,
    ) -> Result<Vec<u8>, FormatError> {
        self.holds(offset, len, what)?;
        let len_here = usize::try_from(len).map_err(|_| self.truncated(offset, len, what))?;
        let mut bytes = vec![0; len_here];
        self.read(&mut bytes, offset, what)?;
        Ok(bytes)
    }

    pub(crate) fn corrupt(&self, offset: u64, what: impl Into<String>) -> FormatError {
        FormatError::Corrupt {
            file: self.path.clone(),
            offset,
            what: what.into(),
        }
    }

    /// `value` of `what`, which stands at `offset`, if it is at most `limit`.
    pub(crate) fn within(
        &self,
        value: u64,
        limit: u64,
        offset: u64,
        what: &'static str,
    ) -> Result<u64, FormatError> {
        if value <= limit {
            return Ok(value);
        }
        Err(FormatError::OverLimit {
            file: self.path.clone(),
            offset,
            what,
            value,
            limit,
        })
    }

    /// Checks that the file ends at `end`.
    pub(crate) fn ends_at(&self, end: u64) -> Result<(), FormatError> {
        if self.len == end {
            return Ok(());
        }
        Err(self.corrupt(end, format!("the file goes on to {} bytes", self.len)))
    }

    fn truncated(&self, offset: u64, needed: u64, what: &'static str) -> FormatError {
        FormatError::Truncated {
            file: self.path.clone(),
            offset,
            what,
            needed,
            // It may have been longer when it was opened.
            len: self.file.metadata().map_or(self.len, |now| now.len()),
        }
    }
}
