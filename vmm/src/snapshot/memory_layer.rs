//! The memory of one moment, written as a layer while the machine runs on.
//!
//! A fork of the monitor has all of guest memory as it is, copy-on-write, for the price of copying page tables: that is all
//! the machine has to stand still for. The child finds the pages that may differ from what memory began with, by
//! their being private copies (`/proc/self/pagemap`), and writes those that are neither zero nor the parent's (for a machine's children, whatever the parent has). Pages that
//! were never touched, or only read, are what they were.
//!
//! Nothing of the running machine depends on the child: it may fail or be killed at any time.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::delta::DeltaWriter;
use snapshot_fmt::error::WriteError;
use snapshot_fmt::layer::LayerSummary;

use crate::memory::{self, GuestMemory};
use crate::pagemap::Pagemap;
use crate::sys::fork::{Child, Frozen};

/// How often to ask whether the layer is still wanted.
const GIVEN_UP_PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// What a machine's memory goes back to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lineage<'a> {
    /// What memory began with, before anybody wrote to it; nothing but zeros where this is nothing.
    pub origin: Option<&'a Chain>,
    /// What the layer is a difference to: the origin, or what was saved of this machine since. Without it the layer holds everything.
    pub parent: Option<&'a Chain>,
    /// How many of the origin's layers, from the root on, `parent` makes up for: it has them too, or was saved of this machine.
    /// What the others hold belongs into the layer although nobody has written to it.
    pub covered: usize,
    /// The layer is for memory: what was written to is taken to differ from the parent's, and nothing is hashed.
    pub in_memory: bool,
}

impl<'a> Lineage<'a> {
    /// A layer over what memory began with.
    pub fn over_origin(origin: Option<&'a Chain>) -> Self {
        Self {
            origin,
            parent: origin,
            covered: usize::MAX,
            in_memory: false,
        }
    }

    /// The same, as soon as it can be had.
    pub fn for_children(origin: Option<&'a Chain>) -> Self {
        Self {
            in_memory: true,
            ..Self::over_origin(origin)
        }
    }

    /// Where pages come from that nobody has written to, if they may belong into the layer.
    fn untouched(&self) -> Option<&'a Chain> {
        self.origin
            .filter(|origin| self.covered < origin.layers().len())
    }
}

/// The memory of one moment, which a child has, to be written as a layer.
pub struct FrozenMemory(LayerInProgress);

/// A layer that is being written by a child.
pub struct LayerInProgress {
    child: Child,
    /// It waits for a byte, and answers with a line.
    socket: UnixStream,
}

/// What the child says at its end.
#[derive(Serialize, Deserialize)]
enum Answer {
    Written(LayerSummary),
    Failed(String),
}

impl FrozenMemory {
    /// Has `memory` as it is now, to be written to `file`, which `path` names in messages. The machine stands still until this
    /// returns.
    pub fn take(
        memory: &GuestMemory,
        file: &File,
        path: &Path,
        lineage: Lineage<'_>,
    ) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let own = file.try_clone()?;
        let chains = [lineage.origin, lineage.parent];
        let layers = chains.into_iter().flatten().flat_map(Chain::layers);
        let mut keep = vec![own.as_fd(), theirs.as_fd()];
        keep.extend(layers.map(|layer| layer.file().as_fd()));
        let child = Child::fork(&keep, |frozen| {
            // The host counts the fork as the parent's time, and lets this run instead of it, while the machine stands still.
            if !matches!((&theirs).read(&mut [0]), Ok(1)) {
                return 1;
            }
            let result = own
                .try_clone()
                .map_err(|error| error.to_string())
                .and_then(|own| write(frozen, memory, own, path, lineage));
            let answer = result.map_or_else(Answer::Failed, Answer::Written);
            let sent = serde_json::to_vec(&answer).is_ok_and(|mut line| {
                line.push(b'\n');
                (&theirs).write_all(&line).is_ok()
            });
            // To take its memory down takes a millisecond, which who has the answer has better uses for. Where that could not be sent, its end is the answer.
            if sent {
                loop {
                    rustix::event::pause();
                }
            }
            1
        })?;
        Ok(Self(LayerInProgress { child, socket }))
    }

    /// Has it written. The machine should run again by now.
    pub fn write(self) -> LayerInProgress {
        let Self(layer) = self;
        // A child that is gone will not answer either.
        let _ = (&layer.socket).write_all(b"\n");
        layer
    }
}

