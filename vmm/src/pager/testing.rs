//! Chains of layers for tests of the pager, and touching guest memory.

use std::sync::Arc;

use snapshot_fmt::chain::Chain;
use snapshot_fmt::delta::DeltaWriter;
use snapshot_fmt::layer::Layer;
use snapshot_fmt::{PAGE_SIZE, Page};
use tempfile::NamedTempFile;
use vm_memory::Bytes;

use super::{Ahead, Mode, Pager, Pages};
use crate::exit::ExitLatch;
use crate::memory::{self, GuestMemory};

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, usize::try_from(self.below(end as u64 + 1)).unwrap());
        }
    }
}

/// A page that is like no other; number 0 is zeros.
pub fn content(number: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut random = Random(number);
    if number != 0 {
        for word in page.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_ne_bytes());
        }
    }
    page
}

/// A layer over `parent` in which memory is `contents`, by their numbers.
pub fn layer(contents: &[u64], parent: Option<&Chain>) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let total = contents.len() as u64;
    let own = file.reopen().unwrap();
    let mut writer = DeltaWriter::new(own, file.path(), total, parent).unwrap();
    for (page, &number) in (0..).zip(contents) {
        writer.put(page, &content(number)).unwrap();
    }
    writer.finish().unwrap();
    file
}

/// The chain of `files`, the root first.
pub fn chain<'a>(files: impl IntoIterator<Item = &'a NamedTempFile>) -> Arc<Chain> {
    let open = |file: &NamedTempFile| -> Layer {
        Layer::open(file.reopen().unwrap(), file.path()).unwrap()
    };
    Arc::new(Chain::new(files.into_iter().map(open).collect()).unwrap())
}

/// Guest memory of `pages` pages, with a hole behind the first third.
pub fn guest(pages: u64) -> Arc<GuestMemory> {
    let low = pages / 3;
    let ranges = [(0, low << 12), (1 << 32, (pages - low) << 12)];
    let ranges: Vec<_> = ranges.into_iter().filter(|(_, len)| *len > 0).collect();
    Arc::new(memory::create(&ranges).unwrap())
}

/// A pager of `chain` over new memory.
pub struct Restored {
    pub memory: Arc<GuestMemory>,
    pub pager: Pager,
    pub exit: ExitLatch,
}

pub fn restore(chain: &Arc<Chain>, mode: Mode, working_set: Vec<u64>) -> Restored {
    restore_over(None, chain, mode, working_set)
}

/// The same, where `ahead` was laid over memory before.
pub fn restore_over(
    ahead: Option<Arc<Chain>>,
    chain: &Arc<Chain>,
    mode: Mode,
    working_set: Vec<u64>,
) -> Restored {
    let memory = guest(chain.total_pages());
    let ahead = ahead.map(|ahead| Ahead::lay(Arc::into_inner(ahead).unwrap(), &memory).unwrap());
    let exit = ExitLatch::new().unwrap();
    let pages = Pages {
        chain: Arc::clone(chain),
        mode,
        working_set,
    };
    let pager = Pager::start_with(ahead, pages, &memory, &exit).unwrap();
    pager.guest_starts().unwrap();
    Restored {
        memory,
        pager,
        exit,
    }
}

/// What the guest finds at `page`.
pub fn read(memory: &GuestMemory, page: u64) -> Page {
    let (_, slice) = memory::pages(memory, page, 1).next().unwrap();
    let mut bytes = [0; PAGE_SIZE];
    slice.read_slice(&mut bytes, 0).unwrap();
    bytes
}

/// The first byte of `page`.
pub fn touch(memory: &GuestMemory, page: u64) -> u8 {
    let (_, slice) = memory::pages(memory, page, 1).next().unwrap();
    slice.read_obj(0).unwrap()
}

/// The guest writes to `page`.
pub fn write(memory: &GuestMemory, page: u64, content: &Page) {
    let (_, slice) = memory::pages(memory, page, 1).next().unwrap();
    slice.write_slice(content, 0).unwrap();
}
