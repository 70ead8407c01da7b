//! The store, with snapshots of a small memory.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::sync::atomic::Ordering::Relaxed;

use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::delta::DeltaWriter;
use snapshot_fmt::manifest::{
    CpuFingerprint, Drive, FileEntry, KernelFile, MEMORY, Machine, Manifest, MemoryRange, STATE,
};
use snapshot_fmt::state_file;
use tempfile::TempDir;

use super::remove::{GcLimits, Removed};
use super::*;

const PAGES: u64 = 64;
/// The layer of a disk that is what memory is.
const DISK: &str = "disk-0.layer";

/// A store in a directory of its own.
fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(&dir.path().join("snapshots"));
    (dir, store)
}

/// Writes a snapshot's files to a draft: `pages` are `fill`, the rest is the parent's, in memory as on the disk.
fn draft(store: &Store, parent: Option<&Snapshot>, pages: &[u64], fill: u8) -> (Draft, Manifest) {
    let draft = store.begin().unwrap();
    let path = draft.path().join(STATE);
    let state = state_file::write(&File::create(&path).unwrap(), &path, &"a state").unwrap();
    let layer = |name: &str| {
        let below = parent.map(|parent| store.chain(parent, name).unwrap());
        let path = draft.path().join(name);
        let file = File::create(&path).unwrap();
        let mut layer = DeltaWriter::new(file, &path, PAGES, below.as_ref()).unwrap();
        for &page in pages {
            layer.put(page, &[fill; PAGE_SIZE]).unwrap();
        }
        layer.finish().unwrap().0
    };
    let (memory, disk) = (layer(MEMORY), layer(DISK));
    let entry = |name: &str, bytes, digest| FileEntry {
        name: name.to_owned(),
        bytes,
        digest,
    };
    let manifest = Manifest {
        format: 1,
        id: Digest([0; 32]),
        name: None,
        created: 1000,
        software: "0".to_owned(),
        parent: parent.map(Snapshot::id),
        machine: Machine {
            cpus: 1,
            memory: vec![MemoryRange {
                start: 0,
                bytes: PAGES << 12,
            }],
            kernel: KernelFile {
                path: "vmlinux".to_owned(),
                digest: None,
            },
            cmdline: String::new(),
            drives: vec![Drive {
                path: "disk".to_owned(),
                read_only: false,
                interface: "blk".to_owned(),
                bytes: PAGES << 12,
                mtime_ns: 0,
                digest: None,
            }],
            vsock_cid: None,
            lane: false,
        },
        programs: Default::default(),
        cpu: CpuFingerprint {
            vendor: String::new(),
            model: String::new(),
            features: Vec::new(),
        },
        warm: None,
        files: vec![
            entry(STATE, state.bytes, state.digest),
            entry(MEMORY, memory.bytes, memory.digest),
            entry(DISK, disk.bytes, disk.digest),
        ],
    };
    (draft, manifest)
}

/// A snapshot of this name and time.
fn add(
    store: &Store,
    name: &str,
    created: u64,
    parent: Option<&Snapshot>,
    pages: &[u64],
    fill: u8,
) -> Held {
    let (draft, mut manifest) = draft(store, parent, pages, fill);
    manifest.name = (!name.is_empty()).then(|| name.to_owned());
    manifest.created = created;
    draft.publish(manifest).unwrap()
}

fn ids(store: &Store) -> Vec<Digest> {
    store.all().unwrap().iter().map(|entry| entry.id).collect()
}

/// First bytes of all pages, in memory as on the disk.
fn content(store: &Store, snapshot: &Snapshot) -> Vec<u8> {
    let [memory, disk] = [MEMORY, DISK].map(|layer| {
        let chain = store.chain(snapshot, layer).unwrap();
        let mut bytes = [0; PAGE_SIZE];
        let first_byte = |page| {
            chain.read_page(page, &mut bytes).unwrap();
            bytes[0]
        };
        (0..chain.total_pages()).map(first_byte).collect::<Vec<_>>()
    });
    assert_eq!(memory, disk);
    memory
}

#[test]
fn of_one_second_and_name_the_last_counts() {
    let (_dir, store) = store();
    let made: Vec<Digest> = (1..=8)
        .map(|fill| {
            let id = add(&store, "same", 1, None, &[1], fill).snapshot().id();
            // The clock of file times may be that of the kernel's ticks.
            std::thread::sleep(std::time::Duration::from_millis(10));
            id
        })
        .collect();
    assert_eq!(ids(&store), made);
    assert_eq!(store.find("same").unwrap().id(), made[7]);
}