impl LayerInProgress {
    /// Waits until the layer is written and on the disk, or until `is_given_up` says, which is asked now and then, that nobody wants it any more. Returns the
    /// process that has written it as well, which has memory as it was until it is dropped: that ends it, and takes a millisecond.
    pub fn finish(mut self, is_given_up: impl Fn() -> bool) -> io::Result<(LayerSummary, Child)> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut fds, Some(&GIVEN_UP_PAUSE)) {
                Ok(0) if is_given_up() => {
                    return Err(io::Error::other("nobody waits for the snapshot any more"));
                }
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(errno.into()),
            }
            let mut piece = [0; 1024];
            match self.socket.read(&mut piece) {
                Ok(0) => break,
                Ok(len) => line.extend_from_slice(&piece[..len]),
                // It has ended before it was told to write.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
                Err(error) => return Err(error),
            }
        }
        match serde_json::from_slice(&line) {
            Ok(Answer::Written(summary)) => Ok((summary, self.child)),
            Ok(Answer::Failed(why)) => Err(io::Error::other(why)),
            // It was killed, by the kernel perhaps, or has panicked.
            Err(_) => Err(io::Error::other(
                "the process that was to write the memory ended before it had",
            )),
        }
    }
}

/// The child's work.
fn write(
    frozen: &Frozen,
    memory: &GuestMemory,
    file: File,
    path: &Path,
    lineage: Lineage<'_>,
) -> Result<LayerSummary, String> {
    let total = memory::total_pages(memory);
    let pagemap = Pagemap::open().map_err(|error| error.to_string())?;
    let mut layer =
        DeltaWriter::new(file, path, total, lineage.parent).map_err(|error| error.to_string())?;
    layer.join_runs();
    if lineage.in_memory {
        layer.in_memory();
    }
    for (first_page, slice) in memory::pages(memory, 0, total) {
        let bytes = frozen.bytes(&slice);
        let address = bytes.as_ptr() as u64;
        let pages = bytes.len() / PAGE_SIZE;
        for run in pagemap.runs(address, pages) {
            let (run, copied) = run.map_err(|error| error.to_string())?;
            let first = first_page + run.start as u64;
            let written = if copied {
                layer.put(first, &bytes[run.start * PAGE_SIZE..run.end * PAGE_SIZE])
            } else if let Some(origin) = lineage.untouched() {
                copy(origin, lineage.covered, first, run.len() as u64, &mut layer)
            } else {
                Ok(())
            };
            written.map_err(|error| error.to_string())?;
        }
    }
    let (summary, file) = layer.finish().map_err(|error| error.to_string())?;
    file.sync_all()
        .map_err(|error| format!("{}: cannot be written out: {error}", path.display()))?;
    Ok(summary)
}

