//! A snapshot's files. Digests are made right again before a file is read, so that what lies behind them is reached.
//!
//! What is read must be written again and read as the same; a chain must agree with its layers page by page.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use arbitrary::Arbitrary;
use rustix::fs::{MemfdFlags, memfd_create};
use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::header::HEADER_LEN;
use snapshot_fmt::layer::{ExtentKind, Layer, LayerWriter, offset_of_stored};
use snapshot_fmt::manifest::Manifest;
use snapshot_fmt::pack::Pack;
use snapshot_fmt::state::virtio::VirtioMmioState;
use snapshot_fmt::{PAGE_SIZE, ops, state_file, working_set};

const NAME: &str = "fuzz";
const MANIFEST: &[u8] = include_bytes!("../../snapshot-fmt/tests/golden/v1/manifest.json");

fn memory_file() -> File {
    File::from(memfd_create(NAME, MemfdFlags::CLOEXEC).expect("a memory file"))
}

fn file_of(bytes: &[u8]) -> File {
    let file = memory_file();
    file.write_all_at(bytes, 0).expect("a memory file");
    file
}

/// Gives a binary file's header its digests again; the body is `body`.
fn seal(bytes: &mut [u8], body: std::ops::Range<usize>) {
    let Some(body) = bytes.get(body).map(Digest::of) else {
        return;
    };
    if bytes.len() < HEADER_LEN {
        return;
    }
    bytes[64..96].copy_from_slice(&body.0);
    let digest = Digest::of(&bytes[..96]);
    bytes[96..HEADER_LEN].copy_from_slice(&digest.0);
}

/// Manifests.
pub fn manifest(bytes: &[u8]) {
    read_manifest(bytes);
    // The same, with the id that it should have.
    let mut bytes = bytes.to_vec();
    let digits = 26..90;
    if bytes.len() < digits.end {
        return;
    }
    bytes[digits.clone()].fill(b'0');
    let id = Digest::of(&bytes).to_string();
    bytes[digits].copy_from_slice(id.as_bytes());
    read_manifest(&bytes);
}

fn read_manifest(bytes: &[u8]) {
    let path = Path::new(NAME);
    if let Ok(manifest) = Manifest::parse(bytes, path) {
        let mut again = manifest.clone();
        let written = again.seal(path).expect("what was read can be written");
        assert_eq!(
            Manifest::parse(&written, path).expect("what was written can be read"),
            again
        );
        again.id = manifest.id;
        assert_eq!(again, manifest);
    }
}

/// State files.
pub fn state(bytes: &[u8]) {
    read_state(bytes);
    let mut bytes = bytes.to_vec();
    let len = bytes.len();
    if len >= HEADER_LEN {
        bytes[16..24].copy_from_slice(&((len - HEADER_LEN) as u64).to_le_bytes());
    }
    seal(&mut bytes, HEADER_LEN..len);
    read_state(&bytes);
}

fn read_state(bytes: &[u8]) {
    let path = Path::new(NAME);
    if let Ok((state, _)) = state_file::read::<VirtioMmioState>(file_of(bytes), path) {
        let again = memory_file();
        let written =
            state_file::write(&again, path, &state).expect("what was read can be written");
        let read = state_file::read(again, path).expect("what was written can be read");
        assert_eq!(read, (state, written));
    }
}

/// Working sets.
pub fn working_set(bytes: &[u8]) {
    read_working_set(bytes);
    let mut bytes = bytes.to_vec();
    let len = bytes.len();
    seal(&mut bytes, HEADER_LEN..len);
    read_working_set(&bytes);
}

fn read_working_set(bytes: &[u8]) {
    let (path, total) = (Path::new(NAME), 1024);
    if let Ok(pages) = working_set::read(file_of(bytes), path, total) {
        let again = memory_file();
        working_set::write(&again, path, total, &pages).expect("what was read can be written");
        assert_eq!(
            working_set::read(again, path, total).expect("what was written can be read"),
            pages
        );
    }
}

/// Bytes written over a file: where, counted from the end where that is said, and what.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Patch(bool, u16, [u8; 4]);

fn patch(bytes: &mut [u8], patches: &[Patch]) {
    for &Patch(from_end, at, patch) in patches.iter().take(16) {
        let at = if from_end {
            bytes.len().saturating_sub(at.into())
        } else {
            at.into()
        };
        if let Some(place) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
            *place = patch;
        }
    }
}

