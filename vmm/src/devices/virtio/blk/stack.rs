//! What a disk's blocks are: a file that the guest changes, or an overlay on what others rest on as well. Reads go down, writes go into what is on top.
//!
//! An overlay is a sparse file of blocks that are others than below it. Below it are blocks that nobody changes, of a snapshot or of moments of the
//! sandboxes that this one branched off ([`super::frozen`]).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use snapshot_fmt::{PAGE_BYTES, PAGE_SIZE};

use super::block_map::BlockMap;
use super::frozen::FrozenFile;
use crate::devices::virtio::GuestSlice;
use crate::devices::virtio::queue::{copy_to, split_front, total_len};
use crate::sys::vectored;

/// Bytes of a block: a page of a snapshot's layer.
pub const BLOCK: u64 = PAGE_BYTES;
/// A block. What lies behind the disk's end in its last one is zero.
pub type BlockBytes = snapshot_fmt::Page;

/// The blocks that hold `len` bytes from `offset` on.
pub fn blocks_of(offset: u64, len: u64) -> Range<u64> {
    offset / BLOCK..(offset + len).div_ceil(BLOCK)
}

/// Blocks that nobody changes.
pub trait BlockSource: Send + Sync {
    /// How many there are.
    fn blocks(&self) -> u64;
    /// Reads a block.
    fn read(&self, block: u64, bytes: &mut BlockBytes) -> io::Result<()>;
    /// The next run of blocks from `from` on that need not be zero.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>>;
}

/// Makes a file in `dir` that has no name and goes with its last descriptor. It has holes only, and `blocks` blocks.
pub fn scratch_file(dir: &Path, name: &str, blocks: u64) -> io::Result<File> {
    let path = dir.join(name);
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    file.set_len(blocks.saturating_mul(BLOCK))?;
    Ok(file)
}

/// Blocks that are others than below.
#[derive(Debug)]
struct Overlay {
    file: File,
    /// The blocks that it has. A block is in it before it is added, and counts from then on.
    has: BlockMap,
}

/// What was on top of an ancestor's disk at the moment at which it was branched off.
#[derive(Debug)]
pub struct Layer {
    /// The blocks that it had.
    pub has: BlockMap,
    /// Those blocks.
    pub blocks: FrozenFile,
}

/// What is at the bottom of a disk that others rest on as well.
#[derive(Clone)]
pub enum Base {
    /// A snapshot's disk.
    Saved(Arc<dyn BlockSource>),
    /// The file of an ancestor's disk.
    Frozen(Arc<FrozenFile>),
}

impl Base {
    fn source(&self) -> &dyn BlockSource {
        match self {
            Self::Saved(source) => &**source,
            Self::Frozen(file) => &**file,
        }
    }
}

/// What is below an overlay.
#[derive(Clone)]
pub struct Backing {
    /// At the bottom.
    pub base: Base,
    /// What was changed since, the latest last.
    pub layers: Vec<Arc<Layer>>,
}

impl From<Base> for Backing {
    fn from(base: Base) -> Self {
        let layers = Vec::new();
        Self { base, layers }
    }
}

impl Backing {
    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.base.source().blocks()
    }

    /// The blocks that are others than the base's.
    pub fn changed(&self) -> BlockMap {
        let changed = BlockMap::new(self.blocks());
        for layer in &self.layers {
            changed.merge(&layer.has);
        }
        changed
    }
}

enum Kind {
    File(File),
    Layered { top: Overlay, backing: Backing },
}

