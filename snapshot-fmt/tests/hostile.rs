//! Files that are cut, changed or made up are refused with a typed error that names file and offset.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;

use std::fs::{self, File};
use std::path::Path;

use common::{FILES, read_all, write_all};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::error::FormatError;
use snapshot_fmt::header::HEADER_LEN;
use snapshot_fmt::layer::offset_of_stored;
use snapshot_fmt::manifest::{FileEntry, Manifest};
use snapshot_fmt::snapshot::Snapshot;

/// Every file, and its bytes.
fn each_file(mut with: impl FnMut(&Path, Vec<u8>)) {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path());
    for name in FILES {
        let path = dir.path().join(name);
        read_all(&path).unwrap();
        with(&path, fs::read(&path).unwrap());
    }
}

/// The error of reading `bytes` in the place of the file at `path`; it must name the file.
fn refusal(path: &Path, bytes: &[u8]) -> FormatError {
    // Not cut and written anew: ext4 would flush it to the disk each time.
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
    let error = read_all(path).expect_err(&format!("{} is taken", path.display()));
    let text = error.to_string();
    assert!(
        text.starts_with(path.to_str().unwrap()) && text.contains("offset"),
        "{text}"
    );
    error
}

#[test]
fn a_file_cut_short_is_refused() {
    each_file(|path, bytes| {
        let json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        let boundaries = [0, 1, 8, 15, 16, 64, 127, 128, 4095, 4096, 8191, 8192];
        let tail = bytes.len().saturating_sub(150)..bytes.len();
        for len in boundaries
            .into_iter()
            .chain(tail)
            .filter(|&len| len < bytes.len())
        {
            match refusal(path, &bytes[..len]) {
                FormatError::Truncated {
                    offset,
                    needed,
                    len: have,
                    ..
                } => {
                    assert_eq!(have, len as u64);
                    assert!(offset + needed > have);
                }
                // A text says nothing of its length.
                FormatError::NotOurs { .. } | FormatError::Corrupt { .. } if json => {}
                error => panic!("{len}: {error}"),
            }
        }
    });
}

#[test]
fn a_file_that_goes_on_is_refused() {
    each_file(|path, mut bytes| {
        let end = bytes.len() as u64;
        bytes.push(b' ');
        match refusal(path, &bytes) {
            FormatError::Corrupt { offset, .. } => {
                assert!(offset == end || path.ends_with("manifest.json"))
            }
            error => panic!("{error}"),
        }
    });
}

/// The digest of a file covers all of it.
#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    each_file(|path, bytes| {
        // All of what is not a page, and a part of the pages.
        let pages = offset_of_stored(0) as usize..bytes.len().saturating_sub(400);
        let packed = path
            .extension()
            .is_some_and(|extension| extension == "bough");
        let chosen = |at: &usize| {
            if packed {
                at.is_multiple_of(7)
            } else {
                !pages.contains(at) || at.is_multiple_of(257)
            }
        };
        for at in (0..bytes.len()).filter(chosen) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            let error = refusal(path, &changed);
            let layer = path
                .extension()
                .is_some_and(|extension| extension == "layer");
            if layer && pages.contains(&at) {
                let FormatError::Page { offset, .. } = error else {
                    panic!("{at}: {error}");
                };
                assert_eq!(offset, at as u64 / 4096 * 4096);
            }
        }
    });
}

/// Gives the header its digest again, as somebody who means it would.
fn seal(bytes: &mut [u8]) {
    let digest = Digest::of(&bytes[..HEADER_LEN - 32]);
    bytes[HEADER_LEN - 32..HEADER_LEN].copy_from_slice(&digest.0);
}

#[test]
fn made_up_numbers_are_refused_before_anything_is_allocated() {
    each_file(|path, bytes| {
        if path.ends_with("manifest.json") {
            return;
        }
        for number in 0..6 {
            let own = u64::from_le_bytes(std::array::from_fn(|byte| bytes[16 + 8 * number + byte]));
            let values = [
                own ^ 1,
                own + 1,
                1 << 16,
                1 << 24,
                1 << 31,
                u64::from(u32::MAX),
                1 << 40,
                1 << 63,
                u64::MAX,
            ];
            for value in values.into_iter().filter(|&value| value != own) {
                let mut changed = bytes.clone();
                changed[16 + 8 * number..][..8].copy_from_slice(&value.to_le_bytes());
                seal(&mut changed);
                // A larger space around the same pages is as good a layer; its digest is another.
                if number == 0
                    && path.extension().is_some_and(|e| e == "layer")
                    && (1024..1 << 32).contains(&value)
                {
                    continue;
                }
                refusal(path, &changed);
            }
        }
    });
}

