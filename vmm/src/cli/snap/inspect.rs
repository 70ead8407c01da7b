//! `vmm snap inspect`, `verify` and `diff`: what snapshots are, whether they are whole, and how they differ.

use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use clap::Args;
use serde::Serialize;
use snapshot_fmt::PAGE_BYTES;
use snapshot_fmt::digest::Digest;
use snapshot_fmt::manifest::{MEMORY, Machine, Manifest};
use snapshot_fmt::ops;
use snapshot_fmt::pack::Pack;
use snapshot_fmt::snapshot::Snapshot;

use super::super::{CliError, print, print_json};
use super::failed;
use crate::logger::complain;
use crate::sizes::bytes;
use crate::store::remove::size_of;
use crate::store::{Store, StoreError, short};

/// Print what is known about a snapshot, as JSON
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A name, the beginning of an id, or a packed snapshot's file (*.bough)
    #[arg(value_name = "REF")]
    snapshot: String,
}

/// Read snapshots whole, with those that they rest on, and check every page
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Names, or beginnings of ids
    #[arg(required_unless_present = "all", value_name = "REF")]
    snapshots: Vec<String>,
    /// All there are
    #[arg(long, conflicts_with = "snapshots")]
    all: bool,
}

/// Count the pages that differ between two snapshots, by region
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A name, or the beginning of an id
    #[arg(value_name = "A")]
    a: String,
    /// Another
    #[arg(value_name = "B")]
    b: String,
    /// Print JSON, which names the pages too
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Inspected<'a> {
    #[serde(flatten)]
    manifest: &'a Manifest,
    #[serde(skip_serializing_if = "Option::is_none")]
    stored: Option<Stored>,
}

/// What only the store knows.
#[derive(Serialize)]
struct Stored {
    dir: String,
    /// Bytes of its own files.
    bytes: u64,
    /// Ids of the snapshots that it rests on, the root first.
    lineage: Vec<Digest>,
    /// Ids of the snapshots that rest on it.
    children: Vec<Digest>,
    layers: Vec<LayerView>,
}

#[derive(Serialize)]
struct LayerView {
    name: String,
    total_pages: u64,
    data_pages: u64,
    zero_pages: u64,
    extents: usize,
}

/// Carries out `vmm snap inspect`.
pub fn inspect(store: &Store, args: &InspectArgs) -> Result<u8, CliError> {
    let path = Path::new(&args.snapshot);
    if path
        .extension()
        .is_some_and(|extension| extension == "bough")
    {
        let file = File::open(path);
        let file = file.map_err(|error| {
            CliError::BadInput(format!("cannot open {}: {error}", args.snapshot))
        })?;
        let pack = Pack::open(file, path).map_err(failed)?;
        return print_json(&Inspected {
            manifest: pack.manifest(),
            stored: None,
        });
    }
    let held = store.hold(&args.snapshot).map_err(failed)?;
    let snapshot = held.snapshot();
    let stored = stored(store, snapshot).map_err(failed)?;
    print_json(&Inspected {
        manifest: snapshot.manifest(),
        stored: Some(stored),
    })
}

fn stored(store: &Store, snapshot: &Snapshot) -> Result<Stored, StoreError> {
    let mut layers = Vec::new();
    for name in snapshot.layer_names() {
        let layer = snapshot.layer(name)?;
        layers.push(LayerView {
            name: name.to_owned(),
            total_pages: layer.total_pages(),
            data_pages: layer.data_pages(),
            zero_pages: layer.zero_pages(),
            extents: layer.extents().len(),
        });
    }
    let mut lineage: Vec<_> = store.lineage(snapshot)?.iter().map(Snapshot::id).collect();
    lineage.pop();
    let mut children = store.all()?;
    children.retain(|entry| {
        let child = entry.snapshot.as_ref().ok();
        child.is_some_and(|child| child.manifest().parent == Some(snapshot.id()))
    });
    Ok(Stored {
        dir: snapshot.dir().to_string_lossy().into_owned(),
        bytes: size_of(snapshot.manifest()),
        lineage,
        children: children.iter().map(|entry| entry.id).collect(),
        layers,
    })
}

/// Carries out `vmm snap verify`: a line for each that is whole, and one for each that is not; the last failure is the command's.
pub fn verify(store: &Store, args: &VerifyArgs) -> Result<u8, CliError> {
    let references = if args.all {
        let all = store.all().map_err(failed)?;
        all.iter().map(|entry| entry.id.to_string()).collect()
    } else {
        args.snapshots.clone()
    };
    let (mut seen, mut failure, mut text) = (HashSet::new(), None, String::new());
    for reference in &references {
        match verify_one(store, reference, &mut seen) {
            Ok(line) => text += &line,
            Err(error) => {
                if let Some(earlier) = failure.replace(failed(error)) {
                    complain(&earlier);
                }
            }
        }
    }
    let status = print(text.as_bytes())?;
    failure.map_or(Ok(status), Err)
}