/// Where a run of blocks is.
enum Place<'a> {
    File(&'a File),
    Source(&'a dyn BlockSource),
}

/// The blocks of a disk.
pub struct Stack {
    kind: Kind,
    /// Bytes of the disk.
    bytes: u64,
}

impl Stack {
    /// A disk of `bytes` bytes in `file`.
    pub fn file(file: File, bytes: u64) -> Self {
        let kind = Kind::File(file);
        Self { kind, bytes }
    }

    /// A disk of `bytes` bytes over `backing`. What is written goes into `file`, of [`scratch_file`].
    pub fn over(backing: Backing, file: File, bytes: u64) -> Self {
        let has = BlockMap::new(backing.blocks());
        let top = Overlay { file, has };
        let kind = Kind::Layered { top, backing };
        Self { kind, bytes }
    }

    /// The file that is written to.
    pub fn top_file(&self) -> &File {
        match &self.kind {
            Kind::File(file) => file,
            Kind::Layered { top, .. } => &top.file,
        }
    }

    /// Whether a block is in the file that is written to.
    pub fn is_on_top(&self, block: u64) -> bool {
        match &self.kind {
            Kind::File(_) => true,
            Kind::Layered { top, .. } => top.has.has(block),
        }
    }

    /// What it is now, for others to rest on. `freeze` is called where that needs the file that is written to, for which it gives what that is now.
    pub fn backing(&self, freeze: impl FnOnce() -> FrozenFile) -> Backing {
        match &self.kind {
            Kind::File(_) => Base::Frozen(Arc::new(freeze())).into(),
            Kind::Layered { top, backing } => {
                let mut backing = backing.clone();
                if !top.has.is_empty() {
                    let has = top.has.clone();
                    let blocks = freeze();
                    backing.layers.push(Arc::new(Layer { has, blocks }));
                }
                backing
            }
        }
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK)
    }

    /// Where `block` is, and the end of the run of blocks from it on to before `end` that are there as well.
    fn place(&self, block: u64, mut end: u64) -> (Place<'_>, u64) {
        let (top, backing) = match &self.kind {
            Kind::File(file) => return (Place::File(file), end),
            Kind::Layered { top, backing } => (top, backing),
        };
        if top.has.has(block) {
            return (Place::File(&top.file), top.has.find(block..end, false));
        }
        end = top.has.find(block..end, true);
        for Layer { has, blocks } in backing.layers.iter().rev().map(|layer| &**layer) {
            if has.has(block) {
                return (Place::Source(blocks), has.find(block..end, false));
            }
            end = has.find(block..end, true);
        }
        (Place::Source(backing.base.source()), end)
    }

    /// Reads from `offset` on, which lies with all of `slices` on the disk.
    pub fn read(&self, slices: &mut Vec<GuestSlice>, mut offset: u64) -> io::Result<()> {
        while !slices.is_empty() {
            let len = total_len(slices);
            let blocks = blocks_of(offset, len);
            let (place, end) = self.place(blocks.start, blocks.end);
            let here = (end * BLOCK - offset).min(len);
            let mut part = split_front(slices, usize::try_from(here).unwrap_or(usize::MAX));
            match place {
                Place::File(file) => read_exactly(file, &mut part, offset)?,
                Place::Source(source) => read_source(source, part, offset)?,
            }
            offset += here;
        }
        Ok(())
    }

    /// Reads a block of the disk.
    pub fn read_block(&self, block: u64, bytes: &mut BlockBytes) -> io::Result<()> {
        match self.place(block, block + 1) {
            (Place::Source(source), _) => source.read(block, bytes),
            (Place::File(file), _) => read_block_of(file, block, self.bytes, bytes),
        }
    }

    /// The next run of blocks from `from` on that need not be zero.
    pub fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let (top, backing) = match &self.kind {
            Kind::File(file) => return data_in_file(file, from, self.bytes),
            Kind::Layered { top, backing } => (top, backing),
        };
        let mut next = backing.base.source().next_data(from)?;
        let layers = backing.layers.iter().map(|layer| &layer.has);
        for has in layers.chain([&top.has]) {
            let before = next.as_ref().map_or(self.blocks(), |run| run.start);
            next = has.run(from..before).or(next);
        }
        Ok(next)
    }

    /// Writes from `offset` on. What fails may have been done in part, as on any disk.
    pub fn write(&self, slices: &mut Vec<GuestSlice>, offset: u64) -> io::Result<()> {
        let len = total_len(slices);
        let top = match &self.kind {
            Kind::File(file) => return write_all(file, slices, offset),
            Kind::Layered { top, .. } => top,
        };
        self.copy_edges_up(top, offset, len)?;
        write_all(&top.file, slices, offset)?;
        top.has.add(blocks_of(offset, len));
        Ok(())
    }

    /// Waits until the file has what was written. Overlays end with their sandbox: nobody has use for them after a crash.
    pub fn flush(&self) -> io::Result<()> {
        match &self.kind {
            Kind::File(file) => file.sync_data(),
            Kind::Layered { .. } => Ok(()),
        }
    }

    /// Gives room back to the host, if its file system can. A discarded range then reads as zeroes.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A discard is a hint.
        let done = |result| match result {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(errno) => Err(io::Error::from(errno)),
        };
        let top = match &self.kind {
            Kind::File(file) => return done(fallocate(file, punch, offset, len)).map(drop),
            Kind::Layered { top, .. } => top,
        };
        let end = if offset + len == self.bytes {
            self.blocks()
        } else {
            (offset + len) / BLOCK
        };
        let whole = offset.div_ceil(BLOCK)..end;
        if whole.start < whole.end {
            let len = (whole.end - whole.start) * BLOCK;
            if done(fallocate(&top.file, punch, whole.start * BLOCK, len))? {
                top.has.add(whole);
            }
        }
        Ok(())
    }

    /// Makes a range zero; with `unmap`, it need not keep its room.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let top = match &self.kind {
            Kind::File(file) => return zero(file, offset, len, unmap),
            Kind::Layered { top, .. } => top,
        };
        self.copy_edges_up(top, offset, len)?;
        zero(&top.file, offset, len, true)?;
        top.has.add(blocks_of(offset, len));
        Ok(())
    }

    /// Makes the blocks that a range has only a part of `top`'s, so that the part can be written.
    fn copy_edges_up(&self, top: &Overlay, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        for at in [offset, end] {
            let block = at / BLOCK;
            if at % BLOCK == 0 || len == 0 || top.has.has(block) {
                continue;
            }
            let mut bytes = [0; PAGE_SIZE];
            self.read_block(block, &mut bytes)?;
            top.file.write_all_at(&bytes, block * BLOCK)?;
            top.has.add(block..block + 1);
        }
        Ok(())
    }
}

