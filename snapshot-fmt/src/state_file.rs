//! `state.bin`: the state of a VM's parts, as JSON behind a header.
//!
//! JSON says what each value is, so a field can be added with a default for the files that lack it. A field that the reader does not know is an
//! error, wherever it stands: an older monitor must not drop a newer one's state in silence.
//!
//! The header's number is the length of the JSON in bytes; the body's digest is that of the JSON.

use std::fs::File;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::digest::Digest;
use crate::error::{FormatError, WriteError};
use crate::file::{NamedFile, within, write_at};
use crate::header::{HEADER_LEN, Header, Kind};
use crate::json;

/// Most bytes of JSON.
pub const STATE_MAX: u64 = 64 << 20;

/// What a manifest says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Length in bytes.
    pub bytes: u64,
    /// Its digest.
    pub digest: Digest,
}

/// Writes `state` to the empty file `file`, which `path` names in messages. The caller syncs it.
pub fn write<T: Serialize>(file: &File, path: &Path, state: &T) -> Result<Written, WriteError> {
    let json = serde_json::to_vec(state).map_err(|source| WriteError::Json {
        file: path.to_owned(),
        source,
    })?;
    let len = json.len() as u64;
    within(path, "the state in bytes", len, STATE_MAX)?;
    let header = Header {
        kind: Kind::State,
        numbers: [len, 0, 0, 0, 0, 0],
        body: Digest::of(&json),
    };
    write_at(file, path, &json, HEADER_LEN as u64)?;
    // Last: without it, it is no state file.
    write_at(file, path, &header.encode(), 0)?;
    Ok(Written {
        bytes: HEADER_LEN as u64 + len,
        digest: header.digest(),
    })
}

/// Reads a state, and what a manifest says of its file.
pub fn read<T: DeserializeOwned>(file: File, path: &Path) -> Result<(T, Written), FormatError> {
    let file = NamedFile::new(file, path, Kind::State.name())?;
    let (json, written) = read_json(&file)?;
    Ok((json::parse(path, &json, HEADER_LEN as u64)?, written))
}

/// Checks a state file without knowing what states there are.
pub fn verify(file: File, path: &Path) -> Result<Written, FormatError> {
    let file = NamedFile::new(file, path, Kind::State.name())?;
    Ok(read_json(&file)?.1)
}

fn read_json(file: &NamedFile) -> Result<(Vec<u8>, Written), FormatError> {
    let header = Header::read(file, Kind::State)?;
    let len = file.within(
        header.numbers[0],
        STATE_MAX,
        Header::number_at(0),
        "the state's length",
    )?;
    let start = HEADER_LEN as u64;
    let json = file.read_vec(start, len, "the state")?;
    file.ends_at(start + len)?;
    if Digest::of(&json) != header.body {
        return Err(file.corrupt(
            start,
            "the state does not have the digest that the header gives",
        ));
    }
    let written = Written {
        bytes: start + len,
        digest: header.digest(),
    };
    Ok((json, written))
}
