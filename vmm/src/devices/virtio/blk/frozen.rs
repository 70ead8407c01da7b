//! A file of a disk's blocks as it was at one moment, while the process that it belongs to changes it.
//!
//! That process saves each block to a second file before it changes it for the first time ([`super::share`]): the block where it is in the disk, and then
//! a byte behind the end of the disk, one for each block, which says that it is there. A reader reads a block from the first file, and only then asks whether it was saved
//! meanwhile, as [`super::backup`] does in one process. All of this is done by system calls on files, whose pages the kernel locks, so no memory is shared:
//! a reader's descriptors are for reading only, and what they give it may be wrong, but cannot harm it.
//!
//! A process that cannot save a block cuts the second file to nothing, and goes on: every block of the moment is an error then. One that dies leaves both
//! files as they are, at whatever point: nobody changes them any more.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{FlockOperation, flock};

use super::stack::{BLOCK, BlockBytes, BlockSource, data_in_file, read_block_of};

/// Marks that are read at once.
const MARKS: usize = 4096;

/// Where the marks of a disk of `blocks` blocks begin in the file of saved blocks: behind the blocks.
fn marks(blocks: u64) -> u64 {
    blocks.saturating_mul(BLOCK)
}

/// Makes the file of saved blocks of what was a file of holes.
pub(super) fn prepare(saved: &File, blocks: u64) -> io::Result<()> {
    saved.set_len(marks(blocks).saturating_add(blocks))
}

/// Says that a block of a disk of `blocks` blocks is in the file of saved blocks.
pub(super) fn mark(saved: &File, blocks: u64, block: u64) -> io::Result<()> {
    saved.write_all_at(&[1], marks(blocks) + block)
}

/// Says that a block could not be saved.
pub(super) fn give_up(saved: &File) -> io::Result<()> {
    saved.set_len(0)
}

/// `file` once more, for reading only. Locks are another's, too.
pub(super) fn reader_of(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Takes part in the use of a file of saved blocks, until the last descriptor of `reader` is closed, in whichever process.
pub(super) fn use_saved(reader: &File) -> io::Result<()> {
    Ok(flock(reader, FlockOperation::NonBlockingLockShared)?)
}

/// Whether anybody uses the file of saved blocks. Where that cannot be told, somebody does.
pub(super) fn is_used(saved: &File) -> bool {
    flock(saved, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// A file as it was at a moment.
#[derive(Debug)]
pub struct FrozenFile {
    file: File,
    saved: File,
    /// Bytes of the disk.
    bytes: u64,
}

impl FrozenFile {
    /// The blocks of a disk of `bytes` bytes that `file` had when the file `saved` was made for it.
    pub fn new(file: File, saved: File, bytes: u64) -> Self {
        Self { file, saved, bytes }
    }

    /// The files that it is made of: for another process.
    pub fn files(&self) -> [&File; 2] {
        [&self.file, &self.saved]
    }

    fn read_saved(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.saved
            .read_exact_at(bytes, at)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => io::Error::other(
                    "the sandbox that this one branched off could not keep what its disk was: there was no room for that, or it may keep no more (--drive-backup)",
                ),
                _ => error,
            })
    }

    /// The first run of blocks among `within` that were saved.
    fn next_saved(&self, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let mut marked = [0; MARKS];
        let (mut at, mut start) = (within.start, None);
        while at < within.end {
            let count = usize::try_from(within.end - at).unwrap_or(MARKS).min(MARKS);
            self.read_saved(marks(self.blocks()) + at, &mut marked[..count])?;
            for (block, mark) in (at..).zip(&marked[..count]) {
                match (start, mark) {
                    (None, 0) | (Some(_), 1..) => {}
                    (None, _) => start = Some(block),
                    (Some(start), 0) => return Ok(Some(start..block)),
                }
            }
            at += count as u64;
        }
        Ok(start.map(|start| start..within.end))
    }
}

impl BlockSource for FrozenFile {
    fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK)
    }

    fn read(&self, block: u64, bytes: &mut BlockBytes) -> io::Result<()> {
        let read = read_block_of(&self.file, block, self.bytes, bytes);
        fence(Ordering::SeqCst);
        let mut mark = [0];
        self.read_saved(marks(self.blocks()) + block, &mut mark)?;
        match mark {
            [0] => read,
            _ => self.read_saved(block * BLOCK, bytes),
        }
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let data = data_in_file(&self.file, from, self.bytes)?;
        // What is a hole now may have been made one since.
        fence(Ordering::SeqCst);
        let before = data.as_ref().map_or(self.blocks(), |run| run.start);
        Ok(self.next_saved(from..before)?.or(data))
    }
}
