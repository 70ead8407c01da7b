//! What a disk was at one moment, while its guest writes on.
//!
//! From that moment on, the device saves each block in a [`Backup`] before it changes it for the first time. Whoever reads the disk of the moment
//! reads a block from where it was, and only then asks whether it was saved meanwhile: if not, nobody had begun to change it. The device
//! adds the block to the map between saving and changing it, with a full barrier on both sides.
//!
//! The guest does not suffer from a block that cannot be saved: its write is carried out, and the moment is lost.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};

use snapshot_fmt::PAGE_SIZE;

use super::allowance::Share;
use super::block_map::BlockMap;
use super::disk::Disk;
use super::frozen;
use super::stack::{BLOCK, BlockBytes, Stack};

/// The old content of blocks that were changed since a moment.
#[derive(Debug)]
pub(super) struct Backup {
    file: File,
    /// Those that are in it, or that nobody looks for in it.
    saved: BlockMap,
    /// What it takes of a bound, if other processes read it, and not this one ([`super::share`]).
    shared: Option<Share>,
    /// Why a block could not be saved, if that is so.
    failure: OnceLock<(io::ErrorKind, String)>,
}

impl Backup {
    /// An empty one in `file`, for a disk of `blocks` blocks; `shared` if other processes read it.
    pub(super) fn new(file: File, blocks: u64, shared: Option<Share>) -> Self {
        Self {
            file,
            saved: BlockMap::new(blocks),
            shared,
            failure: OnceLock::new(),
        }
    }

    /// Whether other processes read it.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Whether nothing was changed since its moment.
    pub(super) fn is_untouched(&self) -> bool {
        self.failure.get().is_none() && self.saved.is_empty()
    }

    /// The file, for other processes. Until they have closed it, it is used.
    pub(super) fn reader(&self) -> io::Result<File> {
        let reader = frozen::reader_of(&self.file)?;
        frozen::use_saved(&reader)?;
        Ok(reader)
    }

    /// Whether anybody may still read it.
    pub(super) fn is_used(&self) -> bool {
        !self.is_shared() || (self.failure.get().is_none() && frozen::is_used(&self.file))
    }

    /// Whether it is to be looked whether it is used, before `blocks` are changed: that has a price, or no more use.
    pub(super) fn is_in_doubt(&self, blocks: Range<u64>) -> bool {
        let lacks = || self.saved.find(blocks.clone(), false) < blocks.end;
        self.is_shared() && (self.failure.get().is_some() || lacks())
    }

    /// Saves those of `blocks` that are not saved yet, as `stack` has them.
    pub(super) fn save(&self, stack: &Stack, blocks: Range<u64>) {
        for block in blocks {
            if self.failure.get().is_some() {
                return;
            }
            if self.saved.has(block) {
                continue;
            }
            match self.save_block(stack, block) {
                Ok(()) => self.saved.add(block..block + 1),
                Err(error) => self.fail(&error),
            }
        }
    }

    fn save_block(&self, stack: &Stack, block: u64) -> io::Result<()> {
        if self.is_shared() && !stack.is_on_top(block) {
            // Others look for it where it stays as it is.
            return Ok(());
        }
        let mut bytes = [0; PAGE_SIZE];
        stack.read_block(block, &mut bytes)?;
        // The file is zero already.
        if bytes != [0; PAGE_SIZE] {
            self.shared
                .as_ref()
                .map_or(Ok(()), |share| share.take(BLOCK))?;
            self.file.write_all_at(&bytes, block * BLOCK)?;
        }
        if self.is_shared() {
            fence(Ordering::SeqCst);
            frozen::mark(&self.file, self.saved.blocks(), block)?;
        }
        Ok(())
    }

    fn fail(&self, error: &io::Error) {
        if let Some(share) = &self.shared {
            // First: that makes room, for the log as well.
            let told = frozen::give_up(&self.file);
            share.give_back();
            log::warn!(
                "what a drive was cannot be kept for the sandboxes that branched off ({error}): they cannot read it any more"
            );
            if let Err(error) = told {
                log::error!("nor can they be told: {error}");
            }
        }
        let _ = self.failure.set((error.kind(), error.to_string()));
        fence(Ordering::SeqCst);
    }
}

/// All that is needed to hold a disk's content of a moment to come, so that the moment is short.
pub struct Preparation {
    disk: Arc<Disk>,
    backup: Arc<Backup>,
    changed: BlockMap,
}

impl Preparation {
    /// `scratch`, of [`super::stack::scratch_file`], takes the old content of blocks.
    pub fn new(disk: &Arc<Disk>, scratch: File) -> Self {
        Self {
            disk: Arc::clone(disk),
            backup: Arc::new(Backup::new(scratch, disk.blocks(), None)),
            changed: BlockMap::new(disk.blocks()),
        }
    }

    /// The moment is now. No request is half done.
    pub fn begin(self) -> Moment {
        let Self {
            disk,
            backup,
            changed,
        } = self;
        let (stack, changed) = disk.begin(&backup, changed);
        Moment {
            disk,
            stack,
            backup,
            changed: Some(changed),
        }
    }
}

/// A disk as it was at a moment. Dropped, it is forgotten, as if it had never been asked for.
pub struct Moment {
    disk: Arc<Disk>,
    stack: Arc<Stack>,
    backup: Arc<Backup>,
    /// The blocks that had been changed since the last moment that was kept. Absent once this one is kept.
    changed: Option<BlockMap>,
}

impl Moment {
    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.stack.blocks()
    }

    /// The next run of blocks from `from` on that had been changed since the last moment that was kept, or since the disk was made.
    pub fn next_changed(&self, from: u64) -> Option<Range<u64>> {
        self.changed.as_ref()?.run(from..self.blocks())
    }

    /// The next run of blocks from `from` on that need not have been zero.
    pub fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let data = self.stack.next_data(from)?;
        // What is a hole now may have been made one since.
        fence(Ordering::SeqCst);
        let before = data.as_ref().map_or(self.blocks(), |run| run.start);
        Ok(self.backup.saved.run(from..before).or(data))
    }

    /// Reads a block.
    pub fn read(&self, block: u64, bytes: &mut BlockBytes) -> io::Result<()> {
        let read = self.stack.read_block(block, bytes);
        fence(Ordering::SeqCst);
        if self.backup.saved.has(block) {
            return self.backup.file.read_exact_at(bytes, block * BLOCK);
        }
        match self.backup.failure.get() {
            Some((kind, what)) => Err(io::Error::new(
                *kind,
                format!("a block that the guest changed cannot be kept: {what}"),
            )),
            None => read,
        }
    }

    /// Nobody reads from it any more: the guest's writes are on their own again.
    pub fn release(&self) {
        self.disk.release(&self.backup);
    }

    /// What it was is kept: what changes from the moment on, is what has changed.
    pub fn keep(mut self) {
        self.changed = None;
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        self.release();
        if let Some(changed) = self.changed.take() {
            self.disk.add_changed(&changed);
        }
    }
}