#[test]
fn a_snapshot_is_found_by_id_prefix_and_name() {
    let (_dir, store) = store();
    assert_eq!(ids(&store), []);
    let old = add(&store, "base", 1, None, &[1], 1).snapshot().id();
    let new = add(&store, "base", 2, None, &[1], 2).snapshot().id();
    assert_eq!(ids(&store), [old, new]);
    for (reference, id) in [
        (old.to_string(), old),
        (old.to_string()[..6].to_owned(), old),
        ("base".to_owned(), new),
    ] {
        assert_eq!(store.find(&reference).unwrap().id(), id, "{reference}");
    }
    let error = store.find("bass").unwrap_err().to_string();
    assert!(error.contains("did you mean \"base\"?"), "{error}");
    // Fewer digits than anybody would mean as an id.
    assert!(matches!(
        store.find(&old.to_string()[..3]),
        Err(StoreError::Unknown { .. })
    ));
    let broken =
        store
            .path(&old)
            .with_file_name(format!("{}{}", &new.to_string()[..8], "0".repeat(56)));
    fs::create_dir(&broken).unwrap();
    let error = store.find(&new.to_string()[..8]).unwrap_err().to_string();
    assert!(error.contains(" and "), "{error}");
}

#[test]
fn a_draft_is_no_snapshot_and_leaves_nothing() {
    let (_dir, store) = store();
    let (draft, manifest) = draft(&store, None, &[1], 1);
    let path = draft.path().to_owned();
    assert_eq!(ids(&store), []);
    // Neither the next writer nor a collector takes it for a dead one's.
    drop(store.begin().unwrap());
    assert_eq!(store.collect(&GcLimits::default(), false).unwrap(), []);
    assert!(path.exists());
    // Somebody else wrote to it.
    fs::write(path.join(STATE), "short").unwrap();
    assert!(matches!(
        draft.publish(manifest),
        Err(StoreError::Changed { .. })
    ));
    assert!(!path.exists());
    assert_eq!(ids(&store), []);
}

#[test]
fn what_dead_processes_leave_is_cleared_away() {
    let (_dir, store) = store();
    let held = add(&store, "", 1, None, &[1], 1);
    for (name, lock) in [
        ("tmp-1-00000000", true),
        ("tmp-1-00000001", false),
        (".removed-x", true),
    ] {
        fs::create_dir(store.dir().join(name)).unwrap();
        if lock {
            File::create(store.dir().join(name).join(LOCK)).unwrap();
        }
    }
    assert_eq!(store.collect(&GcLimits::default(), true).unwrap().len(), 3);
    drop(store.begin().unwrap());
    assert_eq!(store.collect(&GcLimits::default(), true).unwrap(), []);
    assert_eq!(ids(&store), [held.snapshot().id()]);
}

#[test]
fn what_was_there_for_a_process_goes_after_it() {
    let (_dir, store) = store();
    let mut process = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let of_process = |parent: Option<&Snapshot>, fill| {
        let (mut draft, manifest) = draft(&store, parent, &[1], fill);
        draft.belong_to(Owner::of(process.id()).unwrap());
        draft.publish(manifest).unwrap()
    };
    let free = of_process(None, 1).snapshot().id();
    let used = of_process(None, 2);
    let parent = of_process(None, 3).snapshot().clone();
    let child = add(&store, "", 1, Some(&parent), &[2], 4).snapshot().id();
    drop(store.begin().unwrap());
    assert_eq!(ids(&store).len(), 4);
    process.kill().unwrap();
    // It is dead before somebody waits for it, too; that it has died takes a moment.
    process.wait().unwrap();
    let gone = store.collect(&GcLimits::default(), true).unwrap();
    assert!(matches!(&gone[..], [Removed::Snapshot(manifest)] if manifest.id == free));
    drop(store.begin().unwrap());
    let mut left = [used.snapshot().id(), parent.id(), child];
    left.sort_unstable();
    let mut there = ids(&store);
    there.sort_unstable();
    assert_eq!(there, left);
    // Another process of that number is not it.
    let path = store.dir().join(format!(".owner-{}", parent.id()));
    fs::remove_file(&path).unwrap();
    symlink(format!("{} 1", std::process::id()), &path).unwrap();
    // One whose snapshot has gone says nothing.
    let stale = store.dir().join(format!(".owner-{}", Digest([7; 32])));
    symlink("1 1", &stale).unwrap();
    drop(used);
    store.remove(&child, false).unwrap();
    store.collect(&GcLimits::default(), false).unwrap();
    assert_eq!(ids(&store), []);
    assert_eq!(store.names().unwrap(), [LOCK]);
}

