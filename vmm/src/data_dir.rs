//! Where Bough keeps what lasts: kernel, image, snapshots.

use std::path::PathBuf;

/// `$XDG_DATA_HOME/bough`, by default `~/.local/share/bough`; `None` where neither it nor `HOME` is set.
pub fn data_dir() -> Option<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let base = var("XDG_DATA_HOME").or_else(|| Some(var("HOME")?.join(".local/share")))?;
    Some(base.join("bough"))
}
