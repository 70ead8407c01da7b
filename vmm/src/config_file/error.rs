//! What can be wrong with a file: one line that names the file, the place in it, and what to do.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::SIZE_MAX;

/// Why a file does not describe a VM.
#[derive(Debug, Error)]
pub enum ConfigFileError {
    /// The system does not let it be read.
    #[error(
        "cannot read the configuration {path}: {source}; give --config a file that you may read"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a pipe or the like.
    #[error("the configuration {path} is no regular file: give --config a TOML or JSON file")]
    NotAFile {
        /// What is there.
        path: PathBuf,
    },
    /// Nobody writes that much by hand.
    #[error(
        "the configuration {path} has more than {SIZE_MAX} bytes: give --config a TOML or JSON file"
    )]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Neither TOML nor JSON.
    #[error("{path}:{line}:{column}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value that its key cannot have.
    #[error("{path}:{line}: {key}: {message}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key, with those it lies in: `drives[1].path`.
        key: String,
        /// What was found and what is expected.
        message: String,
    },
    /// A key that nothing knows.
    #[error("{path}:{line}: unknown key {key}: {}", remedy(.nearest.as_deref(), .known))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key, with those it lies in.
        key: String,
        /// The known key that is most like it, if one is.
        nearest: Option<String>,
        /// All that are known in that place.
        known: Vec<String>,
    },
}

fn remedy(nearest: Option<&str>, known: &[String]) -> String {
    match nearest {
        Some(nearest) => format!("did you mean {nearest}?"),
        None => format!("known here are {}", known.join(", ")),
    }
}

impl ConfigFileError {
    /// Byte `offset` of `bytes` is no UTF-8.
    pub(super) fn not_text(path: &Path, bytes: &[u8], offset: usize) -> Self {
        let valid = bytes.get(..offset).unwrap_or_default();
        let (line, column) = position(&String::from_utf8_lossy(valid), offset);
        Self::Syntax {
            path: path.to_owned(),
            line,
            column,
            message: "this is not UTF-8 text".to_owned(),
        }
    }

    /// What is written is not TOML.
    pub(super) fn toml_syntax(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        let offset = error.span().map_or(0, |span| span.start);
        let (line, column) = position(text, offset);
        Self::Syntax {
            path: path.to_owned(),
            line,
            column,
            message: one_line(error.message()),
        }
    }

    /// It is TOML, but does not describe a VM.
    pub(super) fn toml_value(
        path: &Path,
        text: &str,
        error: &serde_path_to_error::Error<toml::de::Error>,
    ) -> Self {
        let offset = error.inner().span().map_or(0, |span| span.start);
        let (line, _) = position(text, offset);
        Self::value(path, line, error.path(), error.inner().message())
    }

    /// What is written is not JSON, or does not describe a VM.
    pub(super) fn json(path: &Path, error: &serde_path_to_error::Error<serde_json::Error>) -> Self {
        let inner = error.inner();
        if inner.is_data() {
            Self::value(path, inner.line(), error.path(), &json_message(inner))
        } else {
            Self::json_syntax(path, inner)
        }
    }

    /// What is written is not JSON.
    pub(super) fn json_syntax(path: &Path, error: &serde_json::Error) -> Self {
        Self::Syntax {
            path: path.to_owned(),
            line: error.line(),
            column: error.column().max(1),
            message: json_message(error),
        }
    }

    fn value(path: &Path, line: usize, key: &serde_path_to_error::Path, message: &str) -> Self {
        let (path, key, message) = (
            path.to_owned(),
            one_line(&key.to_string()),
            one_line(message),
        );
        if let Some((unknown, known)) = unknown_field(&message) {
            let nearest = nearest(unknown, &known);
            return Self::UnknownKey {
                path,
                line,
                key: with_last(&key, unknown),
                nearest,
                known,
            };
        }
        // The whole file is the place: there is no key to name.
        let key = if key == "." {
            "the file".to_owned()
        } else {
            key
        };
        Self::Value {
            path,
            line,
            key,
            message,
        }
    }
}

/// Takes serde's message on an unknown field apart: the field, and those that are known.
fn unknown_field(message: &str) -> Option<(&str, Vec<String>)> {
    let (field, expected) = message
        .strip_prefix("unknown field `")?
        .split_once("`, expected ")?;
    let known = expected.split('`').skip(1).step_by(2).map(str::to_owned);
    Some((field, known.collect()))
}

/// `key`, made to end with `last`.
fn with_last(key: &str, last: &str) -> String {
    if key == "." || key == last {
        last.to_owned()
    } else if key.ends_with(&format!(".{last}")) {
        key.to_owned()
    } else {
        format!("{key}.{last}")
    }
}

/// The known key that `key` was most likely meant to be.
fn nearest(key: &str, known: &[String]) -> Option<String> {
    let key = key.to_lowercase().replace('-', "_");
    let likeness = |known: &String| {
        // Who writes `mem` or `drive` means what begins so.
        let short = known.starts_with(&key) && key.len() >= 3;
        strsim::jaro_winkler(&key, known) + f64::from(u8::from(short))
    };
    known
        .iter()
        .map(|known| (likeness(known), known))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, known)| known.clone())
}

/// The message without the place, which is said apart.
fn json_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    one_line(text.strip_suffix(&place).unwrap_or(&text))
}

fn one_line(message: &str) -> String {
    let lines = message
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join(", ");
    // The file's own text is quoted in there: no control character of it reaches a terminal.
    line.replace(char::is_control, "\u{fffd}")
}

/// Line and column of the byte at `offset`, both from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = before.matches('\n').count() + 1;
    (line, before[start..].chars().count() + 1)
}
