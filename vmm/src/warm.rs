//! An interpreter that is to stand ready in a guest, as users write it: `python`, or `python:json,re`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use snapshot_fmt::manifest::Warm;

use crate::agent::Language;

/// An interpreter, and the modules that it imports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WarmRuntime {
    /// The interpreter's language.
    pub language: Language,
    /// The names of modules.
    pub modules: Vec<String>,
}

/// A text that names no such interpreter. Its words complete "... will not do:".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("give python, or python:MODULE,MODULE")]
pub struct NotARuntime;

impl FromStr for WarmRuntime {
    type Err = NotARuntime;

    fn from_str(text: &str) -> Result<Self, NotARuntime> {
        let modules: Vec<String> = match text.split_once(':') {
            Some(("python", modules)) => modules.split(',').map(str::to_owned).collect(),
            None if text == "python" => Vec::new(),
            _ => return Err(NotARuntime),
        };
        // What is a name is Python's to say; whatever has these is none.
        let is_name = |name: &String| {
            !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c.is_control())
        };
        if !modules.iter().all(is_name) {
            return Err(NotARuntime);
        }
        Ok(Self {
            language: Language::Python,
            modules,
        })
    }
}

impl fmt::Display for WarmRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("python")?;
        if self.modules.is_empty() {
            return Ok(());
        }
        write!(f, ":{}", self.modules.join(","))
    }
}

impl TryFrom<String> for WarmRuntime {
    type Error = NotARuntime;

    fn try_from(text: String) -> Result<Self, NotARuntime> {
        text.parse()
    }
}

impl From<WarmRuntime> for String {
    fn from(runtime: WarmRuntime) -> Self {
        runtime.to_string()
    }
}

/// As a snapshot's manifest has it.
impl From<&WarmRuntime> for Warm {
    fn from(runtime: &WarmRuntime) -> Self {
        Self {
            language: "python".to_owned(),
            modules: runtime.modules.clone(),
        }
    }
}

impl TryFrom<&Warm> for WarmRuntime {
    type Error = NotARuntime;

    fn try_from(warm: &Warm) -> Result<Self, NotARuntime> {
        if warm.language != "python" {
            return Err(NotARuntime);
        }
        Ok(Self {
            language: Language::Python,
            modules: warm.modules.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_is_read_and_written() {
        for text in ["python", "python:json", "python:os.path,re,xml.dom"] {
            let runtime: WarmRuntime = text.parse().unwrap();
            assert_eq!(runtime.to_string(), text);
        }
        let runtime: WarmRuntime = "python:json,re".parse().unwrap();
        assert_eq!(runtime.modules, ["json", "re"]);
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "",
            "ruby",
            "Python",
            "python:",
            "python:a,,b",
            "python:a, b",
            ":a",
            "python:a\n",
        ] {
            assert_eq!(text.parse::<WarmRuntime>(), Err(NotARuntime), "{text:?}");
        }
    }
}