/// Adds the pages that are as the machine began with them, but for those of the first layers, which are `covered`. They are read from the layers,
/// where they are checked: in memory they may not have arrived.
fn copy(
    origin: &Chain,
    covered: usize,
    first_page: u64,
    count: u64,
    layer: &mut DeltaWriter<'_>,
) -> Result<(), WriteError> {
    let mut bytes = [0; PAGE_SIZE];
    for run in origin.runs(first_page, first_page + count) {
        match run.source {
            // A layer may have made them so.
            Source::Zero => {
                layer.zero(run.first_page, run.count)?;
                continue;
            }
            Source::Data { layer, .. } if layer < covered => continue,
            Source::Data { .. } => {}
        }
        for page in run.first_page..run.end() {
            origin.read_page(page, &mut bytes)?;
            layer.put(page, &bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use snapshot_fmt::layer::Layer;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::exit::ExitLatch;
    use crate::pager::{Mode, Pager, Pages};
    use std::sync::Arc;

    const RAM: [(u64, u64); 2] = [(0, 64 << 12), (1 << 20, 64 << 12)];

    fn save(memory: &GuestMemory, lineage: Lineage<'_>) -> (Layer, LayerSummary) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let layer = FrozenMemory::take(memory, file.as_file(), file.path(), lineage).unwrap();
        let (summary, _) = layer.write().finish(|| false).unwrap();
        (
            Layer::open(file.reopen().unwrap(), file.path()).unwrap(),
            summary,
        )
    }

    fn restored(layers: Vec<Layer>) -> GuestMemory {
        let memory = memory::create(&RAM).unwrap();
        let pages = Pages {
            chain: Arc::new(Chain::new(layers).unwrap()),
            mode: Mode::Map,
            working_set: Vec::new(),
        };
        Pager::start(pages, &memory, &ExitLatch::new().unwrap()).unwrap();
        memory
    }

    fn fill(memory: &GuestMemory, page: u64, byte: u8) {
        let (_, slice) = memory::pages(memory, page, 1).next().unwrap();
        slice.copy_from(&[byte; PAGE_SIZE][..]);
    }

    fn first_bytes(memory: &GuestMemory) -> Vec<u8> {
        (0..memory::total_pages(memory))
            .map(|page| {
                let (_, slice) = memory::pages(memory, page, 1).next().unwrap();
                slice.read_obj(0).unwrap()
            })
            .collect()
    }

    #[test]
    fn a_layer_holds_what_was_written_and_is_not_zero() {
        let memory = memory::create(&RAM).unwrap();
        for (page, byte) in [(0, 1), (63, 2), (64, 3), (100, 0)] {
            fill(&memory, page, byte);
        }
        let (layer, summary) = save(&memory, Lineage::default());
        assert_eq!((summary.data_pages, summary.zero_pages), (3, 0));
        assert_eq!(first_bytes(&restored(vec![layer])), first_bytes(&memory));
    }

    #[test]
    fn runs_with_little_between_them_are_one() {
        let memory = memory::create(&RAM).unwrap();
        for page in [1, 4, 13, 23, 60, 66] {
            fill(&memory, page, 1);
        }
        let (layer, summary) = save(&memory, Lineage::default());
        let extents = layer.extents().iter();
        let runs: Vec<_> = extents.map(|run| run.first_page..run.end()).collect();
        assert_eq!(runs, [1..14, 23..24, 60..67]);
        assert_eq!((summary.data_pages, summary.zero_pages), (21, 0));
        let chain = Chain::new(vec![save(&memory, Lineage::default()).0]).unwrap();
        // What is zero in both is in no difference.
        fill(&memory, 2, 0);
        fill(&memory, 4, 0);
        let (difference, summary) = save(&memory, Lineage::over_origin(Some(&chain)));
        assert_eq!((summary.data_pages, summary.zero_pages), (0, 1));
        let restored = restored(vec![layer, difference]);
        assert_eq!(first_bytes(&restored), first_bytes(&memory));
    }

    #[test]
    fn a_layer_over_a_parent_holds_the_difference() {
        let memory = memory::create(&RAM).unwrap();
        for page in 0..20 {
            fill(&memory, page, 5);
        }
        let memory = restored(vec![save(&memory, Lineage::default()).0]);
        fill(&memory, 3, 6);
        fill(&memory, 4, 0);
        fill(&memory, 5, 5);
        fill(&memory, 127, 7);
        // Read, not written.
        assert_eq!(memory.read_obj::<u8>(GuestAddress(9 << 12)).unwrap(), 5);
        let root = memory::create(&RAM).unwrap();
        for page in 0..20 {
            fill(&root, page, 5);
        }
        let root = save(&root, Lineage::default()).0;
        let chain = Chain::new(vec![root]).unwrap();
        let lineage = Lineage::over_origin(Some(&chain));
        let (layer, summary) = save(&memory, lineage);
        assert_eq!((summary.data_pages, summary.zero_pages), (2, 1));
        let again = memory::create(&RAM).unwrap();
        for page in 0..20 {
            fill(&again, page, 5);
        }
        let root = save(&again, Lineage::default()).0;
        assert_eq!(
            first_bytes(&restored(vec![root, layer])),
            first_bytes(&memory)
        );
    }

    #[test]
    fn a_layer_of_everything_holds_what_was_never_touched() {
        let root = memory::create(&RAM).unwrap();
        (10..30).for_each(|page| fill(&root, page, 5));
        let (root, _) = save(&root, Lineage::default());
        let chain = Arc::new(Chain::new(vec![root]).unwrap());
        let memory = memory::create(&RAM).unwrap();
        let pages = Pages {
            chain: Arc::clone(&chain),
            mode: Mode::Map,
            working_set: Vec::new(),
        };
        let pager = Pager::start(pages, &memory, &ExitLatch::new().unwrap());
        fill(&memory, 12, 6);
        let lineage = Lineage {
            origin: Some(&chain),
            ..Lineage::default()
        };
        let (layer, summary) = save(&memory, lineage);
        assert_eq!((summary.data_pages, summary.zero_pages), (20, 0));
        assert_eq!(first_bytes(&restored(vec![layer])), first_bytes(&memory));
        drop(pager);
    }

    #[test]
    fn the_layer_is_of_the_moment_it_was_begun() {
        let memory = memory::create(&RAM).unwrap();
        (0..128).for_each(|page| fill(&memory, page, 1));
        let file = tempfile::NamedTempFile::new().unwrap();
        let layer =
            FrozenMemory::take(&memory, file.as_file(), file.path(), Lineage::default()).unwrap();
        (0..128).for_each(|page| fill(&memory, page, 2));
        layer.write().finish(|| false).unwrap();
        let layer = Layer::open(file.reopen().unwrap(), file.path()).unwrap();
        assert_eq!(first_bytes(&restored(vec![layer])), [1; 128]);
    }

    #[test]
    fn a_writer_that_hangs_can_be_given_up() {
        let memory = memory::create(&RAM).unwrap();
        fill(&memory, 0, 1);
        let child = Child::fork(&[], |_| {
            loop {
                std::thread::park();
            }
        });
        // Nobody writes, nobody closes.
        let (socket, _theirs) = UnixStream::pair().unwrap();
        let layer = LayerInProgress {
            child: child.unwrap(),
            socket,
        };
        let asked = std::cell::Cell::new(0);
        let given_up = layer.finish(|| asked.replace(asked.get() + 1) > 0);
        assert!(given_up.unwrap_err().to_string().contains("nobody waits"));
        assert_eq!(asked.get(), 2);
        save(&memory, Lineage::default());
    }

    #[test]
    fn a_writer_that_ends_before_it_has_written_is_an_error() {
        for reads in [true, false] {
            let (socket, theirs) = UnixStream::pair().unwrap();
            let child = Child::fork(&[theirs.as_fd()], |_| {
                let mut told = vec![0; usize::from(reads)];
                u8::from((&theirs).read(&mut told).is_err())
            });
            drop(theirs);
            let child = child.unwrap();
            let layer = FrozenMemory(LayerInProgress { child, socket }).write();
            let error = layer.finish(|| false).unwrap_err().to_string();
            assert!(error.contains("ended before it had"), "{error}");
        }
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let memory = memory::create(&RAM).unwrap();
        (0..128).for_each(|page| fill(&memory, page, 1));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let layer = FrozenMemory::take(
            &memory,
            &full,
            Path::new("memory.layer"),
            Lineage::default(),
        )
        .unwrap();
        let error = layer.write().finish(|| false).unwrap_err().to_string();
        assert!(error.contains("memory.layer"), "{error}");
    }
}
