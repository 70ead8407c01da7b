//! Gives a restored guest its memory: the pages of a chain of layers, in one of two ways.
//!
//! By mapping: each run of pages is laid over guest memory, privately, straight from its layer's file. The host's kernel brings a page in when
//! it is touched, all restores of a snapshot share the page cache, and a page that is written becomes the guest's own. Nothing is checked on the way, but
//! a layer that is cut short ends the VM where that shows.
//!
//! By faults: guest memory stays anonymous, and a thread brings each page when it is touched (userfaultfd), checked. The order in which
//! pages are wanted is recorded on the way.
//!
//! A thread of its own brings such a record, the working set, ahead of the guest; where memory is mapped, into the host's page cache.
//!
//! What no layer has is anonymous memory, which is zero already. A chain of any depth comes down to the same merged runs.

mod ahead;
#[cfg(test)]
mod cost;
mod lost;
mod map;
mod replay;
mod server;
mod space;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use snapshot_fmt::chain::Chain;
use thiserror::Error;

pub use self::ahead::{Ahead, are_one};
pub use self::map::{OwnPages, clear, own_pages};

use self::lost::LostPages;
use self::replay::Progress;
use self::server::{PageError, Server};
use self::space::Space;
use crate::exit::ExitLatch;
use crate::memory::{self, GuestMemory};
use crate::sys::userfaultfd::Userfaultfd;

/// Stack of the pager's threads, in bytes.
const STACK_SIZE: usize = 128 << 10;

/// Why a guest cannot have its pages.
#[derive(Debug, Error)]
pub enum PagerError {
    /// The layers are of another machine.
    #[error(
        "the snapshot has {saved} pages of memory, the machine {machine}: the snapshot is damaged"
    )]
    Size {
        /// Pages of the chain.
        saved: u64,
        /// Pages of guest memory.
        machine: u64,
    },
    /// A run of pages cannot be mapped.
    #[error(
        "cannot map {count} pages of {path}: {source}; the host's limit is vm.max_map_count, and vmm snap flatten makes fewer runs"
    )]
    Map {
        /// The layer.
        path: PathBuf,
        /// How many pages.
        count: u64,
        /// What the system said.
        source: io::Error,
    },
    /// There is no userfaultfd to be had.
    #[error(
        "cannot bring memory by faults: no userfaultfd: {0}; see vmm doctor, or have memory mapped"
    )]
    NoUserfaultfd(io::Error),
    /// Guest memory cannot be watched.
    #[error("cannot watch {count} pages of guest memory for faults: {source}")]
    Register {
        /// How many pages.
        count: u64,
        /// What the system said.
        source: io::Error,
    },
    /// No eventfd, or no thread.
    #[error("cannot start the pager: {0}")]
    Start(io::Error),
    /// Memory that is brought by faults is not taken back.
    #[error(
        "its memory is brought by faults, and cannot be taken back in place: restore it with --pages map, or anew"
    )]
    RewindFaults,
    /// What was laid over memory ahead cannot be taken away.
    #[error("cannot make memory zeros again: {0}")]
    Clear(io::Error),
    /// Memory cannot be taken back.
    #[error("cannot put its pages back: {0}")]
    Rewind(io::Error),
    /// A page that the machine was to be made with cannot be had.
    #[error(transparent)]
    Page(#[from] PageError),
}

/// How pages come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They are mapped from their layers' files.
    Map,
    /// A thread brings and checks each.
    Fault,
}

/// Where memory comes from.
pub struct Pages {
    /// The layers.
    pub chain: Arc<Chain>,
    /// The way.
    pub mode: Mode,
    /// Pages that will be wanted first, in their order, as an earlier [`Pager::working_set`] said. It may be empty.
    pub working_set: Vec<u64>,
}

/// What was done, until now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PagerStats {
    /// Faults that brought a stored page.
    pub data_faults: u64,
    /// Faults that brought zeros.
    pub zero_faults: u64,
    /// Pages of the working set that were brought before anybody asked, by faults.
    pub pages_ahead: u64,
    /// Time in which faults were served, from when they were read to when their pages were there.
    pub serving: Duration,
    /// Time in which the working set was brought.
    pub replay: Duration,
}

impl PagerStats {
    fn of_replay(replay: &Progress) -> Self {
        Self {
            pages_ahead: replay.pages(),
            replay: replay.time(),
            ..Self::default()
        }
    }
}

/// What serves a guest's memory for as long as the guest lives.
pub struct Pager {
    chain: Arc<Chain>,
    way: Way,
}

enum Way {
    Mapped(MapPager),
    Faults(FaultPager),
}

impl Pager {
    /// Makes `memory`, which nobody has touched, that of the snapshot. A page that cannot be had later on is written to `exit`.
    pub fn start(pages: Pages, memory: &GuestMemory, exit: &ExitLatch) -> Result<Self, PagerError> {
        Self::start_with(None, pages, memory, exit)
    }

    /// The same, where some of it may lie there already.
    pub fn start_with(
        ahead: Option<Ahead>,
        pages: Pages,
        memory: &GuestMemory,
        exit: &ExitLatch,
    ) -> Result<Self, PagerError> {
        let Pages {
            chain,
            mode,
            working_set,
        } = pages;
        check_size(&chain, memory)?;
        let laid = ahead.map_or(Ok(0), |ahead| ahead.laid_of(&chain, mode, memory))?;
        let way = match mode {
            Mode::Map => Way::Mapped(MapPager::start(&chain, laid, working_set, memory, exit)?),
            Mode::Fault => Way::Faults(FaultPager::start(&chain, working_set, memory, exit)?),
        };
        Ok(Self { chain, way })
    }

