//! A disk: the content that requests are about, and what is known of its changes.
//!
//! The device changes it, in the event loop; whoever saves it reads beside that (see [`super::backup`]).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl};

use super::BlockError;
use super::backup::Backup;
use super::block_map::BlockMap;
use super::frozen::{FrozenFile, reader_of};
use super::queue::SECTOR;
use super::stack::{BLOCK, Backing, Base, BlockSource, Stack, blocks_of, scratch_file};
use crate::devices::virtio::GuestSlice;
use crate::devices::virtio::queue::total_len;

/// A disk. Offsets and lengths are in bytes, and on the disk.
pub struct Disk {
    bytes: u64,
    read_only: bool,
    /// The file that the guest writes to, for those who only read it.
    reader: Option<File>,
    live: Mutex<Live>,
}

/// A backup for others, and how they read the file that is written to with it.
pub(super) type Reading = (Arc<Backup>, FrozenFile);

struct Live {
    stack: Arc<Stack>,
    /// What was changed since the disk was last saved, or since it was made.
    changed: BlockMap,
    /// What must be saved before it is changed.
    backups: Vec<Arc<Backup>>,
}

impl Disk {
    /// The disk in `file`, a regular file or a block device that `path` names in messages. The last bytes that do not fill a
    /// sector are out of the guest's reach, with a warning.
    pub fn of_file(mut file: File, path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let path = || path.to_owned();
        let unknown = |source| BlockError::Size {
            path: path(),
            source,
        };
        let kind = file.metadata().map_err(unknown)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::Kind { path: path() });
        }
        // The size of a block device is not in its metadata.
        let len = file.seek(SeekFrom::End(0)).map_err(unknown)?;
        let sectors = len / SECTOR;
        if sectors == 0 {
            return Err(BlockError::TooSmall { path: path(), len });
        }
        if len % SECTOR != 0 {
            log::warn!(
                "{}: the last {} bytes do not fill a sector and are not part of the disk",
                path().display(),
                len % SECTOR
            );
        }
        let writable = fcntl_getfl(&file).map(|flags| flags & OFlags::ACCMODE != OFlags::RDONLY);
        if !read_only && !writable.unwrap_or(false) {
            return Err(BlockError::NotWritable { path: path() });
        }
        Ok(Self::new(Stack::file(file, sectors * SECTOR), read_only))
    }

    /// A writable disk of `sectors` sectors that goes on from `backing`. What is written to it goes into a file without a name in the directory
    /// `dir`, and with the disk; `name` is what that is called while it is made.
    pub fn over(
        backing: Backing,
        sectors: u64,
        dir: &Path,
        name: &str,
    ) -> Result<Self, BlockError> {
        let (stack, changed) = stack_over(backing, sectors, dir, name)?;
        let disk = Self::new(stack, false);
        disk.add_changed(&changed);
        Ok(disk)
    }

    /// Goes back to `backing`, as if it were made [over](Self::over) that now. No request is half done, and nobody saves the disk meanwhile; those that rest on what it was keep
    /// that.
    pub fn rewind(&self, backing: Backing, dir: &Path, name: &str) -> Result<(), BlockError> {
        let (stack, changed) = stack_over(backing, self.sectors(), dir, name)?;
        let mut live = self.lock();
        live.stack = Arc::new(stack);
        live.changed = changed;
        // Nobody writes any more to what they would be saved from.
        live.backups.clear();
        Ok(())
    }

    /// Whether what the guest writes goes into a file of its user's.
    pub fn is_users_file(&self) -> bool {
        self.reader.is_some()
    }

    /// [`Disk::over`] what was saved.
    pub fn of_saved(
        source: Arc<dyn BlockSource>,
        sectors: u64,
        dir: &Path,
        name: &str,
    ) -> Result<Self, BlockError> {
        Self::over(Base::Saved(source).into(), sectors, dir, name)
    }

    /// A disk of these blocks.
    pub(super) fn new(stack: Stack, read_only: bool) -> Self {
        // Nothing of a disk that is only read changes.
        let changes = if read_only { 0 } else { stack.blocks() };
        Self {
            bytes: stack.bytes(),
            read_only,
            reader: None,
            live: Mutex::new(Live {
                stack: Arc::new(stack),
                changed: BlockMap::new(changes),
                backups: Vec::new(),
            }),
        }
    }

    /// The same disk, whose file is open as `reader` as well, for reading only: that is what children get, and with it the lock that it has.
    pub fn with_reader(self, reader: File) -> Self {
        Self {
            reader: Some(reader),
            ..self
        }
    }

    /// The file that the guest writes to, for a process that only reads it.
    pub(super) fn reader(&self) -> io::Result<File> {
        match &self.reader {
            Some(reader) => reader.try_clone(),
            None => reader_of(self.lock().stack.top_file()),
        }
    }

    /// Sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR
    }

    /// Blocks, the last of which may lie on the disk in part.
    pub fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK)
    }

    /// Whether the guest may only read.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `slices` from `offset` on.
    pub(super) fn read(&self, slices: &mut Vec<GuestSlice>, offset: u64) -> io::Result<()> {
        self.lock().stack.read(slices, offset)
    }

    /// Writes `slices` from `offset` on.
    pub(super) fn write(&self, slices: &mut Vec<GuestSlice>, offset: u64) -> io::Result<()> {
        let mut live = self.lock();
        live.will_change(blocks_of(offset, total_len(slices)));
        live.stack.write(slices, offset)
    }

    /// Waits until what was written is on the host's disk.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.lock().stack.flush()
    }

    /// Gives room back to the host, if it can. That is a hint, and not taken while blocks would have to be saved for it.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut live = self.lock();
        live.backups.retain(|backup| backup.is_used());
        if !live.backups.is_empty() {
            return Ok(());
        }
        live.will_change(blocks_of(offset, len));
        live.stack.discard(offset, len)
    }

    /// Makes a range zero; with `unmap`, it need not keep its room.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mut live = self.lock();
        live.will_change(blocks_of(offset, len));
        live.stack.write_zeroes(offset, len, unmap)
    }

    /// From now on `backup` gets what is changed. Returns what the disk is now, and what was changed until now; `changed` goes on, empty.
    pub(super) fn begin(&self, backup: &Arc<Backup>, changed: BlockMap) -> (Arc<Stack>, BlockMap) {
        let mut live = self.lock();
        live.backups.push(Arc::clone(backup));
        let before = std::mem::replace(&mut live.changed, changed);
        (Arc::clone(&live.stack), before)
    }

    /// What others share already, if nothing was changed since.
    pub(super) fn unchanged_since(&self) -> Option<Arc<Backup>> {
        let live = self.lock();
        let shared = live.backups.iter().rev().find(|backup| backup.is_shared());
        shared.filter(|backup| backup.is_untouched()).cloned()
    }

    /// What the disk is now, for other processes to rest on. From now on the backup of `new` gets what is changed, if those need it; or that of `again`, which is in use, goes on
    /// doing so, if nothing was changed since. Each comes with how others read the file that is written to.
    pub(super) fn share(&self, new: Reading, again: Option<Reading>) -> Backing {
        let mut live = self.lock();
        let again = again.filter(|(backup, _)| backup.is_untouched());
        let is_new = again.is_none();
        let (backup, frozen) = again.unwrap_or(new);
        let mut used = None;
        let backing = live.stack.backing(|| {
            used = Some(backup);
            frozen
        });
        live.backups.extend(used.filter(|_| is_new));
        backing
    }

    /// `backup` needs no more.
    pub(super) fn release(&self, backup: &Arc<Backup>) {
        self.lock()
            .backups
            .retain(|other| !Arc::ptr_eq(other, backup));
    }

    /// Counts what had been changed before a moment that is not kept.
    pub(super) fn add_changed(&self, changed: &BlockMap) {
        self.lock().changed.merge(changed);
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk of `sectors` sectors over `backing`, and what of it counts as changed.
fn stack_over(
    backing: Backing,
    sectors: u64,
    dir: &Path,
    name: &str,
) -> Result<(Stack, BlockMap), BlockError> {
    let blocks = backing.blocks();
    // Checked before anything is counted in bytes: both numbers come from files.
    if sectors == 0 || sectors.div_ceil(BLOCK / SECTOR) != blocks {
        return Err(BlockError::SavedBlocks { blocks, sectors });
    }
    let scratch = scratch_file(dir, name, blocks).map_err(|source| BlockError::Overlay {
        dir: dir.to_owned(),
        source,
    })?;
    let changed = backing.changed();
    Ok((Stack::over(backing, scratch, sectors * SECTOR), changed))
}

impl Live {
    fn will_change(&mut self, blocks: Range<u64>) {
        let in_doubt = |backup: &Arc<Backup>| backup.is_in_doubt(blocks.clone());
        if self.backups.iter().any(in_doubt) {
            self.backups.retain(|backup| backup.is_used());
        }
        for backup in &self.backups {
            backup.save(&self.stack, blocks.clone());
        }
        self.changed.add(blocks);
    }
}