#[test]
fn a_snapshot_needs_its_parent_to_be_published_and_keeps_it() {
    let (_dir, store) = store();
    let root = add(&store, "root", 1, None, &[1, 2], 1).snapshot().clone();
    let (late, manifest) = draft(&store, Some(&root), &[2], 2);
    let child = add(&store, "child", 2, Some(&root), &[2], 3)
        .snapshot()
        .clone();
    let error = store.remove(&root.id(), false).unwrap_err();
    assert!(matches!(error, StoreError::HasChildren { .. }), "{error}");
    let removed = store.remove(&root.id(), true).unwrap();
    assert_eq!(removed.len(), 2);
    assert!(matches!(&removed[0], Removed::Snapshot(first) if first.id == child.id()));
    assert!(matches!(
        late.publish(manifest),
        Err(StoreError::NoParent { .. })
    ));
    assert_eq!(store.names().unwrap(), [LOCK]);
}

#[test]
fn what_is_in_use_is_not_removed() {
    let (_dir, store) = store();
    let root = add(&store, "root", 1, None, &[1], 1).snapshot().clone();
    let child = add(&store, "child", 2, Some(&root), &[2], 2);
    let all = ids(&store);
    assert!(matches!(
        store.remove(&child.snapshot().id(), false),
        Err(StoreError::InUse { .. })
    ));
    assert!(matches!(
        store.remove(&root.id(), true),
        Err(StoreError::InUse { .. })
    ));
    let everything = GcLimits {
        before: Some(u64::MAX),
        bytes: Some(0),
    };
    assert_eq!(store.collect(&everything, false).unwrap(), []);
    assert_eq!(ids(&store), all);
    drop(child);
    assert_eq!(store.collect(&everything, true).unwrap().len(), 2);
    assert_eq!(ids(&store), all);
    assert_eq!(store.collect(&everything, false).unwrap().len(), 2);
    assert_eq!(ids(&store), []);
}

#[test]
fn a_collector_takes_the_oldest_leaves() {
    let (_dir, store) = store();
    let root = add(&store, "root", 1, None, &[1], 1).snapshot().clone();
    let old = add(&store, "old", 2, Some(&root), &[2], 2).snapshot().id();
    let new = add(&store, "new", 9, Some(&root), &[2], 3).snapshot().id();
    let before = GcLimits {
        before: Some(5),
        bytes: None,
    };
    store.collect(&before, false).unwrap();
    // The root is older, but not a leaf.
    assert_eq!(ids(&store), [root.id(), new]);
    assert!(!store.path(&old).exists());
    let all: u64 = [&root, &store.find("new").unwrap()]
        .iter()
        .map(|s| remove::size_of(s.manifest()))
        .sum();
    let budget = |bytes| GcLimits {
        before: None,
        bytes: Some(bytes),
    };
    assert_eq!(store.collect(&budget(all), false).unwrap(), []);
    store.collect(&budget(all - 1), false).unwrap();
    assert_eq!(ids(&store), [root.id()]);
}

#[test]
fn derived_snapshots_have_the_same_content() {
    let (_dir, store) = store();
    let root = add(&store, "root", 1, None, &[1, 2, 3], 1)
        .snapshot()
        .clone();
    let child = add(&store, "child", 2, Some(&root), &[2], 2)
        .snapshot()
        .clone();
    let leaf = add(&store, "leaf", 3, Some(&child), &[3], 0)
        .snapshot()
        .clone();
    let other = add(&store, "other", 4, None, &[2, 9], 2).snapshot().clone();
    let expected = content(&store, &leaf);
    assert_eq!(expected[..4], [0, 1, 2, 0]);
    assert_eq!(store.lineage(&leaf).unwrap().len(), 3);

    let flat = store
        .flatten(&leaf, Some("flat"))
        .unwrap()
        .snapshot()
        .clone();
    assert_eq!(
        (flat.manifest().parent, flat.manifest().name.as_deref()),
        (None, Some("flat"))
    );
    assert_eq!(content(&store, &flat), expected);
    let rebased = store
        .rebase(&leaf, &other, None)
        .unwrap()
        .snapshot()
        .clone();
    assert_eq!(
        (
            rebased.manifest().parent,
            rebased.manifest().name.as_deref()
        ),
        (Some(other.id()), Some("leaf"))
    );
    assert_eq!(content(&store, &rebased), expected);
    // Page 1 is new, page 2 is the parent's, page 9 is zero.
    for layer in [MEMORY, DISK] {
        let layer = rebased.layer(layer).unwrap();
        assert_eq!((layer.data_pages(), layer.zero_pages()), (1, 1));
    }
    for snapshot in [&flat, &rebased] {
        snapshot.verify().unwrap();
    }
    assert!(matches!(
        store.flatten(&leaf, Some("a/b")),
        Err(StoreError::BadName { .. })
    ));
}

