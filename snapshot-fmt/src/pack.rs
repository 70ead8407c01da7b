//! `<id>.bough`: a snapshot in one compressed file, for storage and transfer.
//!
//! | part | bytes |
//! | --- | --- |
//! | header | 128 |
//! | frames: zstd (RFC 8878), each by itself | |
//! | table: compressed length (4), length (4), hash as of a page (16) of each frame | 24 each |
//!
//! Little endian. The header's numbers are the frames and the bytes of the file; the body's digest is that of the table. Decompressed and one behind the other, the frames are the manifest
//! (one frame), the files in the manifest's order, and the working set if there is one. A file begins with a frame of its own, and
//! no frame has more than 1 MiB: so any part of any file is found by the table, and costs one frame.
//!
//! What is unpacked is checked as any snapshot is: the compressed form needs no trust of its own.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use zstd::bulk::{Compressor, Decompressor};

use crate::as_usize;
use crate::digest::{Digest, PageHash};
use crate::error::{FormatError, WriteError};
use crate::file::{NamedFile, open, within, write_at};
use crate::header::{HEADER_LEN, Header, Kind};
use crate::manifest::{MANIFEST, Manifest, WORKING_SET};
use crate::snapshot::Snapshot;
use crate::working_set::WORKING_SET_MAX;

/// Most bytes of a frame, decompressed. A manifest is no longer.
pub const FRAME_MAX: usize = 1 << 20;
/// Most frames: 16 TiB.
pub const FRAMES_MAX: u64 = 1 << 24;
/// Most bytes of a frame as it is: what zstd makes of random bytes is a little more than they are.
const COMPRESSED_MAX: u64 = FRAME_MAX as u64 + (64 << 10);
const ENTRY_BYTES: u64 = 24;
/// Most bytes of a file that no manifest lists.
const UNLISTED_MAX: u64 = 4 * WORKING_SET_MAX + HEADER_LEN as u64;
/// zstd's default: more takes much longer and saves little on memory.
const LEVEL: i32 = 3;

/// Packs `snapshot` into the empty file `file`, which `path` names in messages. The caller syncs it.
///
/// Returns the length in bytes. The snapshot is not verified: what is corrupt in it will be refused when it is unpacked.
pub fn pack(snapshot: &Snapshot, file: &File, path: &Path) -> Result<u64, WriteError> {
    let compressor = Compressor::new(LEVEL).map_err(|source| WriteError::Io {
        file: path.to_owned(),
        offset: 0,
        source,
    })?;
    let mut writer = Packer {
        file,
        path,
        compressor,
        table: Vec::new(),
        offset: HEADER_LEN as u64,
    };
    writer.add(&snapshot.path(MANIFEST))?;
    for entry in &snapshot.manifest().files {
        writer.add(&snapshot.path(&entry.name))?;
    }
    let working_set = snapshot.path(WORKING_SET);
    if working_set.exists() {
        writer.add(&working_set)?;
    }
    writer.finish()
}

struct Packer<'a> {
    file: &'a File,
    path: &'a Path,
    compressor: Compressor<'static>,
    table: Vec<u8>,
    offset: u64,
}

impl Packer<'_> {
    fn add(&mut self, path: &Path) -> Result<(), WriteError> {
        let mut from = open(path, "a file of the snapshot")?;
        let mut frame = Vec::with_capacity(FRAME_MAX);
        let mut done = 0;
        loop {
            frame.clear();
            let read = from.by_ref().take(FRAME_MAX as u64).read_to_end(&mut frame);
            let read = read.map_err(|source| FormatError::Io {
                file: path.to_owned(),
                offset: done,
                what: "a file of the snapshot",
                source,
            })?;
            if read == 0 {
                return Ok(());
            }
            done += read as u64;
            self.frame(&frame)?;
        }
    }

    fn frame(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let compressed = self
            .compressor
            .compress(bytes)
            .map_err(|source| WriteError::Io {
                file: self.path.to_owned(),
                offset: self.offset,
                source,
            })?;
        write_at(self.file, self.path, &compressed, self.offset)?;
        self.offset += compressed.len() as u64;
        for len in [compressed.len(), bytes.len()] {
            // At most COMPRESSED_MAX.
            self.table.extend(&(len as u64).to_le_bytes()[..4]);
        }
        self.table.extend(PageHash::of_bytes(&compressed).0);
        Ok(())
    }

    fn finish(self) -> Result<u64, WriteError> {
        let frames = self.table.len() as u64 / ENTRY_BYTES;
        within(self.path, "the number of frames", frames, FRAMES_MAX)?;
        write_at(self.file, self.path, &self.table, self.offset)?;
        let bytes = self.offset + self.table.len() as u64;
        let header = Header {
            kind: Kind::Pack,
            numbers: [frames, bytes, 0, 0, 0, 0],
            body: Digest::of(&self.table),
        };
        write_at(self.file, self.path, &header.encode(), 0)?;
        Ok(bytes)
    }
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    offset: u64,
    compressed: u64,
    len: u64,
    hash: PageHash,
}

