//! Both ways give the pages of the chain, whoever touches them, whenever; and what happens where one cannot be had.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use snapshot_fmt::chain::Chain;
use snapshot_fmt::layer::{Layer, offset_of_stored};
use tempfile::NamedTempFile;

use super::testing::{
    Random, Restored, chain, content, guest, layer, read, restore, restore_over, touch, write,
};
use super::{Mode, OwnPages, PagerError, Pages, own_pages};
use crate::exit::{ExitLatch, ExitReason};
use crate::snapshot::memory_layer::{FrozenMemory, Lineage};
use crate::sys::fork::Child;

const LONG: Duration = Duration::from_secs(20);
/// How long one waits for what must not happen.
const SHORT: Duration = Duration::from_millis(100);

/// A chain of random depth, and what memory is with it.
fn random_chain(random: &mut Random) -> (Vec<NamedTempFile>, Vec<u64>) {
    let total = 1 + random.below(3000);
    let mut contents = vec![0; usize::try_from(total).unwrap()];
    let mut files: Vec<NamedTempFile> = Vec::new();
    for _ in 0..=random.below(16) {
        for _ in 0..random.below(8) {
            let first = random.below(total);
            let count = 1 + random.below((total - first).min(60));
            let zero = random.below(3) == 0;
            for page in first..first + count {
                let number = if zero { 0 } else { 1 + random.below(1 << 20) };
                contents[usize::try_from(page).unwrap()] = number;
            }
        }
        let parent = (!files.is_empty()).then(|| chain(&files));
        files.push(layer(&contents, parent.as_deref()));
    }
    (files, contents)
}

/// Threads touch all of memory in orders of their own, and write to some of it.
fn agrees_with_model(seed: u64, mode: Mode) {
    const THREADS: u64 = 3;
    let mut random = Random(seed);
    let (files, contents) = random_chain(&mut random);
    let total = contents.len() as u64;
    let working_set = (0..random.below(total + 1)).map(|_| random.below(total));
    let working_set = working_set.collect();
    // Some of its layers may lie there already, or others.
    let others = layer(&vec![9; contents.len()], None);
    let ahead = match random.below(4) {
        0 => None,
        1 => Some(chain([&others])),
        2 => Some(chain(files.iter().chain([&others]))),
        _ => Some(chain(
            &files[..=usize::try_from(random.below(files.len() as u64)).unwrap()],
        )),
    };
    let restored = restore_over(ahead, &chain(&files), mode, working_set);
    let memory = &restored.memory;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let mut random = Random(random.next());
            let contents = &contents;
            scope.spawn(move || {
                let mut pages: Vec<u64> = (0..total).collect();
                random.shuffle(&mut pages);
                for page in pages {
                    let number = contents[usize::try_from(page).unwrap()];
                    if page % 8 == thread {
                        // Nobody else looks at this one.
                        let new = content(random.next());
                        if random.below(2) == 0 {
                            assert!(read(memory, page) == content(number), "page {page}");
                        }
                        write(memory, page, &new);
                        assert!(read(memory, page) == new, "page {page} written");
                    } else if page % 8 >= THREADS {
                        assert!(read(memory, page) == content(number), "page {page}");
                    }
                }
            });
        }
    });
    assert_eq!(restored.exit.get(), None);
}

#[test]
fn both_ways_agree_with_a_model_of_memory() {
    if let Ok(seed) = std::env::var("MODEL_SEED") {
        let seed = seed.parse().unwrap();
        agrees_with_model(seed, Mode::Map);
        return agrees_with_model(seed, Mode::Fault);
    }
    for seed in 0..12 {
        for mode in [Mode::Map, Mode::Fault] {
            let result = std::panic::catch_unwind(|| agrees_with_model(seed, mode));
            assert!(
                result.is_ok(),
                "seed {seed} fails by {mode:?}; MODEL_SEED={seed} runs it alone"
            );
        }
    }
}

#[test]
fn zeros_far_from_data_need_no_pager_and_near_ones_come_in_windows() {
    let mut contents = vec![0; 4096];
    contents[1000] = 1;
    contents[1300] = 2;
    contents[4000] = 3;
    let restored = restore(&chain([&layer(&contents, None)]), Mode::Fault, Vec::new());
    let pages: Vec<u64> = (0..4096).collect();
    for &page in &pages {
        let number = contents[usize::try_from(page).unwrap()];
        assert!(read(&restored.memory, page) == content(number));
    }
    let stats = restored.pager.stats();
    // From page 1000 to 1300: windows of 64 pages, the ends of two cut off by data.
    assert_eq!((stats.data_faults, stats.zero_faults), (3, 6));
    assert!(stats.serving > Duration::ZERO);
}

