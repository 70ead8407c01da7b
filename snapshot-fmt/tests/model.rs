//! Random writes, layers and chains agree with a model of memory, byte for byte.
//!
//! The generator is seeded: a failure names the seed, and `MODEL_SEED=<seed>` runs it again.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::path::Path;

use common::page;
use snapshot_fmt::chain::{Chain, Run, Source};
use snapshot_fmt::delta::DeltaWriter;
use snapshot_fmt::layer::{Layer, LayerWriter, offset_of_stored};
use snapshot_fmt::{PAGE_SIZE, Page, ops, pages};

const ZEROS: Page = [0; PAGE_SIZE];
const DEPTH: usize = 16;

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// What memory is, page by page, and which pages were written since the last layer.
#[derive(Clone)]
struct Memory {
    pages: Vec<Page>,
    dirty: Vec<bool>,
}

impl Memory {
    fn new(total: usize) -> Self {
        Self {
            pages: vec![ZEROS; total],
            dirty: vec![false; total],
        }
    }

    /// Pages are cleared, written with one of a few contents, changed in a byte, or written with what they have.
    fn write_some(&mut self, random: &mut Random) {
        for _ in 0..random.below(12) {
            let first = random.below(self.pages.len());
            let count = 1 + random.below((self.pages.len() - first).min(40));
            let how = random.below(4);
            for number in first..first + count {
                self.dirty[number] = true;
                let own = &mut self.pages[number];
                match how {
                    0 => *own = ZEROS,
                    1 => *own = page(random.below(8) as u64),
                    2 => own[random.below(PAGE_SIZE)] ^= 1,
                    _ => {}
                }
            }
        }
    }
}

/// Writes the dirty pages of `memory` against `parent`.
fn take_layer(
    dir: &Path,
    name: &str,
    memory: &mut Memory,
    parent: Option<&Chain>,
    random: &mut Random,
) {
    let (file, path) = common::create(dir, name);
    let total = memory.pages.len();
    let mut layer = DeltaWriter::new(file, &path, total as u64, parent).unwrap();
    let mut next = 0;
    while next < total {
        // Pages that are not dirty may be put as well.
        let first = next
            + memory.dirty[next..]
                .iter()
                .position(|&dirty| dirty || random.below(50) == 0)
                .unwrap_or(total - next);
        let end = first
            + memory.dirty[first..]
                .iter()
                .position(|&dirty| !dirty)
                .unwrap_or(total - first)
                .max(1)
                .min(total - first);
        layer
            .put(first as u64, memory.pages[first..end].as_flattened())
            .unwrap();
        next = end;
    }
    layer.finish().unwrap();
    memory.dirty.fill(false);
}

fn open_chain(dir: &Path, names: &[String]) -> Chain {
    Chain::new(names.iter().map(|name| common::open(dir, name)).collect()).unwrap()
}

/// The chain is the memory, asked in every way there is.
fn check(chain: &Chain, memory: &Memory) {
    let total = memory.pages.len() as u64;
    let runs: Vec<Run> = chain.runs(0, total + 9).collect();
    let mut next = 0;
    for run in &runs {
        assert_eq!(run.first_page, next);
        assert!(run.count > 0);
        next = run.end();
    }
    assert_eq!(next, total);
    let data: Vec<Run> = runs
        .iter()
        .copied()
        .filter(|run| run.source != Source::Zero)
        .collect();
    assert_eq!(data, chain.data_runs());
    for run in runs {
        // As a mapping would have it: one piece of one file.
        let mut mapped = vec![0; PAGE_SIZE * run.count as usize];
        if let Source::Data {
            layer,
            first_stored,
        } = run.source
        {
            use std::os::unix::fs::FileExt;
            let file = chain.layers()[layer].file();
            file.read_exact_at(&mut mapped, offset_of_stored(first_stored))
                .unwrap();
        }
        for (number, bytes) in (run.first_page..).zip(pages(&mapped)) {
            let own = &memory.pages[number as usize];
            assert!(bytes == own, "page {number} mapped");
            let mut read = [0xff; PAGE_SIZE];
            chain.read_page(number, &mut read).unwrap();
            assert!(read == *own, "page {number} read");
            assert_eq!(
                chain.hash_of(number).unwrap().is_none(),
                *own == ZEROS,
                "page {number}"
            );
        }
    }
    assert_eq!(chain.lookup(total), Source::Zero);
}

/// No page is stored that is zero or the parent's.
fn check_is_least(dir: &Path, name: &str, parent: Option<&Chain>) {
    let layer: Layer = common::open(dir, name);
    for extent in layer.extents() {
        for number in extent.first_page..extent.end() {
            let (mut own, mut before) = (ZEROS, ZEROS);
            assert!(layer.read_page(number, &mut own).unwrap());
            if let Some(parent) = parent {
                parent.read_page(number, &mut before).unwrap();
            }
            assert!(own != before, "page {number} is the parent's");
        }
    }
}