/// A packed snapshot that is open: its table and its manifest have been read and checked.
#[derive(Debug)]
pub struct Pack {
    file: NamedFile,
    frames: Vec<Frame>,
    manifest: Manifest,
    manifest_json: Vec<u8>,
}

impl Pack {
    /// Opens a packed snapshot; `path` names it in messages.
    pub fn open(file: File, path: &Path) -> Result<Self, FormatError> {
        let file = NamedFile::new(file, path, Kind::Pack.name())?;
        let frames = read_table(&file)?;
        let mut buffer = Vec::new();
        match frames.first() {
            Some(first) => read_frame(&file, first, &mut Inflate::new(&file)?, &mut buffer)?,
            None => return Err(file.corrupt(Header::number_at(0), "it has no manifest")),
        }
        let manifest = Manifest::parse(&buffer, &path.join(MANIFEST))?;
        Ok(Self {
            file,
            frames,
            manifest,
            manifest_json: buffer,
        })
    }

    /// What it holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes that it takes when unpacked.
    pub fn unpacked_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len).sum()
    }

    /// Writes the snapshot's files to the empty directory `dir`, and checks all of them.
    pub fn unpack(&self, dir: &Path) -> Result<Snapshot, WriteError> {
        let manifest_path = dir.join(MANIFEST);
        fs::write(&manifest_path, &self.manifest_json).map_err(|source| WriteError::Io {
            file: manifest_path,
            offset: 0,
            source,
        })?;
        let mut inflate = Inflate::new(&self.file)?;
        let mut frames = self.frames[1..].iter();
        let files = self.manifest.files.iter();
        for (name, bytes) in files
            .map(|entry| (&entry.name[..], Some(entry.bytes)))
            .chain([(WORKING_SET, None)])
        {
            if bytes.is_none() && frames.len() == 0 {
                break;
            }
            self.unpack_file(dir.join(name), bytes, &mut frames, &mut inflate)?;
        }
        let snapshot = Snapshot::open(dir)?;
        snapshot.verify()?;
        Ok(snapshot)
    }

    /// Writes a file of `bytes` bytes, or of all that is left.
    fn unpack_file<'a>(
        &self,
        path: PathBuf,
        bytes: Option<u64>,
        frames: &mut impl Iterator<Item = &'a Frame>,
        inflate: &mut Inflate,
    ) -> Result<(), WriteError> {
        let file = File::create_new(&path).map_err(|source| WriteError::Io {
            file: path.clone(),
            offset: 0,
            source,
        })?;
        let mut buffer = Vec::new();
        let mut done = 0;
        while bytes.is_none_or(|bytes| done < bytes) {
            let Some(frame) = frames.next() else {
                if bytes.is_none() {
                    break;
                }
                let what = format!("its frames end within {}", path.display());
                return Err(self.file.corrupt(self.file.len(), what).into());
            };
            self.file.within(
                done,
                UNLISTED_MAX.max(bytes.unwrap_or(0)),
                frame.offset,
                "the working set in bytes",
            )?;
            read_frame(&self.file, frame, inflate, &mut buffer)?;
            if bytes.is_some_and(|bytes| bytes - done < frame.len) {
                let what = format!("a frame goes on behind the end of {}", path.display());
                return Err(self.file.corrupt(frame.offset, what).into());
            }
            write_at(&file, &path, &buffer, done)?;
            done += frame.len;
        }
        Ok(())
    }
}

