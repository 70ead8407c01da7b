//! The extents of a layer: runs of pages that are stored, or zero.

use super::Shape;
use crate::as_usize;
use crate::error::FormatError;
use crate::file::NamedFile;

/// Bytes of an extent in the file.
pub(super) const EXTENT_BYTES: u64 = 16;
const EXTENT_LEN: usize = as_usize(EXTENT_BYTES);

const DATA: u32 = 1;
const ZERO: u32 = 2;

/// What a layer has for the pages of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored pages, one behind the other.
    Data {
        /// Index of the first among the stored pages.
        first_stored: u64,
    },
    /// Zeros, whatever the parent has.
    Zero,
}

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first page.
    pub first_page: u64,
    /// How many: at least one.
    pub count: u64,
    /// What is there.
    pub kind: ExtentKind,
}

impl Extent {
    /// The page behind the last.
    pub fn end(&self) -> u64 {
        self.first_page + self.count
    }

    /// As the file has it.
    pub(super) fn encode(&self) -> [u8; EXTENT_LEN] {
        let kind = match self.kind {
            ExtentKind::Data { .. } => DATA,
            ExtentKind::Zero => ZERO,
        };
        let mut bytes = [0; EXTENT_LEN];
        bytes[..8].copy_from_slice(&self.first_page.to_le_bytes());
        // A layer spans fewer than 2^32 pages.
        bytes[8..12].copy_from_slice(&self.count.to_le_bytes()[..4]);
        bytes[12..].copy_from_slice(&kind.to_le_bytes());
        bytes
    }
}

/// Reads the extents: in ascending order, inside the space, and as many pages of each kind as the header says.
pub(super) fn parse(
    file: &NamedFile,
    shape: &Shape,
    bytes: &[u8],
) -> Result<Vec<Extent>, FormatError> {
    let mut extents = Vec::with_capacity(bytes.len() / EXTENT_LEN);
    let (mut next, mut data, mut zero) = (0, 0, 0);
    let mut at = shape.extents_at();
    for entry in bytes.chunks_exact(EXTENT_LEN) {
        let number =
            |from: usize| u32::from_le_bytes(std::array::from_fn(|byte| entry[from + byte]));
        let first_page = u64::from(number(0)) | u64::from(number(4)) << 32;
        let count = u64::from(number(8));
        let corrupt = |what: &str| {
            Err(file.corrupt(
                at,
                format!("the extent of {count} pages from page {first_page} {what}"),
            ))
        };
        if first_page < next {
            return corrupt("is not behind the one before it");
        }
        // No overflow: the first is checked alone.
        if first_page > shape.total_pages || count > shape.total_pages - first_page {
            return corrupt("ends behind the layer's space");
        }
        if count == 0 {
            return corrupt("is empty");
        }
        let kind = match number(12) {
            DATA => {
                let first_stored = data;
                data += count;
                ExtentKind::Data { first_stored }
            }
            ZERO => {
                zero += count;
                ExtentKind::Zero
            }
            _ => return corrupt("is of no known kind"),
        };
        next = first_page + count;
        at += EXTENT_BYTES;
        extents.push(Extent {
            first_page,
            count,
            kind,
        });
    }
    for (have, say, what) in [
        (data, shape.data_pages, "stored"),
        (zero, shape.zero_pages, "zero"),
    ] {
        if have != say {
            let what = format!("the extents have {have} {what} pages, the header says {say}");
            return Err(file.corrupt(shape.extents_at(), what));
        }
    }
    Ok(extents)
}