/// An index that its digest covers, but that makes no sense.
#[test]
fn made_up_extents_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path());
    let path = dir.path().join("child.layer");
    let bytes = fs::read(&path).unwrap();
    let index = offset_of_stored(2) as usize;
    let extent = |first: u64, count: u32, kind: u32| {
        let mut bytes = first.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes
    };
    let good = [extent(1, 1, 1), extent(2, 1, 2), extent(500, 1, 1)];
    assert_eq!(bytes[index..index + 48], good.concat());
    for (bad, why) in [
        (
            [extent(2, 1, 1), extent(2, 1, 2), extent(500, 1, 1)],
            "not behind",
        ),
        (
            [extent(1, 1, 1), extent(2, 499, 2), extent(500, 1, 1)],
            "not behind",
        ),
        (
            [extent(1, 1, 1), extent(2, 1, 2), extent(1024, 1, 1)],
            "behind the layer's space",
        ),
        (
            [extent(1, 1, 1), extent(2, 1, 2), extent(u64::MAX, 2, 1)],
            "behind the layer's space",
        ),
        (
            [extent(1, 1, 1), extent(2, 1, 2), extent(500, u32::MAX, 1)],
            "behind the layer's space",
        ),
        (
            [extent(1, 1, 1), extent(2, 0, 2), extent(500, 1, 1)],
            "empty",
        ),
        (
            [extent(1, 1, 1), extent(2, 1, 3), extent(500, 1, 1)],
            "no known kind",
        ),
        (
            [extent(1, 1, 1), extent(2, 1, 1), extent(500, 1, 1)],
            "stored pages",
        ),
        (
            [extent(1, 1, 1), extent(2, 2, 2), extent(500, 1, 1)],
            "zero pages",
        ),
    ] {
        let mut changed = bytes.clone();
        changed[index..index + 48].copy_from_slice(&bad.concat());
        // Extents and the one tag.
        let digest = Digest::of(&changed[index..index + 64]);
        changed[64..96].copy_from_slice(&digest.0);
        seal(&mut changed);
        let error = refusal(&path, &changed).to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_file_of_another_kind_is_not_ours() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path());
    let path = dir.path().join("working-set");
    for (from, at) in [("memory.layer", 8), ("manifest.json", 0)] {
        fs::copy(dir.path().join(from), &path).unwrap();
        match read_all(&path).unwrap_err() {
            FormatError::NotOurs { offset, .. } => assert_eq!(offset, at),
            error => panic!("{error}"),
        }
    }
    let path = dir.path().join("memory.layer");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(read_all(&path), Err(FormatError::NotOurs { .. })));
}

#[test]
fn fields_that_nobody_knows_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.bin");
    let state = serde_json::json!({"name": "", "number": 1, "blob": "", "more": {"deep": 1}});
    let file = File::create(&path).unwrap();
    snapshot_fmt::state_file::write(&file, &path, &state).unwrap();
    let error = read_all(&path).unwrap_err().to_string();
    assert!(error.contains("does not know the field more"), "{error}");

    let path = dir.path().join("manifest.json");
    let mut manifest = common::sample_manifest(Vec::new());
    let json = String::from_utf8(manifest.seal(&path).unwrap()).unwrap();
    let zeros = json.replace(&manifest.id.to_string(), &"0".repeat(64));
    let changed = zeros.replace("\"cpus\"", "\"turbo\": true,\n    \"cpus\"");
    let id = Digest::of(changed.as_bytes()).to_string();
    fs::write(&path, changed.replace(&"0".repeat(64), &id)).unwrap();
    let error = read_all(&path).unwrap_err().to_string();
    assert!(
        error.contains("does not know the field machine.turbo"),
        "{error}"
    );
}

