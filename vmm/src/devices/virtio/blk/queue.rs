//! Requests to a disk (Virtio 1.2, section 5.2.6), of any framing.
//!
//! A request that can be answered is: a bad one with IOERR, an unknown one with UNSUPP. Only a chain
//! without room for the status stops the device. A request reaches the disk's content only after every
//! sector of it was found to be on the disk.
//!
//! A request may name the same guest memory many times, and the disk may be large and sparse: what one
//! request moves is bounded by [`MAX_TRANSFER`], however much its buffers come to.

use std::io;
use std::sync::Arc;

use super::disk::Disk;
use crate::devices::virtio::queue::{
    Buffers, Chain, QueueError, copy_from, copy_to, split_front, total_len,
};
use crate::devices::virtio::signal::Signal;
use crate::devices::virtio::{GuestMemory, GuestSlice};

/// Bytes in a sector, whatever the block size.
pub const SECTOR: u64 = 512;
/// Most ranges of one DISCARD request.
pub(super) const MAX_RANGES: u32 = 16;
/// Most ranges of one WRITE_ZEROES request.
pub(super) const MAX_ZEROES_RANGES: u32 = 4;
/// Most bytes of one request, 64 MiB. Linux makes requests of at most 4 MiB unless it is told otherwise.
pub(super) const MAX_TRANSFER: u64 = 64 << 20;
/// Most sectors of one range to discard: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one range to zero: 16 MiB, as they may have to be written.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 15;

const HEADER_LEN: usize = 16;
const RANGE_LEN: usize = 16;
const UNMAP: u32 = 1;

/// Request types.
mod request_type {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// What a request came to; the number is its status byte.
#[derive(Debug)]
enum Failure {
    Io(String),
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        Self::Io(match error.kind() {
            StorageFull | QuotaExceeded => format!("{error}; make room where the disk is kept"),
            _ => error.to_string(),
        })
    }
}

impl From<&str> for Failure {
    fn from(reason: &str) -> Self {
        Self::Io(reason.into())
    }
}

/// The disk, as requests see it.
pub(super) struct Target {
    pub(super) disk: Arc<Disk>,
    pub(super) serial: [u8; 20],
}

