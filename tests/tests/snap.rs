//! `vmm snap`, on snapshots that are made here: no KVM is needed.

use std::fs::{self, File};
use std::process::ExitCode;

use libtest_mimic::Failed;
use serde_json::Value;
use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::delta::DeltaWriter;
use snapshot_fmt::digest::Digest;
use snapshot_fmt::layer::offset_of_stored;
use snapshot_fmt::manifest::{
    CpuFingerprint, FileEntry, KernelFile, MEMORY, Machine, Manifest, MemoryRange, STATE,
};
use snapshot_fmt::state_file;
use tests::Needs::Nothing;
use tests::{Output, Vmm, test};
use vmm::store::{Held, Store};

fn main() -> ExitCode {
    tests::main(vec![
        test("a_lineage_is_listed_and_inspected", Nothing, list),
        test("a_corrupt_page_is_named", Nothing, verify),
        test("what_differs_is_counted_by_region", Nothing, diff),
        test("flat_and_rebased_snapshots_are_equal", Nothing, derive),
        test("a_packed_snapshot_travels", Nothing, pack),
        test("what_is_needed_is_not_removed", Nothing, remove),
        test("a_newer_snapshot_is_refused", Nothing, newer),
        test("bad_references_are_refused", Nothing, bad_input),
    ])
}

/// A data directory with a store, and a lineage in it: `base`, and `child` that rests on it.
struct Place {
    dir: tempfile::TempDir,
    store: Store,
    base: Digest,
    child: Digest,
}

impl Place {
    fn new() -> Result<Self, Failed> {
        let dir = tempfile::tempdir()?;
        let store = Store::at(&dir.path().join("bough/snapshots"));
        let base = add(&store, "base", None, &[(0, 1), (1, 2), (300, 3)])?;
        let child = add(&store, "child", Some(&base), &[(1, 0), (2, 4), (300, 5)])?;
        Ok(Self {
            base: base.snapshot().id(),
            child: child.snapshot().id(),
            dir,
            store,
        })
    }

    fn snap(&self, words: &[&str]) -> Result<Output, Failed> {
        Vmm::new(["snap"].iter().chain(words))
            .env("XDG_DATA_HOME", self.dir.path())
            .run()
    }

    /// A call that succeeds, and what it prints.
    fn says(&self, words: &[&str]) -> Result<String, Failed> {
        let output = self.snap(words)?;
        output.expect_status(0)?.expect_no_stderr()?;
        Ok(output.stdout)
    }

    fn json(&self, words: &[&str]) -> Result<Value, Failed> {
        Ok(serde_json::from_str(&self.says(words)?)?)
    }

    /// A call that is refused in one line with these parts.
    fn refuses(&self, words: &[&str], parts: &[&str]) -> Result<(), Failed> {
        let output = self.snap(words)?;
        output
            .expect_status(2)?
            .expect_stderr(parts)?
            .expect_one_line()?;
        Ok(())
    }
}

/// A snapshot with 1 MiB at 0 and 1 MiB at 4 GiB, whose pages are full of these bytes.
fn add(
    store: &Store,
    name: &str,
    parent: Option<&Held>,
    pages: &[(u64, u8)],
) -> Result<Held, Failed> {
    let draft = store.begin()?;
    let path = draft.path().join(STATE);
    let state = state_file::write(&File::create(&path)?, &path, &"a state")?;
    let parent = parent.map(Held::snapshot);
    let below = parent
        .map(|parent| store.chain(parent, MEMORY))
        .transpose()?;
    let path = draft.path().join(MEMORY);
    let mut layer = DeltaWriter::new(File::create(&path)?, &path, 512, below.as_ref())?;
    for &(page, fill) in pages {
        layer.put(page, &[fill; PAGE_SIZE])?;
    }
    let (memory, _) = layer.finish()?;
    let entry = |name: &str, bytes, digest| FileEntry {
        name: name.to_owned(),
        bytes,
        digest,
    };
    let range = |start| MemoryRange {
        start,
        bytes: 1 << 20,
    };
    let manifest = Manifest {
        format: 1,
        id: Digest([0; 32]),
        name: Some(name.to_owned()),
        created: 1_700_000_000,
        software: "0".to_owned(),
        parent: parent.map(|parent| parent.id()),
        machine: Machine {
            cpus: 1,
            memory: vec![range(0), range(1 << 32)],
            kernel: KernelFile {
                path: "vmlinux".to_owned(),
                digest: None,
            },
            cmdline: String::new(),
            drives: Vec::new(),
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
        ],
    };
    Ok(draft.publish(manifest)?)
}