/// Reads a block of a disk of `disk_bytes` bytes that is where it belongs in `file`.
pub(super) fn read_block_of(
    file: &File,
    block: u64,
    disk_bytes: u64,
    bytes: &mut BlockBytes,
) -> io::Result<()> {
    let offset = block * BLOCK;
    let len = usize::try_from(disk_bytes.saturating_sub(offset)).unwrap_or(PAGE_SIZE);
    let (on_disk, behind) = bytes.split_at_mut(len.min(PAGE_SIZE));
    behind.fill(0);
    file.read_exact_at(on_disk, offset).map_err(shorter)
}

fn shorter(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the image has become shorter"),
        _ => error,
    }
}

fn read_exactly(file: &File, slices: &mut Vec<GuestSlice>, mut offset: u64) -> io::Result<()> {
    while !slices.is_empty() {
        let done = retry(|| vectored::read_at(file, slices, offset))?;
        if done == 0 {
            return Err(shorter(ErrorKind::UnexpectedEof.into()));
        }
        split_front(slices, done);
        offset += done as u64;
    }
    Ok(())
}

fn read_source(
    source: &dyn BlockSource,
    mut slices: Vec<GuestSlice>,
    mut offset: u64,
) -> io::Result<()> {
    let mut bytes = [0; PAGE_SIZE];
    while !slices.is_empty() {
        source.read(offset / BLOCK, &mut bytes)?;
        let from = usize::try_from(offset % BLOCK).unwrap_or(0);
        let done = copy_to(&split_front(&mut slices, PAGE_SIZE - from), &bytes[from..]);
        offset += done as u64;
    }
    Ok(())
}

fn write_all(file: &File, slices: &mut Vec<GuestSlice>, mut offset: u64) -> io::Result<()> {
    while !slices.is_empty() {
        let done = retry(|| vectored::write_at(file, slices, offset))?;
        if done == 0 {
            return Err(io::Error::new(
                ErrorKind::WriteZero,
                "the image takes no more",
            ));
        }
        split_front(slices, done);
        offset += done as u64;
    }
    Ok(())
}

fn zero(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    let how = if unmap {
        FallocateFlags::PUNCH_HOLE
    } else {
        FallocateFlags::ZERO_RANGE
    };
    match fallocate(file, how | FallocateFlags::KEEP_SIZE, offset, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            let (zeroes, end) = ([0; 0x4000], offset + len);
            let mut at = offset;
            while at < end {
                let part = (end - at).min(zeroes.len() as u64);
                let part = usize::try_from(part).unwrap_or(zeroes.len());
                file.write_all_at(&zeroes[..part], at)?;
                at += part as u64;
            }
            Ok(())
        }
        result => Ok(result?),
    }
}

/// The next run of blocks that are not all hole. Where holes cannot be told, as on a block device, there are none.
pub(super) fn data_in_file(file: &File, from: u64, bytes: u64) -> io::Result<Option<Range<u64>>> {
    let blocks = bytes.div_ceil(BLOCK);
    let mut at = from * BLOCK;
    while at < bytes {
        at = match seek(file, SeekFrom::Data(at)) {
            Ok(at) => at,
            Err(Errno::NXIO) if seek(file, SeekFrom::End(0))? < bytes => {
                return Err(shorter(ErrorKind::UnexpectedEof.into()));
            }
            // A hole up to the end.
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(from..blocks)),
            Err(errno) => return Err(errno.into()),
        };
        let hole = seek(file, SeekFrom::Hole(at))?;
        // Else what was data has just become a hole.
        if hole > at {
            let run = at / BLOCK..hole.div_ceil(BLOCK).min(blocks);
            return Ok((run.start < run.end).then_some(run));
        }
    }
    Ok(None)
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
