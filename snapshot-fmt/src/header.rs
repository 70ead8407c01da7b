//! The header of binary files: what the file is, its version, its numbers, and the digest that the rest hangs on.
//!
//! 128 bytes, little endian:
//!
//! | offset | bytes | |
//! | --- | --- | --- |
//! | 0 | 8 | magic: `89 42 4f 55 47 48 0d 0a` |
//! | 8 | 4 | kind |
//! | 12 | 4 | version of the kind |
//! | 16 | 48 | six numbers of the kind; those that it does not use are zero |
//! | 64 | 32 | digest of the body, as the kind defines it |
//! | 96 | 32 | digest of the bytes 0 to 95: *the digest of the file* |
//!
//! The first 16 bytes mean the same in every version, so a reader can tell what is too new for it. The body's digest covers, directly or by
//! hashes of hashes, every byte of the file: whoever knows the digest of a file knows its content.

use std::path::Path;

use crate::digest::Digest;
use crate::error::FormatError;
use crate::file::NamedFile;

/// Bytes of a header.
pub const HEADER_LEN: usize = 128;
/// How many numbers a header holds.
pub const NUMBERS: usize = 6;

/// The first byte is no text, the last two are changed by whatever changes line ends.
const MAGIC: [u8; 8] = *b"\x89BOUGH\r\n";
const NUMBERS_AT: usize = 16;
const BODY_AT: usize = 64;
const DIGEST_AT: usize = 96;

/// What a binary file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `state.bin`.
    State,
    /// `*.layer`.
    Layer,
    /// A layer that is only ever in memory.
    LayerInMemory,
    /// `working-set`.
    WorkingSet,
    /// `*.bough`.
    Pack,
}

impl Kind {
    fn code(self) -> [u8; 4] {
        match self {
            Self::State => *b"STAT",
            Self::Layer => *b"LAYR",
            Self::LayerInMemory => *b"LMEM",
            Self::WorkingSet => *b"WSET",
            Self::Pack => *b"PACK",
        }
    }

    /// The version that is written, and the newest that is read.
    pub fn version(self) -> u32 {
        match self {
            Self::State | Self::Layer | Self::LayerInMemory | Self::WorkingSet | Self::Pack => 1,
        }
    }

    /// What it is called in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::State => "a state file",
            Self::Layer => "a layer",
            Self::LayerInMemory => "a layer in memory",
            Self::WorkingSet => "a working set",
            Self::Pack => "a packed snapshot",
        }
    }

    fn used_numbers(self) -> usize {
        match self {
            Self::State => 1,
            Self::Layer | Self::LayerInMemory => 4,
            Self::WorkingSet | Self::Pack => 2,
        }
    }
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the file is.
    pub kind: Kind,
    /// The kind's own numbers.
    pub numbers: [u64; NUMBERS],
    /// Digest of the body.
    pub body: Digest,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.kind.code());
        bytes[12..16].copy_from_slice(&self.kind.version().to_le_bytes());
        for (number, at) in self.numbers.iter().zip((NUMBERS_AT..).step_by(8)) {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes[BODY_AT..DIGEST_AT].copy_from_slice(&self.body.0);
        let digest = Digest::of(&bytes[..DIGEST_AT]);
        bytes[DIGEST_AT..].copy_from_slice(&digest.0);
        bytes
    }

    /// The digest of the file.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode()[..DIGEST_AT])
    }

    /// Where number `index` stands, in bytes.
    pub(crate) fn number_at(index: usize) -> u64 {
        (NUMBERS_AT + 8 * index) as u64
    }

    /// Reads the header of a file that should be a `kind`.
    pub(crate) fn read(file: &NamedFile, kind: Kind) -> Result<Self, FormatError> {
        let mut bytes = [0; HEADER_LEN];
        // What a short file has of it tells what it is.
        let there = usize::try_from(file.len()).unwrap_or(HEADER_LEN).min(16);
        file.read(&mut bytes[..there], 0, "its beginning")?;
        let code = kind.code();
        let known = MAGIC.iter().chain(&code);
        if let Some(at) = bytes[..there]
            .iter()
            .zip(known)
            .position(|(byte, known)| byte != known)
        {
            return Err(FormatError::NotOurs {
                file: file.path().to_owned(),
                offset: at as u64,
                expected: kind.name(),
            });
        }
        if there == 16 {
            check_version(file.path(), kind, word(&bytes[12..16]))?;
        }
        file.holds(0, HEADER_LEN as u64, "the header")?;
        file.read(&mut bytes, 0, "the header")?;
        Self::decode(file, kind, &bytes)
    }

    fn decode(file: &NamedFile, kind: Kind, bytes: &[u8; HEADER_LEN]) -> Result<Self, FormatError> {
        let header = Self {
            kind,
            numbers: std::array::from_fn(|index| {
                let at = NUMBERS_AT + 8 * index;
                u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]))
            }),
            body: Digest(std::array::from_fn(|byte| bytes[BODY_AT + byte])),
        };
        if Digest::of(&bytes[..DIGEST_AT]).0 != bytes[DIGEST_AT..] {
            return Err(file.corrupt(
                DIGEST_AT as u64,
                "the header does not have the digest that it gives",
            ));
        }
        let used = kind.used_numbers();
        if let Some(index) = (used..NUMBERS).find(|&index| header.numbers[index] != 0) {
            return Err(file.corrupt(
                Self::number_at(index),
                "a number that has no meaning is not zero",
            ));
        }
        Ok(header)
    }
}

fn check_version(path: &Path, kind: Kind, found: u32) -> Result<(), FormatError> {
    let file = path.to_owned();
    match found {
        0 => Err(FormatError::Corrupt {
            file,
            offset: 12,
            what: "there is no version 0".to_owned(),
        }),
        _ if found <= kind.version() => Ok(()),
        _ => Err(FormatError::TooNew {
            file,
            offset: 12,
            what: kind.name(),
            found,
            supported: kind.version(),
        }),
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| bytes[byte]))
}