fn expect(text: &str, parts: &[&str]) -> Result<(), Failed> {
    match parts.iter().find(|part| !text.contains(*part)) {
        None => Ok(()),
        Some(part) => Err(format!("no {part:?} in {text}").into()),
    }
}

fn expect_value(value: &Value, expected: impl Into<Value>) -> Result<(), Failed> {
    let expected = expected.into();
    if *value == expected {
        return Ok(());
    }
    Err(format!("{value}, not {expected}").into())
}

fn list() -> Result<(), Failed> {
    let place = Place::new()?;
    let (base, child) = (place.base.to_string(), place.child.to_string());
    let tree = place.says(&["ls"])?;
    expect(
        &tree,
        &["ID ", "SNAPSHOT", "  base\n", "  └─ child\n", &base[..12]],
    )?;
    let listed = place.json(&["ls", "--json"])?;
    let of_child = listed
        .as_array()
        .and_then(|all| all.iter().find(|one| one["name"] == "child"));
    expect_value(&of_child.ok_or("no child")?["parent"], base.clone())?;
    let ids = place.says(&["ls", "-q"])?;
    expect(&ids, &[&base, &child])?;
    let inspected = place.json(&["inspect", &child[..8]])?;
    expect_value(&inspected["stored"]["lineage"][0], base.clone())?;
    // Pages 2 and 300 are stored, page 1 is zero though the parent has it.
    let layer = &inspected["stored"]["layers"][0];
    expect_value(&layer["data_pages"], 2)?;
    expect_value(&layer["zero_pages"], 1)?;
    expect_value(
        &place.json(&["inspect", "base"])?["stored"]["children"][0],
        child,
    )
}

fn verify() -> Result<(), Failed> {
    let place = Place::new()?;
    expect(
        &place.says(&["verify", "child"])?,
        &["child: whole", "2 layers"],
    )?;
    let path = place.store.path(&place.base).join(MEMORY);
    let mut bytes = fs::read(&path)?;
    let at = offset_of_stored(2);
    bytes[usize::try_from(at)? + 7] ^= 1;
    fs::write(&path, bytes)?;
    // The child rests on it.
    let parts = [
        "memory.layer",
        "page 300 is corrupt",
        &format!("offset {at}"),
    ];
    for words in [&["verify", "base"][..], &["verify", "child"]] {
        place.refuses(words, &parts)?;
    }
    place
        .snap(&["verify", "--all"])?
        .expect_status(2)?
        .expect_stderr(&parts)?;
    fs::remove_file(&path)?;
    place.refuses(&["verify", "child"], &["memory.layer", "No such file"])
}

fn diff() -> Result<(), Failed> {
    let place = Place::new()?;
    let regions = place.json(&["diff", "base", "child", "--json"])?;
    expect_value(&regions[0]["ranges"], serde_json::json!([[4096, 8192]]))?;
    expect_value(&regions[1]["start"], 1_u64 << 32)?;
    expect_value(
        &regions[1]["ranges"],
        serde_json::json!([[(1_u64 << 32) + (44 << 12), 4096]]),
    )?;
    let text = place.says(&["diff", "base", "child"])?;
    expect(&text, &["DIFFER", "0x100000000", "8.0K", "memory"])?;
    let same = place.json(&["diff", "child", "child", "--json"])?;
    expect_value(&same[0]["differ"], 0)
}

fn derive() -> Result<(), Failed> {
    let place = Place::new()?;
    let flat = place.says(&["flatten", "child", "flat"])?;
    expect_value(
        &place.json(&["inspect", flat.trim()])?["stored"]["lineage"],
        Value::Array(vec![]),
    )?;
    drop(add(&place.store, "other", None, &[(9, 9)])?);
    place.says(&["rebase", "child", "other", "moved"])?;
    for name in ["flat", "moved"] {
        let regions = place.json(&["diff", "child", name, "--json"])?;
        for region in [0, 1] {
            expect_value(&regions[region]["differ"], 0)?;
        }
    }
    place.says(&["verify", "--all"])?;
    place.refuses(
        &["flatten", "child", "a/b"],
        &["\"a/b\" cannot name a snapshot"],
    )
}