/// Verifies a snapshot and what it rests on, but for what has been `seen`.
fn verify_one(
    store: &Store,
    reference: &str,
    seen: &mut HashSet<Digest>,
) -> Result<String, StoreError> {
    let held = store.hold(reference)?;
    let snapshot = held.snapshot();
    let lineage = store.lineage(snapshot)?;
    for snapshot in &lineage {
        if !seen.contains(&snapshot.id()) {
            snapshot.verify()?;
            seen.insert(snapshot.id());
        }
    }
    for layer in snapshot.layer_names() {
        store.chain(snapshot, layer)?;
    }
    let name = snapshot.manifest().name.as_deref().unwrap_or("-");
    let sizes = lineage.iter().map(|snapshot| size_of(snapshot.manifest()));
    let size = bytes(sizes.fold(0, u64::saturating_add));
    Ok(format!(
        "{}  {name}: whole, {size} in {} layers\n",
        short(&snapshot.id()),
        lineage.len()
    ))
}

/// A part of memory, or a disk.
#[derive(Debug, Serialize)]
pub struct Region {
    name: String,
    /// Its first address, or 0 for a disk.
    start: u64,
    bytes: u64,
    /// How many pages differ.
    differ: u64,
    /// Which: where each range of them starts, and its length, in bytes.
    ranges: Vec<(u64, u64)>,
}

/// Carries out `vmm snap diff`.
pub fn diff(store: &Store, args: &DiffArgs) -> Result<u8, CliError> {
    let a = store.hold(&args.a).map_err(failed)?;
    let b = store.hold(&args.b).map_err(failed)?;
    let regions = regions(store, a.snapshot(), b.snapshot()).map_err(failed)?;
    match args.json {
        true => print_json(&regions),
        false => print(table(&regions).as_bytes()),
    }
}

/// Regions for people.
pub fn table(regions: &[Region]) -> String {
    let mut text = format!(
        "{:>18}  {:>7}  {:>8}  {:>7}  REGION\n",
        "START", "SIZE", "DIFFER", ""
    );
    for region in regions {
        let Region {
            name,
            start,
            differ,
            ..
        } = region;
        let (size, different) = (bytes(region.bytes), bytes(differ * PAGE_BYTES));
        text += &format!("{start:#18x}  {size:>7}  {differ:>8}  {different:>7}  {name}\n");
    }
    text
}

/// How two snapshots differ.
pub fn regions(store: &Store, a: &Snapshot, b: &Snapshot) -> Result<Vec<Region>, StoreError> {
    let mut regions = Vec::new();
    for layer in a
        .layer_names()
        .filter(|layer| b.manifest().file(layer).is_some())
    {
        let (one, other) = (store.chain(a, layer)?, store.chain(b, layer)?);
        let differ = ops::diff(&one, &other)?;
        if layer == MEMORY {
            regions.extend(of_memory(&a.manifest().machine, &differ));
        } else {
            let whole = 0..one.total_pages();
            regions.push(region(layer.trim_end_matches(".layer"), 0, &whole, &differ));
        }
    }
    Ok(regions)
}

fn of_memory(machine: &Machine, differ: &[Range<u64>]) -> Vec<Region> {
    let mut first_page = 0;
    let ranges = machine.memory.iter().map(|range| {
        let pages = first_page..first_page + range.bytes / PAGE_BYTES;
        first_page = pages.end;
        region("memory", range.start, &pages, differ)
    });
    ranges.collect()
}

/// The region from address `start` that the pages `pages` of a layer are.
fn region(name: &str, start: u64, pages: &Range<u64>, differ: &[Range<u64>]) -> Region {
    let here = differ.iter().filter_map(|range| {
        let (first, end) = (range.start.max(pages.start), range.end.min(pages.end));
        let at = start.saturating_add(first.checked_sub(pages.start)? * PAGE_BYTES);
        (first < end).then(|| (at, (end - first) * PAGE_BYTES))
    });
    let ranges: Vec<_> = here.collect();
    Region {
        name: name.to_owned(),
        start,
        bytes: (pages.end - pages.start) * PAGE_BYTES,
        differ: ranges.iter().map(|(_, bytes)| bytes / PAGE_BYTES).sum(),
        ranges,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_over_two_regions_is_in_both() {
        let pages = [10..14, 30..31];
        let pages = &pages[..];
        let low = region("memory", 0, &(0..12), pages);
        assert_eq!(
            (low.differ, &low.ranges[..]),
            (2, &[(10 << 12, 2 << 12)][..])
        );
        let high = region("memory", 1 << 32, &(12..40), pages);
        assert_eq!(
            high.ranges,
            [(1 << 32, 2 << 12), ((1 << 32) + (18 << 12), 1 << 12)]
        );
        assert_eq!(high.differ, 3);
    }
}
