//! `state.bin`: the state of a VM's parts, as JSON behind a header.
//!
//! JSON says what each value is, so a field can be added with a default for the files that lack it. A field that the reader does not know is an
//! error, wherever it stands: an older monitor must not drop a newer one's state in silence.
//!
//! The header's number is the length of the JSON in bytes; the body's digest is that of the JSON.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::digest::Digest;
use crate::error::{FormatError, WriteError};
use crate::file::NamedFile;
use crate::header::{HEADER_LEN, Header, Kind};

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
    if len > STATE_MAX {
        return Err(WriteError::OverLimit {
            file: path.to_owned(),
            what: "the state in bytes",
            value: len,
            limit: STATE_MAX,
        });
    }
    let header = Header {
        kind: Kind::State,
        numbers: [len, 0, 0, 0, 0, 0],
        body: Digest::of(&json),
    };
    let write = |bytes: &[u8], offset| {
        file.write_all_at(bytes, offset)
            .map_err(|source| WriteError::Io {
                file: path.to_owned(),
                offset,
                source,
            })
    };
    write(&json, HEADER_LEN as u64)?;
    // Last: without it, it is no state file.
    write(&header.encode(), 0)?;
    Ok(Written {
        bytes: HEADER_LEN as u64 + len,
        digest: header.digest(),
    })
}

/// Reads a state, and the digest of its file.
pub fn read<T: DeserializeOwned>(file: File, path: &Path) -> Result<(T, Digest), FormatError> {
    let file = NamedFile::new(file, path, Kind::State.name())?;
    let (json, digest) = read_json(&file)?;
    Ok((parse(&file, &json, HEADER_LEN as u64)?, digest))
}

/// Checks a state file without knowing what states there are.
pub fn verify(file: File, path: &Path) -> Result<Digest, FormatError> {
    let file = NamedFile::new(file, path, Kind::State.name())?;
    Ok(read_json(&file)?.1)
}

fn read_json(file: &NamedFile) -> Result<(Vec<u8>, Digest), FormatError> {
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
    Ok((json, header.digest()))
}

/// JSON that begins at `start` in `file`, every field of it known.
pub(crate) fn parse<T: DeserializeOwned>(
    file: &NamedFile,
    json: &[u8],
    start: u64,
) -> Result<T, FormatError> {
    let bad = |error: serde_json::Error| {
        let offset = start + offset_of(json, error.line(), error.column());
        file.corrupt(offset, format!("the JSON is not as it must be: {error}"))
    };
    let mut unknown = None;
    let mut source = serde_json::Deserializer::from_slice(json);
    let value = serde_ignored::deserialize(&mut source, |path| {
        unknown.get_or_insert_with(|| path.to_string());
    })
    .map_err(bad)?;
    source.end().map_err(bad)?;
    match unknown {
        None => Ok(value),
        Some(field) => Err(file.corrupt(
            start,
            format!(
                "this vmm does not know the field {field}: a newer one wrote it, and can read it"
            ),
        )),
    }
}

/// Offset of a place that is given as people count: lines and columns from 1.
fn offset_of(text: &[u8], line: usize, column: usize) -> u64 {
    let before = text
        .split_inclusive(|&byte| byte == b'\n')
        .take(line.saturating_sub(1));
    (before.map(<[u8]>::len).sum::<usize>() + column.saturating_sub(1)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_from_one() {
        let text = b"{\n  12\n}";
        assert_eq!(offset_of(text, 1, 1), 0);
        assert_eq!(offset_of(text, 2, 3), 4);
        assert_eq!(offset_of(text, 0, 0), 0);
    }
}
