//! What a hostile driver does, one step at a time.

use arbitrary::Arbitrary;
use vmm::devices::virtio::testing::{HIGH, ring_base};

use crate::guest::{BUFFERS, HIGH_LEN, LOW_LEN};

/// A guest physical address; most lie where something happens.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// Among the buffers of the first region.
    Buffer(u16),
    /// So many bytes before the end of the first region.
    LowEnd(u8),
    /// In the second region.
    High(u16),
    /// So many bytes before the end of the second region.
    HighEnd(u8),
    /// Between the regions.
    Hole(u16),
    /// In the rings of a queue.
    Ring(u8, u16),
    /// So many bytes before the end of the address space.
    Top(u8),
    /// Anywhere.
    Any(u64),
}

impl Place {
    /// The address.
    pub fn address(self) -> u64 {
        match self {
            Self::Buffer(offset) => BUFFERS + u64::from(offset),
            Self::LowEnd(before) => LOW_LEN - u64::from(before),
            Self::High(offset) => HIGH + u64::from(offset),
            Self::HighEnd(before) => HIGH + HIGH_LEN - u64::from(before),
            Self::Hole(offset) => LOW_LEN + u64::from(offset),
            Self::Ring(queue, offset) => {
                ring_base(usize::from(queue % 3)) + u64::from(offset % 0x1000)
            }
            Self::Top(before) => u64::MAX - u64::from(before),
            Self::Any(address) => address,
        }
    }
}

/// A buffer's length.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Len {
    /// Up to 255 bytes.
    Small(u8),
    /// So many sectors.
    Sectors(u8),
    /// Up to 64 KiB.
    Medium(u16),
    /// Up to 4 GiB.
    Any(u32),
}

impl Len {
    /// In bytes.
    pub fn bytes(self) -> u32 {
        match self {
            Self::Small(len) => len.into(),
            Self::Sectors(count) => u32::from(count) * 512,
            Self::Medium(len) => len.into(),
            Self::Any(len) => len,
        }
    }
}

/// One buffer of a chain.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Buffer {
    /// Where it is.
    pub place: Place,
    /// How long it is.
    pub len: Len,
    /// Whether the device writes it.
    pub write: bool,
}

/// A register that a driver may write.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Register {
    /// `DeviceFeaturesSel`
    DeviceFeaturesSel,
    /// `DriverFeatures`
    DriverFeatures,
    /// `DriverFeaturesSel`
    DriverFeaturesSel,
    /// `QueueSel`
    QueueSel,
    /// `QueueNum`
    QueueNum,
    /// `QueueReady`
    QueueReady,
    /// `QueueNotify`
    QueueNotify,
    /// `InterruptACK`
    InterruptAck,
    /// `Status`
    Status,
    /// One of the six halves of a queue's addresses.
    QueueAddress(u8),
}

impl Register {
    /// Its offset.
    pub fn offset(self) -> u64 {
        match self {
            Self::DeviceFeaturesSel => 0x14,
            Self::DriverFeatures => 0x20,
            Self::DriverFeaturesSel => 0x24,
            Self::QueueSel => 0x30,
            Self::QueueNum => 0x38,
            Self::QueueReady => 0x44,
            Self::QueueNotify => 0x50,
            Self::InterruptAck => 0x64,
            Self::Status => 0x70,
            Self::QueueAddress(which) => {
                [0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4][usize::from(which % 6)]
            }
        }
    }
}

/// What a driver of any device may do.
#[derive(Arbitrary, Clone, Debug)]
pub enum Step {
    /// Writes a register as it should be written.
    Set(Register, u32),
    /// Writes anything anywhere in the window.
    Write(u16, [u8; 8], u8),
    /// Reads anything anywhere in the window.
    Read(u16, u8),
    /// Resets the device and starts it again, with all or without EVENT_IDX.
    Restart(bool),
    /// Offers a chain.
    Chain(u8, Vec<Buffer>),
    /// Writes to guest memory.
    Fill(Place, [u8; 16]),
    /// Writes a descriptor: queue, index, buffer, flags, next.
    Descriptor(u8, u16, Buffer, u16, u16),
    /// Makes a head available.
    Head(u8, u16),
    /// Writes the available index.
    Index(u8, u16),
    /// Rings the doorbell, and lets the device work.
    Kick(u8),
    /// Lets the device work.
    Run,
    /// Saves the device's registers, and compares them with those saved at once again.
    Save,
}