/// An extent: first page, pages, kind.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Entry {
    /// So many pages behind the one before.
    Next(u8, u8, bool),
    /// Any.
    Any(u64, u32, u32),
}

/// Two layers, one above the other, and what is wrong with them.
#[derive(Arbitrary, Clone, Debug)]
pub struct LayerInput {
    total: u16,
    other_total: Option<u64>,
    layers: [(Vec<Entry>, Vec<Patch>); 2],
    sealed: bool,
    len: Option<u16>,
}

/// Layers and chains.
pub fn layer(input: &LayerInput) {
    let total = u64::from(input.total);
    let mut layers = Vec::new();
    for (entries, patches) in &input.layers {
        let (mut bytes, index) = layer_file(total, entries);
        if let Some(total) = input.other_total {
            bytes[16..24].copy_from_slice(&total.to_le_bytes());
        }
        patch(&mut bytes, patches);
        if input.sealed {
            seal(&mut bytes, index);
        }
        if let Some(len) = input.len {
            bytes.resize(len.into(), 0);
        }
        match Layer::open(file_of(&bytes), Path::new(NAME)) {
            Ok(layer) => layers.push(layer),
            Err(_) => return,
        }
    }
    let whole = layers.iter().all(|layer| layer.verify().is_ok());
    for layer in &layers {
        check_layer(layer);
    }
    let Ok(chain) = Chain::new(layers) else {
        return;
    };
    check_chain(&chain);
    let flat = ops::flatten(&chain, memory_file(), Path::new(NAME));
    assert!(flat.is_ok() || !whole);
    if let Ok((_, file)) = flat {
        let flat = Layer::open(file, Path::new(NAME)).expect("what was written can be read");
        flat.verify().expect("what was written is right");
        let flat = Chain::new(vec![flat]).expect("one layer is a chain");
        assert_eq!(ops::diff(&chain, &flat).expect("a comparison"), []);
    }
}