impl Target {
    /// Carries out the request in `chain` and writes its status; returns the used length, and adds the
    /// bytes that it may have moved to `moved`.
    pub(super) fn request<'m>(
        &self,
        memory: &'m GuestMemory,
        chain: Chain<'m>,
        signal: &Signal,
        moved: &mut u64,
    ) -> Result<u32, QueueError> {
        let head = chain.head_index();
        let mut buffers = Buffers::collect(memory, chain)?;
        // The status is the last writable byte; all before it is for data.
        let writable_len = total_len(&buffers.writable);
        let mut writable = std::mem::take(&mut buffers.writable);
        let data_len = usize::try_from(writable_len).ok();
        let Some(data_len) = data_len.and_then(|len| len.checked_sub(1)) else {
            let reason = "a disk request without room for its status".into();
            return Err(QueueError::Request { head, reason });
        };
        let data = split_front(&mut writable, data_len);
        let status = match self.carry_out(&mut buffers.readable, data) {
            Ok(bytes) => {
                *moved = moved.saturating_add(bytes);
                0
            }
            Err(Failure::Io(reason)) => {
                signal.warn(format_args!("request failed: {reason}"));
                1
            }
            Err(Failure::Unsupported) => 2,
        };
        copy_to(&writable, &[status]);
        // The driver finds the status only if the length covers it.
        Ok(u32::try_from(writable_len).unwrap_or(u32::MAX))
    }

    /// Returns the bytes that were moved.
    fn carry_out(
        &self,
        readable: &mut Vec<GuestSlice>,
        writable: Vec<GuestSlice>,
    ) -> Result<u64, Failure> {
        let mut header = [0; HEADER_LEN];
        let front = split_front(readable, HEADER_LEN);
        if copy_from(&front, &mut header) != HEADER_LEN {
            return Err("its header is too short".into());
        }
        let [kind, _, sector_low, sector_high] = le_words(&header);
        let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
        match kind {
            request_type::IN => self.read(sector, writable),
            request_type::OUT => self.write(sector, readable),
            request_type::FLUSH => {
                self.disk.flush()?;
                Ok(0)
            }
            request_type::GET_ID => {
                copy_to(&writable, &self.serial);
                Ok(0)
            }
            request_type::DISCARD | request_type::WRITE_ZEROES => self.ranges(kind, readable),
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(&self, sector: u64, mut slices: Vec<GuestSlice>) -> Result<u64, Failure> {
        let len = transfer(&slices)?;
        self.disk.read(&mut slices, self.offset(sector, len)?)?;
        Ok(len)
    }

    fn write(&self, sector: u64, slices: &mut Vec<GuestSlice>) -> Result<u64, Failure> {
        if self.disk.read_only() {
            return Err("the disk is read-only".into());
        }
        let len = transfer(slices)?;
        self.disk.write(slices, self.offset(sector, len)?)?;
        Ok(len)
    }

    /// Where `sector` is, if it and `len` bytes from it on are on the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if !len.is_multiple_of(SECTOR) {
            return Err(Failure::Io(format!("{len} bytes are not whole sectors")));
        }
        sector
            .checked_add(len / SECTOR)
            .filter(|&end| end <= self.disk.sectors())
            .map(|_| sector * SECTOR)
            .ok_or_else(|| {
                Failure::Io(format!(
                    "sector {sector} and {len} bytes are past the end, {} sectors",
                    self.disk.sectors()
                ))
            })
    }

    /// DISCARD and WRITE_ZEROES: a list of ranges, all of which are checked before the first is done.
    /// Returns the bytes that may have been written.
    fn ranges(&self, kind: u32, readable: &[GuestSlice]) -> Result<u64, Failure> {
        if self.disk.read_only() {
            // Neither is offered then.
            return Err(Failure::Unsupported);
        }
        let len = total_len(readable);
        let discard = kind == request_type::DISCARD;
        let most = if discard {
            MAX_RANGES
        } else {
            MAX_ZEROES_RANGES
        };
        let most = u64::from(most) * RANGE_LEN as u64;
        if len == 0 || !len.is_multiple_of(RANGE_LEN as u64) || len > most {
            return Err(Failure::Io(format!("{len} bytes are not a list of ranges")));
        }
        let mut list = [0; MAX_RANGES as usize * RANGE_LEN];
        let len = copy_from(readable, &mut list);
        let mut ranges = Vec::new();
        let mut zeroed = 0;
        for range in list[..len].chunks_exact(RANGE_LEN) {
            let [sector_low, sector_high, sectors, flags] = le_words(range);
            // Section 5.2.6.2: reserved bits, and unmap for a discard, are not supported.
            if flags & !UNMAP != 0 || discard && flags != 0 {
                return Err(Failure::Unsupported);
            }
            let most = if discard {
                MAX_DISCARD_SECTORS
            } else {
                MAX_ZEROES_SECTORS
            };
            if sectors > most {
                return Err("its range is longer than the configuration allows".into());
            }
            let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
            let len = u64::from(sectors) * SECTOR;
            ranges.push((self.offset(sector, len)?, len, flags & UNMAP != 0));
        }
        for (offset, len, unmap) in ranges {
            match (len, discard) {
                (0, _) => {}
                (_, true) => self.disk.discard(offset, len)?,
                (_, false) => {
                    self.disk.write_zeroes(offset, len, unmap)?;
                    zeroed += len;
                }
            }
        }
        Ok(zeroed)
    }
}

/// Length of a transfer's data, if it may be that long.
fn transfer(slices: &[GuestSlice]) -> Result<u64, Failure> {
    let len = total_len(slices);
    if len > MAX_TRANSFER {
        return Err(Failure::Io(format!(
            "{len} bytes are more than a request may have, {MAX_TRANSFER}"
        )));
    }
    Ok(len)
}

/// Four little-endian words from 16 bytes.
fn le_words(bytes: &[u8]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}
