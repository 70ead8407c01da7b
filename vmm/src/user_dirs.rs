//! Where this user's files of ours are (XDG Base Directory Specification).

use std::path::PathBuf;

/// `$XDG_DATA_HOME/bough`, by default `~/.local/share/bough`; `None` where neither it nor `HOME` is set.
pub fn data_dir() -> Option<PathBuf> {
    dir("XDG_DATA_HOME", ".local/share")
}

/// `$XDG_CACHE_HOME/bough`, by default `~/.cache/bough`; `None` where neither it nor `HOME` is set.
pub fn cache_dir() -> Option<PathBuf> {
    dir("XDG_CACHE_HOME", ".cache")
}

fn dir(variable: &str, in_home: &str) -> Option<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let base = var(variable).or_else(|| Some(var("HOME")?.join(in_home)))?;
    Some(base.join("bough"))
}
