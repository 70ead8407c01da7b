//! Address decoding: which device answers a port or an MMIO address.
//!
//! Ranges never overlap. An access that no device claims, or that crosses the end of its range, reads as
//! all ones and writes to nothing, as on a PC bus.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// A device on a bus. The offset is relative to the start of its range.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` (1, 2, 4 or 8) bytes at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data.len()` (1, 2, 4 or 8) bytes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty, or wraps around the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps")]
    BadRange {
        /// First address of the range.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device has some of the range.
    #[error("bus range {base:#x}+{len:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address of the range.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the range that is there already.
        other: u64,
    },
}

struct Entry {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A bus: port I/O or MMIO.
#[derive(Default)]
pub struct Bus {
    entries: BTreeMap<u64, Entry>,
}

impl Bus {
    /// Puts `device` at `base`, `len` bytes long.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let end = base
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(BusError::BadRange { base, len })?;
        if let Some((&other, entry)) = self.entries.range(..end).next_back()
            && other + entry.len > base
        {
            return Err(BusError::Overlap { base, len, other });
        }
        self.entries.insert(base, Entry { len, device });
        Ok(())
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (base, entry) = self.entries.range(..=addr).next_back()?;
        let offset = addr - base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= entry.len).then_some((offset, &*entry.device))
    }

    /// Answers a guest's read; says whether a device claimed it.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((offset, device)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Carries out a guest's write; says whether a device claimed it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((offset, device)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Latch(u64, u8);
    impl BusDevice for Latch {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            self.0 = offset;
            data.fill(self.1);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = offset;
            self.1 = data[0];
        }
    }

    fn latch() -> Arc<Mutex<Latch>> {
        Arc::default()
    }

    #[test]
    fn routes_by_range_and_offset() {
        let (mut bus, a, b) = (Bus::default(), latch(), latch());
        bus.insert(0x10, 0x10, a.clone()).unwrap();
        bus.insert(0x20, 0x8, b.clone()).unwrap();
        assert!(bus.write(0x27, &[7]));
        assert_eq!(*b.lock().unwrap(), Latch(7, 7));
        let mut byte = [0];
        assert!(bus.read(0x1f, &mut byte));
        assert_eq!(a.lock().unwrap().0, 0xf);
    }

    #[test]
    fn unclaimed_and_crossing_accesses_read_ones() {
        let mut bus = Bus::default();
        bus.insert(0x10, 0x10, latch()).unwrap();
        for addr in [0, 0xf, 0x1d, 0x20, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x10, 0x10, latch()).unwrap();
        for (base, len) in [(0x10, 1), (0x8, 9), (0x1f, 4), (0, 0x100)] {
            let got = bus.insert(base, len, latch());
            assert_eq!(
                got,
                Err(BusError::Overlap {
                    base,
                    len,
                    other: 0x10
                })
            );
        }
        for (base, len) in [(0x40, 0), (u64::MAX, 2)] {
            let got = bus.insert(base, len, latch());
            assert_eq!(got, Err(BusError::BadRange { base, len }));
        }
        bus.insert(0x8, 8, latch()).unwrap();
        bus.insert(0x20, 8, latch()).unwrap();
    }
}
