//! Kernel images: ELF and bzImage headers that lie.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm::arch::x86_64::kernel::Kernel;
use vmm::memory::GuestMemory;

/// Bytes of the guest's RAM.
const RAM: u64 = 4 << 20;
const HIMEM: u64 = 1 << 20;

/// A file.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    base: Base,
    /// Bytes written over it: where, and what.
    patches: Vec<(u16, [u8; 4])>,
    /// Its length, if it is to be cut or to be stretched.
    len: Option<u32>,
}

/// What the file looks like at first.
#[derive(Arbitrary, Clone, Debug)]
pub enum Base {
    /// Nothing in particular.
    Raw(Vec<u8>),
    /// An ELF executable: entry, where the table is, segments.
    Elf(u64, Option<u64>, Vec<Segment>),
    /// A bzImage.
    BzImage {
        /// Sectors of the setup code.
        setup_sects: u8,
        /// Units of 16 bytes of the rest.
        syssize: u32,
        /// Where it would like to be.
        pref_address: u64,
        /// Memory that it takes.
        init_size: u32,
    },
}

/// A program header: type, offset, address, length in the file, length in memory.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Segment {
    other_type: Option<u32>,
    offset: Number,
    address: Number,
    len: Number,
    size: Number,
}

/// A number of a header.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Number {
    /// A small one.
    Small(u16),
    /// One near the beginning of high memory.
    High(u16),
    /// One near the end of RAM.
    End(u16),
    /// Any.
    Any(u64),
}

impl Number {
    fn value(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::High(value) => HIMEM + u64::from(value),
            Self::End(value) => RAM - 0x8000 + u64::from(value),
            Self::Any(value) => value,
        }
    }
}

fn memory() -> &'static GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    MEMORY.get_or_init(|| vmm::memory::create(&[(0, RAM)]).expect("memory"))
}

/// Opens the file, and loads it if it is a kernel.
pub fn run(input: &Input) {
    let mut bytes = match &input.base {
        Base::Raw(bytes) => bytes.clone(),
        Base::Elf(entry, table, segments) => elf(*entry, *table, segments),
        Base::BzImage {
            setup_sects,
            syssize,
            pref_address,
            init_size,
        } => bzimage(*setup_sects, *syssize, *pref_address, *init_size),
    };
    for (at, patch) in &input.patches {
        if let Some(place) = bytes
            .get_mut(usize::from(*at)..)
            .and_then(<[u8]>::first_chunk_mut)
        {
            *place = *patch;
        }
    }
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memory file"));
    file.write_all_at(&bytes, 0).expect("a file");
    if let Some(len) = input.len {
        file.set_len(u64::from(len) % (2 * RAM)).expect("a file");
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(kernel) = Kernel::open(&path, RAM) else {
        return;
    };
    if let Ok(loaded) = kernel.load(memory()) {
        assert!(
            (HIMEM..RAM).contains(&loaded.entry),
            "entered at {:#x}",
            loaded.entry
        );
    }
}

fn elf(entry: u64, table: Option<u64>, segments: &[Segment]) -> Vec<u8> {
    let segments = &segments[..segments.len().min(16)];
    let mut bytes = vec![0; 64];
    bytes[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    bytes[16] = 2;
    bytes[18] = 62;
    bytes[24..32].copy_from_slice(&entry.to_le_bytes());
    bytes[32..40].copy_from_slice(&table.unwrap_or(64).to_le_bytes());
    bytes[54] = 56;
    bytes[56] = segments.len() as u8;
    for segment in segments {
        let mut header = [0; 56];
        header[..4].copy_from_slice(&segment.other_type.unwrap_or(1).to_le_bytes());
        header[8..16].copy_from_slice(&segment.offset.value().to_le_bytes());
        header[24..32].copy_from_slice(&segment.address.value().to_le_bytes());
        header[32..40].copy_from_slice(&segment.len.value().to_le_bytes());
        header[40..48].copy_from_slice(&segment.size.value().to_le_bytes());
        bytes.extend(header);
    }
    bytes.resize(0x4000, 0x90);
    bytes
}

fn bzimage(setup_sects: u8, syssize: u32, pref_address: u64, init_size: u32) -> Vec<u8> {
    let mut bytes = vec![0; 0x4000];
    bytes[0x1f1] = setup_sects;
    bytes[0x1f4..0x1f8].copy_from_slice(&syssize.to_le_bytes());
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    bytes[0x236] = 1;
    bytes[0x258..0x260].copy_from_slice(&pref_address.to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    bytes
}