fn pack() -> Result<(), Failed> {
    let (here, there) = (Place::new()?, tempfile::tempdir()?);
    let file = |name: &str| here.dir.path().join(name).to_string_lossy().into_owned();
    let (base, child) = (file("base.bough"), file("child.bough"));
    here.says(&["pack", "base", &base])?;
    here.says(&["pack", "child", &child])?;
    here.refuses(&["pack", "child", &child], &["is there already"])?;
    expect_value(&here.json(&["inspect", &child])?["name"], "child")?;
    let unpack = |path: &str| -> Result<Output, Failed> {
        Vmm::new(["snap", "unpack", path])
            .env("XDG_DATA_HOME", there.path())
            .run()
    };
    unpack(&child)?
        .expect_status(2)?
        .expect_stderr(&["rests on", "unpack that one first"])?
        .expect_one_line()?;
    unpack(&base)?
        .expect_status(0)?
        .expect_stdout(&format!("{}\n", here.base))?;
    unpack(&child)?.expect_status(0)?;
    Vmm::new(["snap", "verify", "--all"])
        .env("XDG_DATA_HOME", there.path())
        .run()?
        .expect_status(0)?;
    let (cut, whole) = (file("cut.bough"), fs::read(&child)?);
    for len in [100, whole.len() - 1] {
        fs::write(&cut, &whole[..len])?;
        unpack(&cut)?
            .expect_status(2)?
            .expect_stderr(&["cut.bough", "cut short"])?
            .expect_one_line()?;
    }
    // Nothing of the refused is left.
    let left: Vec<_> = fs::read_dir(there.path().join("bough/snapshots"))?
        .flatten()
        .collect();
    if left.len() != 3 {
        return Err(format!("{left:?}").into());
    }
    Ok(())
}

fn remove() -> Result<(), Failed> {
    let place = Place::new()?;
    place.refuses(&["rm", "base"], &["rest on it", "--recursive"])?;
    let held = place.store.hold("child")?;
    place.refuses(&["rm", "child"], &["in use"])?;
    place.says(&["gc", "--older-than", "1d"])?;
    if !held.snapshot().dir().exists() {
        return Err("it was collected".into());
    }
    drop(held);
    let draft = place.store.dir().join("tmp-1-00000000");
    fs::create_dir(&draft)?;
    let words = ["gc", "--max-size", "0", "--dry-run"];
    expect(
        &place.says(&words)?,
        &["would remove", "child", "tmp-1-0000"],
    )?;
    expect(&place.says(&["gc"])?, &["removed", "tmp-1-0000"])?;
    expect(&place.says(&["ls"])?, &["child"])?;
    place.says(&["rm", "--recursive", "base"])?;
    let left = place.says(&["ls", "-q"])?;
    if draft.exists() || !left.is_empty() {
        return Err(format!("left: {left}").into());
    }
    Ok(())
}

fn newer() -> Result<(), Failed> {
    let place = Place::new()?;
    let path = place.store.path(&place.child).join("manifest.json");
    let json = fs::read_to_string(&path)?;
    fs::write(&path, json.replace("\"format\": 1", "\"format\": 2"))?;
    let id = place.child.to_string();
    place.refuses(
        &["inspect", &id],
        &[
            "manifest.json",
            "format version 2",
            "use the vmm that wrote it",
        ],
    )?;
    // The others can be listed all the same.
    expect(&place.says(&["ls"])?, &["base", "format version 2"])
}

fn bad_input() -> Result<(), Failed> {
    let place = Place::new()?;
    place.refuses(
        &["inspect", "bose"],
        &[
            "no snapshot is called \"bose\"",
            "did you mean \"base\"?",
            "vmm snap ls",
        ],
    )?;
    place.refuses(
        &["inspect", "nothing.bough"],
        &["nothing.bough", "No such file"],
    )?;
    place.refuses(&["unpack", "nothing"], &["there is no file nothing"])?;
    place.refuses(&["verify"], &["--help says more"])?;
    place.refuses(&["gc", "--older-than", "1w"], &["ms, s, m, h or d"])?;
    place.refuses(&["gc", "--max-size", "0K"], &["unknown unit"])
}