/// Reads where the frames are. Their lengths are bounded, and come to that of the file.
fn read_table(file: &NamedFile) -> Result<Vec<Frame>, FormatError> {
    let header = Header::read(file, Kind::Pack)?;
    let count = file.within(
        header.numbers[0],
        FRAMES_MAX,
        Header::number_at(0),
        "the number of frames",
    )?;
    let start = HEADER_LEN as u64;
    let table_len = count * ENTRY_BYTES;
    let bytes = header.numbers[1];
    file.holds(0, bytes.max(start + table_len), "all of it")?;
    file.ends_at(bytes)?;
    let table_at = bytes - table_len;
    let table = file.read_vec(table_at, table_len, "the table")?;
    if Digest::of(&table) != header.body {
        return Err(file.corrupt(
            table_at,
            "the table does not have the digest that the header gives",
        ));
    }
    let mut offset = start;
    let mut frames = Vec::with_capacity(as_usize(count));
    for (entry, at) in table
        .chunks_exact(as_usize(ENTRY_BYTES))
        .zip((table_at..).step_by(as_usize(ENTRY_BYTES)))
    {
        let number = |from: usize| {
            u64::from(u32::from_le_bytes(std::array::from_fn(|byte| {
                entry[from + byte]
            })))
        };
        let compressed = file.within(
            number(0),
            COMPRESSED_MAX,
            at,
            "the compressed length of a frame",
        )?;
        let len = file.within(number(4), FRAME_MAX as u64, at + 4, "the length of a frame")?;
        if len == 0 || compressed == 0 {
            return Err(file.corrupt(at, "a frame is empty"));
        }
        if compressed > table_at - offset {
            return Err(file.corrupt(at, "the frames are longer than the file"));
        }
        let hash = PageHash(std::array::from_fn(|byte| entry[8 + byte]));
        frames.push(Frame {
            offset,
            compressed,
            len,
            hash,
        });
        offset += compressed;
    }
    if offset != table_at {
        return Err(file.corrupt(offset, "the frames end before the table begins"));
    }
    Ok(frames)
}

/// zstd, with its buffers.
struct Inflate {
    zstd: Decompressor<'static>,
    compressed: Vec<u8>,
}

impl Inflate {
    fn new(file: &NamedFile) -> Result<Self, FormatError> {
        let zstd = Decompressor::new().map_err(|source| io_error(file, 0, source))?;
        Ok(Self {
            zstd,
            compressed: Vec::new(),
        })
    }
}

fn io_error(file: &NamedFile, offset: u64, source: io::Error) -> FormatError {
    FormatError::Io {
        file: file.path().to_owned(),
        offset,
        what: "a frame",
        source,
    }
}

/// Decompresses a frame: exactly as much as the table says, into a buffer of no more.
fn read_frame(
    file: &NamedFile,
    frame: &Frame,
    inflate: &mut Inflate,
    out: &mut Vec<u8>,
) -> Result<(), FormatError> {
    inflate.compressed.resize(as_usize(frame.compressed), 0);
    file.read(&mut inflate.compressed, frame.offset, "a frame")?;
    if PageHash::of_bytes(&inflate.compressed) != frame.hash {
        return Err(file.corrupt(
            frame.offset,
            "a frame does not have the hash that the table gives",
        ));
    }
    out.clear();
    out.resize(as_usize(frame.len), 0);
    match inflate
        .zstd
        .decompress_to_buffer(&inflate.compressed, &mut out[..])
    {
        Ok(len) if len as u64 == frame.len => Ok(()),
        Ok(len) => Err(file.corrupt(
            frame.offset,
            format!("a frame has {len} bytes, the table says {}", frame.len),
        )),
        Err(error) => Err(file.corrupt(
            frame.offset,
            format!("a frame cannot be decompressed: {error}"),
        )),
    }
}