#[test]
fn a_page_that_many_want_at_once_comes_once() {
    let contents: Vec<u64> = (1..=200).collect();
    let restored = restore(&chain([&layer(&contents, None)]), Mode::Fault, Vec::new());
    let memory = &restored.memory;
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for page in 0..200 {
                    assert!(read(memory, page) == content(page + 1));
                }
            });
        }
    });
    assert_eq!(restored.pager.stats().data_faults, 200);
    assert_eq!(restored.pager.working_set().len(), 200);
}

#[test]
fn the_working_set_is_what_was_wanted_first_and_saves_most_faults() {
    let contents: Vec<u64> = (1..=4000).collect();
    let file = layer(&contents, None);
    let chain = chain([&file]);
    let mut pages: Vec<u64> = (0..4000).collect();
    Random(1).shuffle(&mut pages);
    pages.truncate(2000);
    let first = restore(&chain, Mode::Fault, Vec::new());
    for &page in &pages {
        touch(&first.memory, page);
    }
    assert!(first.pager.working_set() == pages);

    // A machine takes as long to be made; and no more may be left for faults.
    let second = restore(&chain, Mode::Fault, pages.clone());
    let deadline = Instant::now() + LONG;
    while second.pager.stats().pages_ahead < 1800 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    for &page in &pages {
        assert!(read(&second.memory, page) == content(page + 1));
    }
    let stats = second.pager.stats();
    assert!(stats.data_faults <= 200, "{stats:?}");
    assert!(stats.data_faults + stats.pages_ahead >= 2000, "{stats:?}");
    assert!(
        stats.pages_ahead <= 2000,
        "more than was asked for: {stats:?}"
    );
}

#[test]
fn a_pager_stops_while_pages_are_arriving() {
    let contents: Vec<u64> = (1..=4000).collect();
    let chain = chain([&layer(&contents, None)]);
    for mode in [Mode::Map, Mode::Fault] {
        for count in [0, 1, 4000] {
            let restored = restore(&chain, mode, (0..count).collect());
            touch(&restored.memory, 3999);
            drop(restored);
        }
    }
}

#[test]
fn a_working_set_is_read_where_memory_is_mapped() {
    let file = layer(&(1..=900).collect::<Vec<_>>(), None);
    let chain = chain([&file]);
    let restored = restore(&chain, Mode::Map, (100..300).rev().collect());
    assert!((0..900).all(|page| read(&restored.memory, page) == content(page + 1)));
    assert!(restored.pager.working_set().is_empty());
    let deadline = Instant::now() + LONG;
    while restored.pager.stats().replay == Duration::ZERO {
        assert!(Instant::now() < deadline, "nothing is read");
        std::thread::yield_now();
    }
}

#[test]
fn what_is_a_guests_own_is_told_by_what_it_was() {
    let contents = [0, 1, 2, 3, 0, 0, 4, 0];
    let files = [layer(&contents, None)];
    let chain = chain(&files);
    let restored = restore(&chain, Mode::Map, Vec::new());
    let own = || own_pages(&restored.memory, Some(&chain)).unwrap();
    assert_eq!(own(), OwnPages::default());
    for page in [2, 3, 4, 7] {
        touch(&restored.memory, page - 1);
        write(&restored.memory, page, &content(9));
    }
    let (copied, zeros) = (2, 2);
    assert_eq!(own(), OwnPages { copied, zeros });
    let (copied, zeros) = (0, 4);
    let of_zeros = own_pages(&restored.memory, None).unwrap();
    assert_eq!(of_zeros, OwnPages { copied, zeros });
    restored.pager.rewind(&restored.memory).unwrap();
    assert_eq!(own(), OwnPages::default());
}

/// A layer of `pages` pages, the stored page `bad` of which is another than its hash says.
fn damaged(pages: u64, bad: u64) -> NamedTempFile {
    let file = layer(&(1..=pages).collect::<Vec<_>>(), None);
    let damaged = file.as_file();
    let at = offset_of_stored(bad) + 77;
    let mut byte = [0];
    damaged.read_exact_at(&mut byte, at).unwrap();
    damaged.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file
}

/// Touches `page` in a thread that nobody waits for: what it finds comes by the channel.
fn touch_in_thread(memory: &Arc<super::GuestMemory>, page: u64) -> Receiver<u8> {
    let (tell, found) = channel();
    let memory = Arc::clone(memory);
    std::thread::spawn(move || tell.send(touch(&memory, page)));
    found
}