fn run(seed: u64) {
    let mut random = Random(seed);
    let dir = tempfile::tempdir().unwrap();
    // More than a block of hashes, in most runs.
    let mut memory = Memory::new(1 + random.below(700));
    let mut names = Vec::new();
    let mut past = Vec::new();
    let mut parent: Option<Chain> = None;
    for depth in 0..DEPTH {
        memory.write_some(&mut random);
        let name = format!("{depth}.layer");
        take_layer(dir.path(), &name, &mut memory, parent.as_ref(), &mut random);
        check_is_least(dir.path(), &name, parent.as_ref());
        names.push(name);
        let chain = open_chain(dir.path(), &names);
        check(&chain, &memory);
        past.push(memory.clone());
        parent = Some(chain);
    }
    parent.unwrap().verify().unwrap();
    for _ in 0..6 {
        check_operations(dir.path(), &names, &past, &mut random);
    }
}

/// Two snapshots of one lineage, or of none in common: compared, flattened, and the one rebased onto the other.
fn check_operations(dir: &Path, names: &[String], past: &[Memory], random: &mut Random) {
    let (one, other) = (random.below(DEPTH), random.below(DEPTH));
    let chain = open_chain(dir, &names[..=one]);
    let mut parent = open_chain(dir, &names[..=other]);
    let differ: Vec<u64> = (0..chain.total_pages())
        .filter(|&number| past[one].pages[number as usize] != past[other].pages[number as usize])
        .collect();
    let ranges = ops::diff(&chain, &parent).unwrap();
    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
    assert_eq!(ranges.into_iter().flatten().collect::<Vec<_>>(), differ);

    let (file, path) = common::create(dir, "flat.layer");
    ops::flatten(&parent, file, &path).unwrap();
    check_is_least(dir, "flat.layer", None);
    let flat = open_chain(dir, &["flat.layer".to_owned()]);
    check(&flat, &past[other]);
    let mut below = names[..=other].to_vec();
    if random.below(2) == 0 {
        parent = flat;
        below = vec!["flat.layer".to_owned()];
    }
    let (file, path) = common::create(dir, "rebased.layer");
    ops::rebase(&chain, &parent, file, &path).unwrap();
    check_is_least(dir, "rebased.layer", Some(&parent));
    below.push("rebased.layer".to_owned());
    check(&open_chain(dir, &below), &past[one]);
}

#[test]
fn chains_agree_with_a_model_of_memory() {
    if let Ok(seed) = std::env::var("MODEL_SEED") {
        return run(seed.parse().unwrap());
    }
    for seed in 0..8 {
        let result = std::panic::catch_unwind(|| run(seed));
        assert!(
            result.is_ok(),
            "seed {seed} fails; MODEL_SEED={seed} runs it alone"
        );
    }
}

#[test]
fn an_index_of_ten_thousand_extents_is_merged_right() {
    let dir = tempfile::tempdir().unwrap();
    let total = 40_000;
    let mut memory = Memory::new(total);
    for number in (0..total).step_by(4) {
        memory.pages[number][0] = 1;
        memory.dirty[number] = true;
    }
    take_layer(dir.path(), "root.layer", &mut memory, None, &mut Random(0));
    let path = dir.path().join("root.layer");
    let start = std::time::Instant::now();
    let layer = Layer::open(File::open(&path).unwrap(), &path).unwrap();
    println!(
        "opened {} extents in {:?}",
        layer.extents().len(),
        start.elapsed()
    );
    assert_eq!(layer.extents().len(), 10_000);
    let start = std::time::Instant::now();
    let root = Chain::new(vec![layer]).unwrap();
    println!("merged in {:?}", start.elapsed());
    for number in (0..total).step_by(6) {
        memory.pages[number] = ZEROS;
        memory.dirty[number] = true;
    }
    take_layer(
        dir.path(),
        "child.layer",
        &mut memory,
        Some(&root),
        &mut Random(0),
    );
    let chain = open_chain(dir.path(), &["root.layer".into(), "child.layer".into()]);
    assert!(chain.data_runs().len() < 10_000);
    for number in 0..total as u64 {
        let zero = memory.pages[number as usize] == ZEROS;
        assert_eq!(chain.lookup(number) == Source::Zero, zero, "page {number}");
    }
}

#[test]
fn a_stored_page_of_zeros_is_as_one_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    for (name, stored) in [("none.layer", &[][..]), ("zeros.layer", &[3, 4])] {
        let (file, path) = common::create(dir.path(), name);
        let mut layer = LayerWriter::new(file, &path, 8).unwrap();
        for &page in stored {
            layer.data(page, &ZEROS).unwrap();
        }
        layer.finish().unwrap();
    }
    let [none, zeros] =
        ["none.layer", "zeros.layer"].map(|name| open_chain(dir.path(), &[name.to_owned()]));
    assert_eq!(zeros.layers()[0].data_pages(), 2);
    assert_eq!(ops::diff(&none, &zeros).unwrap(), []);
    assert_eq!(ops::diff(&zeros, &none).unwrap(), []);
    let (file, path) = common::create(dir.path(), "flat.layer");
    assert_eq!(ops::flatten(&zeros, file, &path).unwrap().0.data_pages, 0);
}