#[test]
fn a_packed_snapshot_comes_back_where_its_parent_is() {
    let (dir, here) = store();
    let there = Store::at(&dir.path().join("there"));
    let root = add(&here, "root", 1, None, &[1, 2], 1).snapshot().clone();
    let child = add(&here, "child", 2, Some(&root), &[2], 2)
        .snapshot()
        .clone();
    let paths = [&root, &child].map(|snapshot| {
        let path = dir.path().join(format!("{}.bough", snapshot.id()));
        derive::pack(snapshot, &path).unwrap();
        path
    });
    assert!(matches!(
        there.unpack(&paths[1]),
        Err(StoreError::NoParent { .. })
    ));
    for (path, snapshot) in paths.iter().zip([&root, &child]) {
        let unpacked = there.unpack(path).unwrap().snapshot().clone();
        assert_eq!(unpacked.manifest(), snapshot.manifest());
        // Once more changes nothing.
        there.unpack(path).unwrap();
    }
    let child = there.find("child").unwrap();
    assert_eq!(content(&there, &child)[..4], [0, 1, 2, 0]);
    assert_eq!(ids(&there).len(), 2);
}

#[test]
fn a_damaged_snapshot_is_told_and_can_be_removed() {
    let (_dir, store) = store();
    let id = add(&store, "root", 1, None, &[1], 1).snapshot().id();
    let path = store.path(&id).join("manifest.json");
    let json = fs::read_to_string(&path).unwrap();
    fs::write(&path, json.replace("root", "rook")).unwrap();
    let error = store.find(&id.to_string()).unwrap_err().to_string();
    assert!(
        error.contains("manifest.json: corrupt at offset 26"),
        "{error}"
    );
    assert!(store.all().unwrap()[0].snapshot.is_err());
    // A collector does not judge.
    let everything = GcLimits {
        before: Some(u64::MAX),
        bytes: Some(0),
    };
    assert_eq!(store.collect(&everything, false).unwrap(), []);
    let id = store.resolve(&id.to_string()[..8]).unwrap();
    assert_eq!(store.remove(&id, false).unwrap(), [Removed::Broken(id)]);
    assert_eq!(ids(&store), []);
}

#[test]
fn a_working_set_is_kept_and_travels_along() {
    let (dir, store) = store();
    let held = add(&store, "root", 1, None, &[1, 2], 1);
    assert_eq!(held.snapshot().working_set().unwrap(), None);
    for pages in [&[2, 1][..], &[1, 2, 63]] {
        held.write_working_set(pages).unwrap();
        assert_eq!(
            held.snapshot().working_set().unwrap().as_deref(),
            Some(pages)
        );
    }
    assert!(held.write_working_set(&[PAGES]).is_err());
    let there = Store::at(&dir.path().join("there"));
    let path = dir.path().join("root.bough");
    derive::pack(held.snapshot(), &path).unwrap();
    let unpacked = there.unpack(&path).unwrap();
    let flat = store.flatten(held.snapshot(), None).unwrap();
    for other in [unpacked, flat] {
        assert_eq!(
            other.snapshot().working_set().unwrap(),
            Some(vec![1, 2, 63])
        );
    }
    // It is a hint: the id is the same without it.
    fs::remove_file(held.snapshot().path(WORKING_SET)).unwrap();
    held.snapshot().verify().unwrap();
}

/// Whoever holds a snapshot has all of it, whatever others publish and remove meanwhile.
#[test]
fn what_is_held_stays_while_others_remove() {
    let (_dir, store) = store();
    let held = std::sync::atomic::AtomicU32::new(0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..40 {
                drop(add(&store, "base", round, None, &[1, 2], 1));
            }
            done.store(true, Relaxed);
        });
        scope.spawn(|| {
            let everything = GcLimits {
                before: Some(u64::MAX),
                bytes: None,
            };
            while !done.load(Relaxed) {
                store.collect(&everything, false).unwrap();
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    match store.hold("base") {
                        Ok(one) => {
                            one.snapshot().verify().unwrap();
                            held.fetch_add(1, Relaxed);
                        }
                        Err(StoreError::Unknown { .. } | StoreError::Gone { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(held.into_inner() > 0);
}