fn wait_for_reason(exit: &ExitLatch) -> String {
    let deadline = Instant::now() + LONG;
    loop {
        match exit.get() {
            Some(ExitReason::Monitor(why)) => return why,
            Some(other) => panic!("{other}"),
            None => assert!(Instant::now() < deadline, "no failure is seen"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// `page` of `file`, which is damaged, ends the VM, and nobody ever sees it.
fn ends_the_vm(file: &NamedTempFile, layer: Layer, page: u64, others: impl Iterator<Item = u64>) {
    let chain = Arc::new(Chain::new(vec![layer]).unwrap());
    let restored = restore(&chain, Mode::Fault, vec![0, page, 2]);
    let found = touch_in_thread(&restored.memory, page);
    let again = touch_in_thread(&restored.memory, page);
    let why = wait_for_reason(&restored.exit);
    let name = file.path().to_str().unwrap();
    assert!(
        why.contains(name) && why.contains(&format!("page {page} ")),
        "{why}"
    );
    assert!(restored.pager.has_failed());
    for other in others {
        assert!(read(&restored.memory, other) == content(other + 1));
    }
    // It comes back, though somebody waits, who goes on waiting.
    drop(restored.pager);
    assert!(found.recv_timeout(SHORT).is_err());
    assert!(again.recv_timeout(SHORT).is_err());
}

#[test]
fn a_corrupt_page_ends_the_vm_and_is_never_seen() {
    let file = damaged(300, 7);
    let layer = Layer::open(file.reopen().unwrap(), file.path()).unwrap();
    ends_the_vm(&file, layer, 7, (0..300).filter(|page| *page != 7));
}

#[test]
fn a_layer_that_is_cut_short_ends_the_vm() {
    let file = layer(&(1..=300).collect::<Vec<_>>(), None);
    let layer = Layer::open(file.reopen().unwrap(), file.path()).unwrap();
    // The index was there when it was opened. Hashes of a page are there, or its bytes, or neither.
    file.as_file().set_len(offset_of_stored(100)).unwrap();
    ends_the_vm(&file, layer, 250, std::iter::empty());
}

/// Memory that is mapped from a layer of 300 pages, which then loses those from page 100 on.
fn cut_short() -> (NamedTempFile, Restored) {
    let file = layer(&(1..=300).collect::<Vec<_>>(), None);
    let restored = restore(&chain([&file]), Mode::Map, Vec::new());
    // The guest's own copy goes as well.
    write(&restored.memory, 270, &content(9));
    file.as_file().set_len(offset_of_stored(100)).unwrap();
    (file, restored)
}

fn names(why: &str, file: &NamedTempFile, page: u64) {
    let name = file.path().to_str().unwrap();
    assert!(
        why.contains(name) && why.contains(&format!("page {page} ")),
        "{why}"
    );
}

#[test]
fn a_mapped_page_that_is_gone_ends_the_vm_and_whoever_touches_it_waits() {
    let (file, restored) = cut_short();
    let found = touch_in_thread(&restored.memory, 270);
    names(&wait_for_reason(&restored.exit), &file, 270);
    assert!(restored.pager.has_failed());
    assert!(rustix::io::read(restored.exit.event(), &mut [0; 8]).is_ok());
    assert!(read(&restored.memory, 99) == content(100));
    drop(restored.pager);
    let again = touch_in_thread(&restored.memory, 100);
    assert!(again.recv_timeout(SHORT).is_err());
    assert!(found.recv_timeout(SHORT).is_err());
}

#[test]
fn a_system_call_that_meets_a_page_that_is_gone_is_not_answered() {
    let (file, restored) = cut_short();
    let (tell, answered) = channel();
    let memory = Arc::clone(&restored.memory);
    std::thread::spawn(move || {
        let disk = tempfile::tempfile().unwrap();
        let (_, slice) = crate::memory::pages(&memory, 150, 1).next().unwrap();
        tell.send(crate::sys::vectored::write_at(&disk, &[slice], 0))
    });
    names(&wait_for_reason(&restored.exit), &file, 150);
    assert!(answered.recv_timeout(SHORT).is_err());
}

#[test]
fn an_end_behind_which_a_page_is_gone_says_so() {
    let died = || ExitReason::VcpuDied {
        vcpu: 0,
        why: "KVM_RUN failed".to_owned(),
    };
    let (file, restored) = cut_short();
    restored.exit.set(died());
    names(&wait_for_reason(&restored.exit), &file, 100);
    names(&restored.pager.check().unwrap_err().to_string(), &file, 100);
    // Nobody waits for it.
    assert!(!restored.pager.has_failed());

    let (_file, restored) = cut_short();
    restored.exit.set(ExitReason::Stopped);
    assert_eq!(restored.exit.get(), Some(ExitReason::Stopped));

    let whole = layer(&[1, 2, 3], None);
    let restored = restore(&chain([&whole]), Mode::Map, Vec::new());
    restored.exit.set(died());
    assert_eq!(restored.exit.get(), Some(died()));
    assert!(restored.pager.check().is_ok());
}

#[test]
fn a_machine_that_was_to_be_made_with_a_page_that_is_gone_never_runs() {
    let file = layer(&(1..=300).collect::<Vec<_>>(), None);
    let chain = chain([&file]);
    let memory = guest(300);
    let exit = ExitLatch::new().unwrap();
    let pages = Pages {
        chain,
        mode: Mode::Map,
        working_set: Vec::new(),
    };
    let pager = super::Pager::start(pages, &memory, &exit).unwrap();
    file.as_file().set_len(offset_of_stored(100)).unwrap();
    // Whoever makes the machine is not held up.
    assert!(read(&memory, 200) == content(0));
    names(&pager.guest_starts().unwrap_err().to_string(), &file, 200);
}

#[test]
fn a_child_that_meets_a_page_that_is_gone_dies() {
    let (_file, restored) = cut_short();
    let (_, slice) = crate::memory::pages(&restored.memory, 200, 1)
        .next()
        .unwrap();
    let child = Child::fork(&[], |frozen| frozen.bytes(&slice)[0]).unwrap();
    assert_eq!(child.wait().unwrap(), None);
    assert_eq!(restored.exit.get(), None);
}

#[test]
fn a_machine_that_was_to_be_made_with_a_corrupt_page_never_runs() {
    let file = damaged(300, 7);
    let pages = Pages {
        chain: chain([&file]),
        mode: Mode::Fault,
        working_set: Vec::new(),
    };
    let memory = guest(300);
    let exit = ExitLatch::new().unwrap();
    let pager = super::Pager::start(pages, &memory, &exit).unwrap();
    // Whoever makes the machine is not held up.
    touch(&memory, 7);
    assert!(read(&memory, 8) == content(9));
    let why = pager.guest_starts().unwrap_err().to_string();
    assert!(
        why.contains(file.path().to_str().unwrap()) && why.contains("page 7 "),
        "{why}"
    );
    assert!(!pager.has_failed() && exit.get().is_none());
}

#[test]
fn the_end_of_the_thread_ends_the_vm() {
    let chain = chain([&layer(&[1, 2, 3], None)]);
    let memory = guest(3);
    let exit = ExitLatch::new().unwrap();
    let pages = Pages {
        chain,
        mode: Mode::Fault,
        working_set: Vec::new(),
    };
    let pager = super::Pager::start(pages, &memory, &exit).unwrap();
    let super::Way::Faults(faults) = &pager.way else {
        panic!("another way");
    };
    let server = Arc::clone(&faults.server);
    // As a panic of the thread would.
    let thread = std::thread::spawn(move || {
        let _guard = super::server::Guard(&server);
        panic!("on purpose");
    });
    assert!(thread.join().is_err());
    assert!(wait_for_reason(&exit).contains("has ended"));
    assert!(pager.has_failed());
}

#[test]
fn pages_that_have_not_arrived_are_not_saved() {
    let contents: Vec<u64> = (1..=600).collect();
    let root = layer(&contents, None);
    let parent = chain([&root]);
    let working_set = (300..400).collect();
    let restored = restore(&parent, Mode::Fault, working_set);
    let memory = &restored.memory;
    for page in 0..50 {
        touch(memory, page);
    }
    write(memory, 20, &content(1000));
    write(memory, 500, &content(0));
    write(memory, 501, &content(502));
    let before = restored.pager.stats();
    let file = NamedTempFile::new().unwrap();
    let lineage = Lineage::over_origin(Some(&parent));
    let saved = FrozenMemory::take(memory, file.as_file(), file.path(), lineage).unwrap();
    // It is of the moment it was begun, while pages go on arriving.
    write(memory, 30, &content(2000));
    touch(memory, 450);
    let (summary, _writer) = saved.write().finish(|| false).unwrap();
    assert_eq!((summary.data_pages, summary.zero_pages), (1, 1));
    // The child has had nothing brought.
    let after = restored.pager.stats();
    assert_eq!(after.data_faults, before.data_faults + 1);

    let again = restore(&chain([&root, &file]), Mode::Fault, Vec::new());
    for (page, number) in (0..).zip(contents) {
        let number = match page {
            20 => 1000,
            500 => 0,
            _ => number,
        };
        assert!(read(&again.memory, page) == content(number), "page {page}");
    }
}

#[test]
fn memory_of_another_size_is_refused() {
    let chain = chain([&layer(&[1, 2, 3], None)]);
    let pages = Pages {
        chain,
        mode: Mode::Fault,
        working_set: Vec::new(),
    };
    let exit = ExitLatch::new().unwrap();
    let refused = super::Pager::start(pages, &guest(4), &exit);
    assert!(matches!(
        refused.err(),
        Some(PagerError::Size {
            saved: 3,
            machine: 4
        })
    ));
}
