//! Memory by faults: a thread brings each missing page when it is touched, out of the chain and checked.
//!
//! Invariant: a guest that runs gets a page with the content that the chain has for it, or not at all. Where it cannot be had, whoever touched
//! it goes on waiting until the process ends: the VM's end is written to its latch, the other pages are served on, so that whoever needs
//! none of the lost ones can stop, and the userfaultfd is never closed, since that would let the waiting go on with zeros.
//!
//! Before the guest runs, who waits is KVM, in the thread that makes the machine, where nobody watches the latch yet: that
//! one gets zeros, and learns that the machine must not run.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::error::FormatError;
use snapshot_fmt::{PAGE_BYTES, PAGE_SIZE, Page};
use thiserror::Error;

use super::PagerStats;
use super::replay::Progress;
use super::space::{Space, area_of};
use crate::exit::{ExitLatch, ExitReason};
use crate::sys::userfaultfd::{Faults, Userfaultfd};

/// How long the thread looks for the next fault before it sleeps, where faults come in a streak: about what being woken costs.
const SPIN: Duration = Duration::from_micros(50);
/// Zeros that one fault brings, in pages: those of the aligned window that it lies in.
const ZERO_WINDOW: u64 = 64;
/// Most pages that are recorded: those of 1 GiB, in 1 MiB.
const RECORD_MAX: usize = 1 << 18;

/// Why a page cannot be had.
#[derive(Debug, Error)]
pub enum PageError {
    /// Its layer cannot be read, or is not believed.
    #[error("page {page} of the guest's memory cannot be had: {source}")]
    Layer {
        /// The page.
        page: u64,
        /// What is wrong, with the layer's name.
        source: FormatError,
    },
    /// The host's kernel does not take it.
    #[error("page {page} of the guest's memory cannot be put where it belongs: {errno}")]
    Place {
        /// The page.
        page: u64,
        /// What the system said.
        errno: Errno,
    },
    /// It was mapped, and the host's kernel has it no more, though its layer can be read.
    #[error(
        "page {page} of the guest's memory cannot be had: the host has lost it; look at the host's log for memory or disk errors"
    )]
    Gone {
        /// The page.
        page: u64,
    },
}

/// What a page gets.
#[derive(Clone, Copy)]
enum Content<'a> {
    Bytes(&'a [u8]),
    Zeros { count: u64 },
}

/// The faults that were served. Its lock is held while a page is put, so that whoever has its page finds it counted.
#[derive(Debug, Default)]
struct Tally {
    data_faults: u64,
    zero_faults: u64,
    /// Their pages, in their order. Pages have 32 bits: see `PAGES_MAX`.
    record: Vec<u32>,
}

/// How far the machine is.
#[derive(Debug)]
enum Stage {
    /// It is being made.
    Building,
    /// It must not run: a page is not what it should be.
    Unusable(PageError),
    /// Its guest runs.
    Running,
}

/// What serves the faults of one guest's memory, and what its threads share.
pub struct Server {
    chain: Arc<Chain>,
    space: Space,
    areas: Vec<Range<u64>>,
    uffd: Userfaultfd,
    exit: ExitLatch,
    wake: OwnedFd,
    stop: AtomicBool,
    stage: Mutex<Stage>,
    failed: AtomicBool,
    /// The thread that brings a working set has better use for a processor than looking for faults.
    replay: Progress,
    tally: Mutex<Tally>,
    /// Time in which faults were served.
    serving_ns: AtomicU64,
}

impl Server {
    /// Serves the pages of `chain` where they are in `space`. The `areas` are registered with `uffd`; `wake` is an eventfd.
    pub fn new(
        chain: Arc<Chain>,
        space: Space,
        areas: Vec<Range<u64>>,
        uffd: Userfaultfd,
        wake: OwnedFd,
        exit: ExitLatch,
    ) -> Self {
        Self {
            chain,
            space,
            areas,
            uffd,
            exit,
            wake,
            stop: AtomicBool::new(false),
            stage: Mutex::new(Stage::Building),
            failed: AtomicBool::new(false),
            replay: Progress::default(),
            tally: Mutex::default(),
            serving_ns: AtomicU64::new(0),
        }
    }

    /// The thread's work: until it is to stop. Its end for any other reason, even a panic, ends the VM.
    pub fn run(&self) {
        let _guard = Guard(self);
        if let Err(errno) = self.serve() {
            self.fail(format!("page faults cannot be read: {errno}"));
        }
    }