#[test]
fn names_that_lead_elsewhere_are_neither_written_nor_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifest.json");
    for name in [
        "../state.bin",
        "manifest.json",
        "a/b.layer",
        ".layer",
        "..layer",
        "lock",
        "",
    ] {
        let mut manifest = common::sample_manifest(Vec::new());
        let entry = |name: &str| FileEntry {
            name: name.to_owned(),
            bytes: 1,
            digest: Digest::of(b""),
        };
        manifest.files = vec![entry("good.layer")];
        let json = String::from_utf8(manifest.seal(&path).unwrap()).unwrap();
        manifest.files = vec![entry(name)];
        assert!(manifest.seal(&path).is_err(), "{name}");
        let id = json.split('"').nth(5).unwrap().to_owned();
        let zeros = json
            .replace(&id, &"0".repeat(64))
            .replace("good.layer", name);
        let id = Digest::of(zeros.as_bytes()).to_string();
        fs::write(&path, zeros.replace(&"0".repeat(64), &id)).unwrap();
        let error = read_all(&path).unwrap_err().to_string();
        assert!(error.contains("is no name of a snapshot's file"), "{error}");
    }
}

/// Frames that their table covers, but that are no snapshot's.
#[test]
fn disks_that_can_be_written_have_layers_of_their_size_and_no_others_have() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path());
    let path = dir.path().join("manifest.json");
    let sealed = |writable: bool, layers: &[&str]| {
        let mut manifest = Manifest::read(File::open(&path).unwrap(), &path).unwrap();
        manifest.machine.drives[0].read_only = !writable;
        // A page and a half is two pages.
        manifest.machine.drives[0].bytes = 6144;
        let child = manifest.file("child.layer").unwrap().clone();
        for name in layers {
            fs::copy(dir.path().join("child.layer"), dir.path().join(name)).unwrap();
            manifest.files.push(FileEntry {
                name: (*name).to_owned(),
                ..child.clone()
            });
        }
        manifest.seal(&path)
    };
    for (writable, layers, says) in [
        (true, &[][..], "there is no disk-0.layer"),
        (true, &["disk-00.layer"], "there is no disk-0.layer"),
        (false, &["disk-0.layer"], "a layer of drive 0"),
        (
            true,
            &["disk-0.layer", "disk-1.layer"],
            "a layer of drive 1",
        ),
    ] {
        let error = sealed(writable, layers).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    // The layer spans 1024 pages.
    fs::write(&path, sealed(true, &["disk-0.layer"]).unwrap()).unwrap();
    let snapshot = Snapshot::open(dir.path()).unwrap();
    let machine = &snapshot.manifest().machine;
    assert_eq!(machine.pages_of("disk-0.layer"), Some(2));
    assert_eq!(machine.pages_of("child.layer"), None);
    let error = snapshot.verify().unwrap_err().to_string();
    assert!(
        error.contains("disk-0.layer") && error.contains("spans another"),
        "{error}"
    );
}

#[test]
fn made_up_frames_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path());
    let path = dir.path().join("sample.bough");
    let bytes = fs::read(&path).unwrap();
    let frames = usize::from(bytes[16]);
    let entry = |index: usize| bytes.len() - 24 * (frames - index);
    for (at, value, why) in [
        (entry(1), 0u32, "a frame is empty"),
        (entry(1) + 4, 0, "a frame is empty"),
        (entry(1), 1 << 20, "the frames are longer than the file"),
        (entry(1), 1 << 30, "the compressed length of a frame"),
        (entry(1) + 4, u32::MAX, "the length of a frame"),
        (entry(1) + 4, 1 << 20, "the table says 1048576"),
        (entry(1) + 4, 100, "cannot be decompressed"),
        (
            entry(frames - 1),
            10,
            "the frames end before the table begins",
        ),
        (entry(1) + 8, 0, "does not have the hash"),
    ] {
        let mut changed = bytes.clone();
        changed[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let digest = Digest::of(&changed[entry(0)..]);
        changed[64..96].copy_from_slice(&digest.0);
        seal(&mut changed);
        let error = refusal(&path, &changed).to_string();
        assert!(error.contains(why), "{error}");
    }
}

/// Who changes a page and its hash is found by the hash of the block of hashes.
#[test]
fn a_page_that_is_changed_with_its_hash_is_found() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path());
    let path = dir.path().join("child.layer");
    let mut bytes = fs::read(&path).unwrap();
    let hashes = bytes.len() - 2 * 16;
    let page = offset_of_stored(0) as usize;
    bytes[page] ^= 1;
    let hash = Digest::of(&bytes[page..page + 4096]);
    bytes[hashes..hashes + 16].copy_from_slice(&hash.0[..16]);
    match refusal(&path, &bytes) {
        FormatError::Corrupt { offset, .. } => assert_eq!(offset, hashes as u64),
        error => panic!("{error}"),
    }
}
