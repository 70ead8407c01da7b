//! `vmm snap ls`: the snapshots as a tree, each below the one that it rests on.

use std::fmt::Write;

use clap::Args;
use serde::Serialize;
use snapshot_fmt::digest::Digest;

use super::super::ls::age;
use super::super::{CliError, print, print_json};
use super::failed;
use crate::sandbox::record::now;
use crate::sizes::bytes;
use crate::store::remove::size_of;
use crate::store::{Entry, Store, short};

/// List the snapshots, each below the one that it rests on
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print ids only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
}

/// What there is to say about a snapshot.
#[derive(Debug, Clone, Serialize)]
struct Listed {
    id: Digest,
    name: Option<String>,
    /// The snapshot that it rests on.
    parent: Option<Digest>,
    /// Seconds since 1970.
    created: Option<u64>,
    /// Bytes of its own files.
    bytes: Option<u64>,
    /// Why it cannot be read.
    error: Option<String>,
}

impl Listed {
    fn new(entry: Entry) -> Self {
        let (manifest, error) = match &entry.snapshot {
            Ok(snapshot) => (Some(snapshot.manifest()), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Self {
            id: entry.id,
            name: manifest.and_then(|manifest| manifest.name.clone()),
            parent: manifest.and_then(|manifest| manifest.parent),
            created: manifest.map(|manifest| manifest.created),
            bytes: manifest.map(size_of),
            error,
        }
    }
}

/// Carries out `vmm snap ls`.
pub fn ls(store: &Store, args: &LsArgs) -> Result<u8, CliError> {
    let all: Vec<_> = store
        .all()
        .map_err(failed)?
        .into_iter()
        .map(Listed::new)
        .collect();
    if args.quiet {
        let ids: String = all
            .iter()
            .map(|listed| format!("{}\n", listed.id))
            .collect();
        return print(ids.as_bytes());
    }
    if args.json {
        return print_json(&all);
    }
    print(tree(&all, now()).as_bytes())
}

/// One line each, as of `now`.
fn tree(all: &[Listed], now: u64) -> String {
    let mut text = format!("{:12}  {:>7}  {:>8}  SNAPSHOT\n", "ID", "SIZE", "AGE");
    let known = |id: Option<Digest>| all.iter().any(|listed| Some(listed.id) == id);
    // What is to be written, the next last: with what stands before it, and before what is below it.
    let mut open: Vec<(&Listed, String, String)> = all
        .iter()
        .filter(|listed| !known(listed.parent))
        .map(|listed| (listed, String::new(), String::new()))
        .collect();
    open.reverse();
    while let Some((listed, before, below)) = open.pop() {
        let size = listed.bytes.map_or("-".to_owned(), bytes);
        let age = listed
            .created
            .map_or("-".to_owned(), |created| age(now.saturating_sub(created)));
        let name = listed.name.as_deref().unwrap_or("-");
        // A string takes all that is written to it.
        let _ = write!(
            text,
            "{}  {size:>7}  {age:>8}  {before}{name}",
            short(&listed.id)
        );
        let _ = match (&listed.error, &listed.parent) {
            (Some(error), _) => writeln!(text, " ({error})"),
            (None, Some(parent)) if before.is_empty() => {
                writeln!(text, " (rests on {}, which is missing)", short(parent))
            }
            _ => writeln!(text),
        };
        let children = all
            .iter()
            .filter(|child| child.parent == Some(listed.id))
            .rev();
        for (index, child) in children.enumerate() {
            let (branch, more) = if index == 0 {
                ("└─ ", "   ")
            } else {
                ("├─ ", "│  ")
            };
            open.push((child, format!("{below}{branch}"), format!("{below}{more}")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_stand_below_their_parents() {
        let id = |number| Digest([number; 32]);
        let listed = |number, name: Option<&str>, parent: Option<u8>| Listed {
            id: id(number),
            name: name.map(str::to_owned),
            parent: parent.map(id),
            created: Some(1000),
            bytes: Some(u64::from(number) << 20),
            error: None,
        };
        let mut all = vec![
            listed(1, Some("base"), None),
            listed(2, Some("first"), Some(1)),
            listed(3, None, Some(2)),
            listed(4, Some("second"), Some(1)),
            listed(5, Some("orphan"), Some(9)),
        ];
        all[4].bytes = None;
        let expected = "\
ID               SIZE       AGE  SNAPSHOT
010101010101     1.0M      60 s  base
020202020202     2.0M      60 s  ├─ first
030303030303     3.0M      60 s  │  └─ -
040404040404     4.0M      60 s  └─ second
050505050505        -      60 s  orphan (rests on 090909090909, which is missing)
";
        assert_eq!(tree(&all, 1060), expected);
    }
}
