//! Layers that processes hand to each other in memory: right without hashes, and no part of a snapshot.
#![allow(missing_docs)]

mod common;

use std::path::Path;

use common::{TOTAL_PAGES, page, write_root};
use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::delta::DeltaWriter;
use snapshot_fmt::digest::PageHash;
use snapshot_fmt::layer::Layer;
use snapshot_fmt::{PAGE_SIZE, Page};

const ZERO_PAGE: Page = [0; PAGE_SIZE];

#[test]
fn a_layer_in_memory_has_all_that_was_put_and_is_none_of_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    write_root(dir.path());
    let root_path = dir.path().join("memory.layer");
    let root = || Layer::open(std::fs::File::open(&root_path).unwrap(), &root_path).unwrap();
    let below = Chain::new(vec![root()]).unwrap();

    let file = tempfile::tempfile().unwrap();
    let path = Path::new("in memory");
    let own = file.try_clone().unwrap();
    let mut layer = DeltaWriter::new(own, path, TOTAL_PAGES, Some(&below)).unwrap();
    layer.in_memory();
    // As the root has it; zeros over something, and over nothing; others.
    layer.put(0, &page(1)).unwrap();
    layer.put(1, &ZERO_PAGE).unwrap();
    layer.put(500, &ZERO_PAGE).unwrap();
    layer.put(700, [page(7), page(8)].as_flattened()).unwrap();
    let (summary, file) = layer.finish().unwrap();
    assert_eq!((summary.data_pages, summary.zero_pages), (3, 1));
    assert_eq!(summary.bytes, file.metadata().unwrap().len());

    let refused = Layer::open(file.try_clone().unwrap(), path).unwrap_err();
    assert!(refused.to_string().contains("in memory"), "{refused}");
    let layer = Layer::open_handed(file.try_clone().unwrap(), path).unwrap();
    assert_eq!(layer.digest(), summary.digest);
    assert_eq!(layer.hash_of(1).unwrap(), PageHash::of(&page(7)));
    layer.verify().unwrap();
    // One with hashes is as good.
    let handed = Layer::open_handed(std::fs::File::open(&root_path).unwrap(), &root_path);
    let chain = Chain::new(vec![handed.unwrap(), layer]).unwrap();
    for (number, expected) in [
        (0, page(1)),
        (1, ZERO_PAGE),
        (2, page(3)),
        (500, ZERO_PAGE),
        (700, page(7)),
        (701, page(8)),
        (1023, page(4)),
    ] {
        let mut bytes = [0; PAGE_SIZE];
        chain.read_page(number, &mut bytes).unwrap();
        assert!(bytes == expected, "page {number}");
    }
    // What comes on top: the zeros hide, and are said.
    let upper = chain.runs_of(1..2);
    let zeros: Vec<_> = upper
        .iter()
        .filter(|run| run.source == Source::Zero)
        .map(|run| (run.first_page, run.count))
        .collect();
    assert_eq!((zeros, upper.len()), (vec![(1, 1)], 3));

    let bytes = summary.bytes;
    file.set_len(bytes - 1).unwrap();
    assert!(Layer::open_handed(file, path).is_err());
}