    /// Says that the machine is made and its guest runs from now on, with somebody watching the latch. To be called before that.
    pub fn guest_starts(&self) -> Result<(), PagerError> {
        let started = match &self.way {
            Way::Mapped(pager) => pager.lost.guest_starts(),
            Way::Faults(pager) => pager.server.guest_starts(),
        };
        Ok(started?)
    }

    /// Whether memory can be taken back to what it was at first.
    pub fn can_rewind(&self) -> Result<(), PagerError> {
        match &self.way {
            Way::Mapped(_) => Ok(()),
            Way::Faults(_) => Err(PagerError::RewindFaults),
        }
    }

    /// Makes `memory`, which is the one that it serves, what it was at first. Nobody touches that meanwhile. Returns how many pages had been written to.
    pub fn rewind(&self, memory: &GuestMemory) -> Result<u64, PagerError> {
        self.can_rewind()?;
        map::drop_copies(memory).map_err(PagerError::Rewind)
    }

    /// The layers that memory comes from.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The pages that were wanted until now and had not been brought ahead, in the order in which they were. Empty where memory is mapped:
    /// there it can be used, not made.
    pub fn working_set(&self) -> Vec<u64> {
        self.server().map_or_else(Vec::new, Server::record)
    }

    /// What was done. Where memory is mapped, the host's kernel serves the faults.
    pub fn stats(&self) -> PagerStats {
        match &self.way {
            Way::Mapped(pager) => PagerStats::of_replay(&pager.replay),
            Way::Faults(pager) => pager.server.stats(),
        }
    }

    /// Whether a page could not be had: whoever touched it waits until the process ends, and must not be waited for.
    pub fn has_failed(&self) -> bool {
        match &self.way {
            Way::Mapped(pager) => pager.lost.is_waited_for(),
            Way::Faults(pager) => pager.server.has_failed(),
        }
    }

    /// Fails where pages that are mapped have gone with a part of their layer, and with them what the guest has written there.
    pub fn check(&self) -> Result<(), PagerError> {
        match &self.way {
            Way::Mapped(pager) => Ok(pager.lost.check()?),
            Way::Faults(_) => Ok(()),
        }
    }

    fn server(&self) -> Option<&Server> {
        match &self.way {
            Way::Mapped(_) => None,
            Way::Faults(pager) => Some(&pager.server),
        }
    }
}

/// Refuses the pages of a machine of another size.
fn check_size(chain: &Chain, memory: &GuestMemory) -> Result<(), PagerError> {
    let (saved, machine) = (chain.total_pages(), memory::total_pages(memory));
    if saved == machine {
        return Ok(());
    }
    Err(PagerError::Size { saved, machine })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, PagerError> {
    let thread = Builder::new().name(name.to_owned()).stack_size(STACK_SIZE);
    thread.spawn(work).map_err(PagerError::Start)
}

/// Pages that are mapped, and the thread that brings the working set.
struct MapPager {
    lost: Arc<LostPages>,
    replay: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

impl MapPager {
    fn start(
        chain: &Arc<Chain>,
        laid: usize,
        working_set: Vec<u64>,
        memory: &GuestMemory,
        exit: &ExitLatch,
    ) -> Result<Self, PagerError> {
        map::map(chain, laid, memory)?;
        let lost = LostPages::watch(chain, Space::of(memory), exit)?;
        let replay = Arc::new(Progress::default());
        let thread = if working_set.is_empty() {
            None
        } else {
            let (own, chain) = (Arc::clone(&replay), Arc::clone(chain));
            let work = move || replay::into_cache(&own, &chain, &working_set);
            Some(spawn("replay", work)?)
        };
        Ok(Self {
            lost,
            replay,
            thread,
        })
    }
}

impl Drop for MapPager {
    fn drop(&mut self) {
        self.replay.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The threads that bring pages.
struct FaultPager {
    server: Arc<Server>,
    threads: Vec<JoinHandle<()>>,
}

impl FaultPager {
    fn start(
        chain: &Arc<Chain>,
        working_set: Vec<u64>,
        memory: &GuestMemory,
        exit: &ExitLatch,
    ) -> Result<Self, PagerError> {
        let uffd = Userfaultfd::new().map_err(PagerError::NoUserfaultfd)?;
        let areas = space::areas(chain);
        for area in &areas {
            let count = area.end - area.start;
            for (_, slice) in memory::pages(memory, area.start, count) {
                uffd.register(&slice)
                    .map_err(|source| PagerError::Register { count, source })?;
            }
        }
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|errno| PagerError::Start(errno.into()))?;
        let server = Server::new(
            Arc::clone(chain),
            Space::of(memory),
            areas,
            uffd,
            wake,
            exit.clone(),
        );
        let mut pager = Self {
            server: Arc::new(server),
            threads: Vec::new(),
        };
        let own = Arc::clone(&pager.server);
        pager.threads.push(spawn("pager", move || own.run())?);
        if !working_set.is_empty() {
            let own = Arc::clone(&pager.server);
            let work = move || replay::by_server(&own, &working_set);
            pager.threads.push(spawn("replay", work)?);
        }
        Ok(pager)
    }
}

impl Drop for FaultPager {
    fn drop(&mut self) {
        if self.server.has_failed() {
            // Somebody may still wait, and would find zeros where the userfaultfd was closed.
            std::mem::forget(Arc::clone(&self.server));
            return;
        }
        self.server.stop();
        for thread in self.threads.drain(..) {
            // A panic has been reported, and has ended the VM.
            let _ = thread.join();
        }
    }
}
