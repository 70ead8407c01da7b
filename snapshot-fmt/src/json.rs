//! JSON of which every field is known: one that is not would be lost in silence.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::FormatError;

/// JSON that begins at `start` in `file`, every field of it known.
pub(crate) fn parse<T: DeserializeOwned>(
    path: &Path,
    json: &[u8],
    start: u64,
) -> Result<T, FormatError> {
    let corrupt = |offset, what| FormatError::Corrupt {
        file: path.to_owned(),
        offset,
        what,
    };
    let bad = |error: serde_json::Error| {
        let offset = start + offset_of(json, error.line(), error.column());
        corrupt(offset, format!("the JSON is not as it must be: {error}"))
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
        Some(field) => Err(corrupt(
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
