//! The files in `golden/v1` are version 1 of the format: what today's reader reads, and what today's writer writes.
//!
//! They were written by `WRITE_GOLDEN=1 cargo test -p snapshot-fmt --test golden`. A change that makes
//! these tests fail changes the format: it gets a new version, and a folder beside this one; these files stay as they are,
//! and stay readable.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{FILES, open, page, read_all, sample_state};
use snapshot_fmt::chain::Chain;
use snapshot_fmt::digest::Digest;
use snapshot_fmt::error::FormatError;
use snapshot_fmt::manifest::Manifest;
use snapshot_fmt::pack::Pack;
use snapshot_fmt::snapshot::Snapshot;
use snapshot_fmt::{PAGE_SIZE, header, state_file, working_set};

/// The id of the manifest in `golden/v1`.
const ID: &str = "2894bcc9b1fb5035362f11e45730686958842586e78d717c6e1422c129fa97f0";

fn golden(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(version)
}

fn open_file(path: &Path) -> fs::File {
    fs::File::open(path).unwrap()
}

#[test]
fn version_1_is_read() {
    let dir = golden("v1");
    let path = dir.join("state.bin");
    let (state, written): (common::SampleState, _) =
        state_file::read(open_file(&path), &path).unwrap();
    assert_eq!(state, sample_state());
    let path = dir.join("working-set");
    let pages = working_set::read(open_file(&path), &path, common::TOTAL_PAGES).unwrap();
    assert_eq!(pages, common::WORKING_SET);
    let path = dir.join("manifest.json");
    let manifest = Manifest::read(open_file(&path), &path).unwrap();
    assert_eq!(manifest.id.to_string(), ID);
    assert_eq!(manifest.file("state.bin").unwrap().digest, written.digest);
    let mut expected = common::sample_manifest(manifest.files.clone());
    expected.id = manifest.id;
    assert_eq!(manifest, expected);
    let chain = Chain::new(vec![open(&dir, "memory.layer"), open(&dir, "child.layer")]).unwrap();
    for (number, content) in [
        (0, page(1)),
        (1, page(5)),
        (2, [0; PAGE_SIZE]),
        (3, [0; PAGE_SIZE]),
        (500, page(6)),
        (1023, page(4)),
    ] {
        let mut bytes = [0xff; PAGE_SIZE];
        chain.read_page(number, &mut bytes).unwrap();
        assert_eq!(bytes, content, "page {number}");
    }
    chain.verify().unwrap();
    Snapshot::open(&dir).unwrap().verify().unwrap();
    let path = dir.join("sample.bough");
    let unpacked = tempfile::tempdir().unwrap();
    let pack = Pack::open(open_file(&path), &path).unwrap();
    assert_eq!(pack.manifest(), &manifest);
    pack.unpack(unpacked.path()).unwrap();
    for name in FILES.into_iter().filter(|name| !name.ends_with(".bough")) {
        assert!(
            fs::read(unpacked.path().join(name)).unwrap() == fs::read(dir.join(name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn version_1_is_written() {
    if std::env::var_os("WRITE_GOLDEN").is_some() {
        write_golden_files();
    }
    let dir = tempfile::tempdir().unwrap();
    common::write_all(dir.path());
    // What zstd makes of the same bytes is its own affair.
    for name in FILES.into_iter().filter(|name| !name.ends_with(".bough")) {
        let (now, then) = (
            fs::read(dir.path().join(name)),
            fs::read(golden("v1").join(name)),
        );
        assert!(
            now.unwrap() == then.unwrap(),
            "{name} is written otherwise than in version 1"
        );
    }
}

#[test]
fn a_newer_version_is_refused_by_its_number() {
    for name in FILES {
        let path = golden("future").join(name);
        let error = read_all(&path).unwrap_err();
        let FormatError::TooNew {
            found, supported, ..
        } = &error
        else {
            panic!("{name}: {error}");
        };
        assert_eq!((*found, *supported), (2, 1), "{name}");
        let text = error.to_string();
        assert!(
            text.contains(name) && text.contains("use the vmm that wrote it or a newer one"),
            "{text}"
        );
    }
}

fn write_golden_files() {
    let (now, future) = (golden("v1"), golden("future"));
    for dir in [&now, &future] {
        fs::create_dir_all(dir).unwrap();
    }
    common::write_all(&now);
    for name in FILES {
        let mut bytes = fs::read(now.join(name)).unwrap();
        if name == "manifest.json" {
            let text = String::from_utf8(bytes).unwrap();
            bytes = text
                .replace("\"format\": 1", "\"format\": 2")
                .replace("\"cpus\"", "\"processors\"")
                .into();
        } else {
            bytes[12] = 2;
            let digest = Digest::of(&bytes[..header::HEADER_LEN - 32]);
            bytes[header::HEADER_LEN - 32..header::HEADER_LEN].copy_from_slice(&digest.0);
        }
        fs::write(future.join(name), bytes).unwrap();
    }
}