    /// From now on the guest runs, unless a page could not be had before that.
    pub fn guest_starts(&self) -> Result<(), PageError> {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *stage, Stage::Running) {
            Stage::Unusable(error) => Err(error),
            Stage::Building | Stage::Running => Ok(()),
        }
    }

    /// Has the threads end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.replay.stop();
        // It fails only where the counter is full, and then the thread wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Whether the threads are to end.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Whether somebody may wait for a page for ever.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The pages of the faults until now, in their order.
    pub fn record(&self) -> Vec<u64> {
        self.tally().record.iter().copied().map(u64::from).collect()
    }

    /// What was done until now.
    pub fn stats(&self) -> PagerStats {
        let tally = self.tally();
        PagerStats {
            data_faults: tally.data_faults,
            zero_faults: tally.zero_faults,
            serving: Duration::from_nanos(self.serving_ns.load(Ordering::Relaxed)),
            ..PagerStats::of_replay(&self.replay)
        }
    }

    /// How far the working set is brought.
    pub fn replay(&self) -> &Progress {
        &self.replay
    }

    /// The layers.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    fn fail(&self, why: String) {
        // First, so that whoever is told of the end does not wait for threads that cannot come.
        self.failed.store(true, Ordering::Release);
        self.exit.set(ExitReason::Monitor(why));
    }

    fn serve(&self) -> Result<(), Errno> {
        let mut faults = Faults::default();
        let mut bytes = [0; PAGE_SIZE];
        let mut lost = BTreeSet::new();
        let mut streak = false;
        while self.wait(&mut faults, &mut streak)? {
            let start = Instant::now();
            for page in faults.addresses().filter_map(|at| self.space.page_at(at)) {
                if lost.contains(&page) {
                    continue;
                }
                if let Err(error) = self.answer(page, &mut bytes) {
                    self.lose(page, error, &mut lost);
                }
            }
            let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.serving_ns.fetch_add(ns, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Ends the VM, or its making, for the sake of `page`.
    fn lose(&self, page: u64, error: PageError, lost: &mut BTreeSet<u64>) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*stage, Stage::Running)
            && self.place(page, Content::Zeros { count: 1 }).is_ok()
        {
            *stage = Stage::Unusable(error);
            return;
        }
        lost.insert(page);
        self.fail(error.to_string());
    }

    /// Waits for faults. False where the thread is to stop.
    fn wait(&self, faults: &mut Faults, streak: &mut bool) -> Result<bool, Errno> {
        let start = Instant::now();
        loop {
            if self.is_stopping() {
                return Ok(false);
            }
            match self.uffd.read(faults) {
                Ok(()) => break,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            let spin = *streak && !self.replay.is_running();
            if spin && start.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let mut fds = [
                PollFd::from_borrowed_fd(self.uffd.as_fd(), PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        *streak = start.elapsed() < SPIN;
        Ok(true)
    }

    /// Brings `page`, which somebody waits for.
    fn answer(&self, page: u64, bytes: &mut Page) -> Result<(), PageError> {
        let source = self.chain.lookup(page);
        if source != Source::Zero {
            self.chain
                .read_page(page, bytes)
                .map_err(|source| PageError::Layer { page, source })?;
        }
        let mut tally = self.tally();
        let (counter, placed) = match source {
            Source::Zero => (&mut tally.zero_faults, self.zero_around(page)?),
            Source::Data { .. } => (&mut tally.data_faults, self.place_bytes(page, bytes)?),
        };
        // Where another was quicker, the fault is not the first on its page.
        if placed > 0 {
            *counter += 1;
            if tally.record.len() < RECORD_MAX {
                tally.record.extend(u32::try_from(page));
            }
        }
        Ok(())
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the zeros around `page`, which is one, as far as nobody else has. Returns how many pages those are.
    pub fn zero_around(&self, page: u64) -> Result<u64, PageError> {
        let Some(area) = area_of(&self.areas, page) else {
            return Ok(0);
        };
        let window = page - page % ZERO_WINDOW;
        let runs = self.chain.runs(
            window.max(area.start),
            area.end.min(window.saturating_add(ZERO_WINDOW)),
        );
        for run in runs {
            if run.source == Source::Zero && (run.first_page..run.end()).contains(&page) {
                return self.place(run.first_page, Content::Zeros { count: run.count });
            }
        }
        Ok(0)
    }

    /// Puts whole pages, checked, at `first_page` and behind, as far as they are missing. Returns how many were.
    pub fn place_bytes(&self, first_page: u64, bytes: &[u8]) -> Result<u64, PageError> {
        self.place(first_page, Content::Bytes(bytes))
    }

    fn place(&self, first_page: u64, content: Content<'_>) -> Result<u64, PageError> {
        let count = match content {
            Content::Bytes(bytes) => bytes.len() as u64 / PAGE_BYTES,
            Content::Zeros { count } => count,
        };
        let mut placed = 0;
        for piece in self.space.pieces(first_page, first_page + count) {
            let mut done = 0;
            while done < piece.count {
                let (page, at) = (piece.first_page + done, piece.address + done * PAGE_BYTES);
                let put = match content {
                    Content::Zeros { .. } => self.uffd.zero(at, (piece.count - done) * PAGE_BYTES),
                    Content::Bytes(bytes) => {
                        let from = as_index(page - first_page);
                        let to = as_index(piece.first_page + piece.count - first_page);
                        self.uffd.copy(at, &bytes[from..to])
                    }
                };
                match put {
                    Ok(len) => {
                        done += len / PAGE_BYTES;
                        placed += len / PAGE_BYTES;
                    }
                    // Another thread was quicker. Who waits for the page may have been too late for its call.
                    Err(Errno::EXIST) => {
                        let _ = self.uffd.wake(at, PAGE_BYTES);
                        done += 1;
                    }
                    // The mappings are just being changed.
                    Err(Errno::AGAIN) if !self.is_stopping() => std::thread::yield_now(),
                    // The memory is unmapped, or the process ends: nobody waits any more.
                    Err(Errno::AGAIN | Errno::NOENT | Errno::SRCH) => return Ok(placed),
                    Err(errno) => return Err(PageError::Place { page, errno }),
                }
            }
        }
        Ok(placed)
    }
}

/// Says that the thread has ended where nobody wanted it to.
pub struct Guard<'a>(pub &'a Server);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !self.0.is_stopping() {
            self.0
                .fail("the thread that brings the guest's pages has ended".to_owned());
        }
    }
}

/// Where a page lies in a buffer of pages, in bytes.
#[expect(
    clippy::cast_possible_truncation,
    reason = "it is an index into a buffer"
)]
fn as_index(page: u64) -> usize {
    page as usize * PAGE_SIZE
}
