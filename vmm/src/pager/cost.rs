//! What a fault costs, measured. With a release build, on a quiet machine:
//! `cargo test --release -p vmm --lib pager::cost -- --ignored --nocapture`.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::layer::offset_of_stored;

use super::Mode;
use super::testing::{Random, chain, layer, restore, touch};

/// Pages of memory, all of them stored.
const PAGES: u64 = 8000;

/// The median and the slow ones of `times`, in microseconds.
fn median(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
    format!("p50 {:.1} us, p90 {:.1}, p99 {:.1}", at(50), at(90), at(99))
}

/// Spins: who sleeps gives its processor away.
fn work_for(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn shuffled() -> Vec<u64> {
    let mut pages: Vec<u64> = (0..PAGES).collect();
    Random(1).shuffle(&mut pages);
    pages
}

#[test]
#[ignore = "a measurement"]
fn of_a_fault() {
    let file = layer(&(1..=PAGES).collect::<Vec<_>>(), None);
    let chain = chain([&file]);
    let pages = shuffled();
    let timed = |work: &mut dyn FnMut(u64)| {
        let time = |&page: &u64| {
            let start = Instant::now();
            work(page);
            start.elapsed()
        };
        median(pages.iter().map(time).collect())
    };
    let mut bytes = [0; PAGE_SIZE];
    let layer = &chain.layers()[0];
    let read_and_hash = timed(&mut |page| chain.read_page(page, &mut bytes).unwrap());
    println!("read and hash: {read_and_hash}");
    let read = timed(&mut |page| {
        let at = offset_of_stored(page);
        layer.file().read_exact_at(&mut bytes, at).unwrap();
    });
    println!("of that, read: {read}");
    for mode in [Mode::Fault, Mode::Map] {
        for gap in [0, 20, 100, 2000] {
            let restored = restore(&chain, mode, Vec::new());
            let count = if gap > 1000 { 1000 } else { pages.len() };
            let time = |&page: &u64| {
                work_for(Duration::from_micros(gap));
                let start = Instant::now();
                touch(&restored.memory, page);
                start.elapsed()
            };
            let times = median(pages[..count].iter().map(time).collect());
            let stats = restored.pager.stats();
            let faults = u32::try_from(stats.data_faults).unwrap().max(1);
            let serving = stats.serving / faults;
            println!(
                "{mode:?}, {gap} us apart: {times}; from reading the fault on, mean: {serving:?}"
            );
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn of_a_working_set() {
    let file = layer(&(1..=PAGES).collect::<Vec<_>>(), None);
    let chain = chain([&file]);
    // Half of memory, in runs of a few pages.
    let mut pages = shuffled();
    pages.sort_by_key(|page| Random(page / 4).next());
    pages.truncate(pages.len() / 2);
    let restored = restore(&chain, Mode::Fault, pages.clone());
    while restored.pager.stats().pages_ahead < PAGES / 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let each = restored.pager.stats().replay / u32::try_from(pages.len()).unwrap();
    println!("nobody asks: {each:?} a page");
    for (head_start, work) in [(0, 0), (5, 0), (0, 10), (5, 10), (0, 30)] {
        for set in [Vec::new(), pages.clone()] {
            let how = if set.is_empty() { "alone" } else { "replayed" };
            let restored = restore(&chain, Mode::Fault, set);
            std::thread::sleep(Duration::from_millis(head_start));
            let start = Instant::now();
            for &page in &pages {
                touch(&restored.memory, page);
                work_for(Duration::from_micros(work));
            }
            let worked = Duration::from_micros(work * PAGES / 2);
            let waited = start.elapsed().saturating_sub(worked);
            let faults = restored.pager.stats().data_faults;
            println!(
                "{head_start} ms ahead, {work} us of work a page, {how}: {waited:?} waited, {faults} faults"
            );
        }
    }
}