/// The bytes of a layer that is right if its extents are, and where its extents and tags are.
fn layer_file(total: u64, entries: &[Entry]) -> (Vec<u8>, std::ops::Range<usize>) {
    let (mut extents, mut count, mut numbers, mut next) = (Vec::new(), 0, [0; 2], 0);
    for &entry in entries.iter().take(64) {
        let (first, pages, kind) = match entry {
            Entry::Next(gap, pages, zero) => {
                (next + u64::from(gap), pages.into(), 1 + u32::from(zero))
            }
            Entry::Any(first, pages, kind) => (first, pages, kind),
        };
        next = first.wrapping_add(pages.into()) & 0xffff;
        if let Some(number) = kind
            .checked_sub(1)
            .and_then(|kind| numbers.get_mut(kind as usize))
        {
            *number += u64::from(pages);
        }
        extents.extend(first.to_le_bytes());
        extents.extend(pages.to_le_bytes());
        extents.extend(kind.to_le_bytes());
        count += 1;
    }
    let data = numbers[0].min(80);
    let mut writer = LayerWriter::new(memory_file(), Path::new(NAME), data).expect("a layer");
    for page in 0..data {
        writer.data(page, &[page as u8; PAGE_SIZE]).expect("a page");
    }
    let (summary, file) = writer.finish().expect("a layer");
    let mut bytes = vec![0; summary.bytes as usize];
    file.read_exact_at(&mut bytes, 0).expect("a layer");
    let index = offset_of_stored(data) as usize;
    bytes.splice(index..index + 16 * summary.extents as usize, extents);
    for (at, number) in [(16, total), (24, data), (32, numbers[1]), (40, count)] {
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    let end = index + 16 * (count + data.div_ceil(256)) as usize;
    (bytes, index..end)
}

fn check_layer(layer: &Layer) {
    let (mut next, mut stored, mut zero) = (0, 0, 0);
    for extent in layer.extents() {
        assert!(extent.first_page >= next && extent.count > 0);
        next = extent.end();
        match extent.kind {
            ExtentKind::Data { first_stored } => {
                assert_eq!(first_stored, stored);
                stored += extent.count;
            }
            ExtentKind::Zero => zero += extent.count,
        }
    }
    assert!(next <= layer.total_pages());
    assert_eq!((stored, zero), (layer.data_pages(), layer.zero_pages()));
    assert!(offset_of_stored(stored) <= layer.bytes());
}

fn check_chain(chain: &Chain) {
    let mut next = 0;
    for run in chain.runs(0, chain.total_pages()) {
        assert_eq!(run.first_page, next);
        next = run.end();
        for page in run.first_page..run.end().min(run.first_page + 256) {
            let nearest = chain.layers().iter().enumerate().rev();
            let mut nearest =
                nearest.filter_map(|(number, layer)| Some((number, layer.lookup(page)?)));
            let expected = match nearest.next() {
                Some((layer, ExtentKind::Data { first_stored })) => Source::Data {
                    layer,
                    first_stored,
                },
                _ => Source::Zero,
            };
            assert_eq!(chain.lookup(page), expected);
        }
    }
    assert_eq!(next, chain.total_pages());
}

/// A frame of a packed snapshot.
#[derive(Arbitrary, Clone, Debug)]
pub enum Frame {
    /// The manifest of the golden files, changed.
    Manifest(Vec<Patch>),
    /// Bytes that zstd made of such.
    Zstd(Vec<u8>),
    /// What zstd makes of so many zeros.
    Zeros(u32),
    /// Bytes.
    Raw(Vec<u8>),
}

/// A packed snapshot, and what is wrong with it.
#[derive(Arbitrary, Clone, Debug)]
pub struct PackInput {
    frames: Vec<Frame>,
    patches: Vec<Patch>,
    sealed: bool,
    len: Option<u16>,
}

/// Packed snapshots.
pub fn pack(input: &PackInput) {
    let mut bytes = pack_file(&input.frames);
    patch(&mut bytes, &input.patches);
    if input.sealed {
        let len = bytes.len();
        seal(&mut bytes, len - 24 * input.frames.len().min(12)..len);
    }
    if let Some(len) = input.len {
        bytes.resize(len.into(), 0);
    }
    let Ok(pack) = Pack::open(file_of(&bytes), Path::new(NAME)) else {
        return;
    };
    let dir = std::env::temp_dir().join(format!("bough-fuzz-{}", std::process::id()));
    // What an input before this one left.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).expect("a directory");
    if let Ok(snapshot) = pack.unpack(&dir) {
        assert_eq!(snapshot.manifest(), pack.manifest());
        snapshot.verify().expect("what was unpacked is right");
    }
    let listed = |path: &PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy();
        name == "manifest.json" || name == "working-set" || pack.manifest().file(&name).is_some()
    };
    let entries = fs::read_dir(&dir).expect("the directory");
    assert!(
        entries
            .map(|entry| entry.expect("an entry").path())
            .all(|path| listed(&path))
    );
    fs::remove_dir_all(&dir).expect("the directory");
}

fn pack_file(frames: &[Frame]) -> Vec<u8> {
    let (mut bytes, mut table) = (vec![0; HEADER_LEN], Vec::new());
    let frames = &frames[..frames.len().min(12)];
    for frame in frames {
        let (len, compressed) = match frame {
            Frame::Manifest(patches) => {
                let mut json = MANIFEST.to_vec();
                patch(&mut json, patches);
                json[26..90].fill(b'0');
                let id = Digest::of(&json).to_string();
                json[26..90].copy_from_slice(id.as_bytes());
                (json.len(), zstd::bulk::compress(&json, 1).expect("zstd"))
            }
            Frame::Zstd(bytes) => (bytes.len(), zstd::bulk::compress(bytes, 1).expect("zstd")),
            Frame::Zeros(len) => {
                let zeros = vec![0; (*len).min(1 << 20) as usize];
                (zeros.len(), zstd::bulk::compress(&zeros, 1).expect("zstd"))
            }
            Frame::Raw(bytes) => (bytes.len(), bytes.clone()),
        };
        table.extend((compressed.len() as u32).to_le_bytes());
        table.extend((len as u32).to_le_bytes());
        table.extend(&Digest::of(&compressed).0[..16]);
        bytes.extend(compressed);
    }
    bytes.extend(table);
    bytes[..16].copy_from_slice(b"\x89BOUGH\r\nPACK\x01\0\0\0");
    let len = bytes.len() as u64;
    bytes[16..24].copy_from_slice(&(frames.len() as u64).to_le_bytes());
    bytes[24..32].copy_from_slice(&len.to_le_bytes());
    bytes
}
