//! What the tests of files have in common: files of one version of the format, made by today's writers.
#![allow(dead_code, missing_docs)]

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::error::{FormatError, WriteError};
use snapshot_fmt::layer::{Layer, LayerSummary, LayerWriter};
use snapshot_fmt::manifest::{
    CpuFingerprint, Drive, FileEntry, KernelFile, Machine, Manifest, MemoryRange, Warm,
};
use snapshot_fmt::pack::{self, Pack};
use snapshot_fmt::snapshot::Snapshot;
use snapshot_fmt::{PAGE_SIZE, Page, state_file, working_set};

/// Pages of the space of the layers here.
pub const TOTAL_PAGES: u64 = 1024;

/// A page that is like no other.
pub fn page(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    for (word, chunk) in (0..).zip(page.chunks_exact_mut(8)) {
        let value: u64 = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word);
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    page
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleState {
    pub name: String,
    pub number: u64,
    #[serde(with = "snapshot_fmt::bytes")]
    pub blob: Vec<u8>,
}

pub fn sample_state() -> SampleState {
    SampleState {
        name: "a state".to_owned(),
        number: u64::MAX,
        blob: (0..=255).collect(),
    }
}

pub const WORKING_SET: [u64; 4] = [17, 1, 1023, 16];

/// Writes a file and gives its name back.
pub fn create(dir: &Path, name: &str) -> (File, PathBuf) {
    let path = dir.join(name);
    (File::create(&path).unwrap(), path)
}

/// A root layer: pages 0 to 2, and 1023.
pub fn write_root(dir: &Path) -> LayerSummary {
    let (file, path) = create(dir, "memory.layer");
    let mut layer = LayerWriter::new(file, &path, TOTAL_PAGES).unwrap();
    layer
        .data(0, [page(1), page(2), page(3)].as_flattened())
        .unwrap();
    layer.data(1023, &page(4)).unwrap();
    layer.finish().unwrap().0
}

/// Its child: page 1 is another, page 2 is zero, page 500 is new.
pub fn write_child(dir: &Path) -> LayerSummary {
    let (file, path) = create(dir, "child.layer");
    let mut layer = LayerWriter::new(file, &path, TOTAL_PAGES).unwrap();
    layer.data(1, &page(5)).unwrap();
    layer.zero(2, 1).unwrap();
    layer.data(500, &page(6)).unwrap();
    layer.finish().unwrap().0
}

pub fn sample_manifest(files: Vec<FileEntry>) -> Manifest {
    Manifest {
        format: 1,
        id: Digest([0; 32]),
        name: Some("a-name".to_owned()),
        created: 1_700_000_000,
        software: "0.1.0".to_owned(),
        parent: Some(Digest::of(b"parent")),
        machine: Machine {
            cpus: 2,
            memory: vec![
                MemoryRange {
                    start: 0,
                    bytes: 1 << 20,
                },
                MemoryRange {
                    start: 1 << 32,
                    bytes: 3 << 20,
                },
            ],
            kernel: KernelFile {
                path: "/boot/vmlinux".to_owned(),
                digest: Some(Digest::of(b"kernel")),
            },
            cmdline: "quiet \"quoted\" é".to_owned(),
            drives: vec![Drive {
                path: "/images/image".to_owned(),
                read_only: true,
                interface: "pmem".to_owned(),
                bytes: 1 << 21,
                mtime_ns: 1_700_000_000_123_456_789,
                digest: None,
            }],
            vsock_cid: Some(3),
            lane: false,
        },
        programs: Default::default(),
        cpu: CpuFingerprint {
            vendor: "GenuineIntel".to_owned(),
            model: "6/143/8".to_owned(),
            features: vec!["00000001.00000000.ecx=77fafbff".to_owned()],
        },
        warm: Some(Warm {
            language: "python".to_owned(),
            modules: vec!["json".to_owned()],
        }),
        files,
    }
}

/// Writes every kind of file to `dir`.
pub fn write_all(dir: &Path) {
    let (file, path) = create(dir, "state.bin");
    let state = state_file::write(&file, &path, &sample_state()).unwrap();
    let root = write_root(dir);
    let child = write_child(dir);
    let (file, path) = create(dir, "working-set");
    working_set::write(&file, &path, TOTAL_PAGES, &WORKING_SET).unwrap();
    let entry = |name: &str, bytes, digest| FileEntry {
        name: name.to_owned(),
        bytes,
        digest,
    };
    let mut manifest = sample_manifest(vec![
        entry("state.bin", state.bytes, state.digest),
        entry("memory.layer", root.bytes, root.digest),
        entry("child.layer", child.bytes, child.digest),
    ]);
    let path = dir.join("manifest.json");
    std::fs::write(&path, manifest.seal(&path).unwrap()).unwrap();
    let snapshot = Snapshot::open(dir).unwrap();
    snapshot.verify().unwrap();
    let (file, path) = create(dir, "sample.bough");
    pack::pack(&snapshot, &file, &path).unwrap();
}

/// The files of [`write_all`].
pub const FILES: [&str; 6] = [
    "state.bin",
    "memory.layer",
    "child.layer",
    "working-set",
    "manifest.json",
    "sample.bough",
];

/// Reads all of a file as what its name says.
pub fn read_all(path: &Path) -> Result<(), FormatError> {
    let file = File::open(path).unwrap();
    match path.file_name().unwrap().to_str().unwrap() {
        "state.bin" => state_file::read::<SampleState>(file, path).map(drop),
        "working-set" => working_set::read(file, path, TOTAL_PAGES).map(drop),
        "manifest.json" => Manifest::read(file, path).map(drop),
        "sample.bough" => {
            let dir = tempfile::tempdir().unwrap();
            match Pack::open(file, path)?.unpack(dir.path()) {
                Ok(_) => Ok(()),
                Err(WriteError::Source(error)) => Err(error),
                Err(error) => panic!("{error}"),
            }
        }
        _ => Layer::open(file, path)?.verify(),
    }
}

pub fn open(dir: &Path, name: &str) -> Layer {
    let path = dir.join(name);
    Layer::open(File::open(&path).unwrap(), &path).unwrap()
}
