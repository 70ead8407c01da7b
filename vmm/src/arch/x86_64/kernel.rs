//! Loads a kernel: an uncompressed ELF `vmlinux`, or a bzImage.
//!
//! The file is checked before anything is written: what it is, that all of it is there, and that it fits below the
//! device hole. Its contents are as untrusted as the guest's.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::{self, BzImage, KernelLoader};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::layout::HIMEM_START;
use crate::memory::GuestMemory;
use crate::sys::{advise, vectored};

/// `e_machine` of x86-64 (ELF, System V ABI AMD64 supplement).
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const ELF_HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
/// Bytes from the load address of a bzImage to its 64-bit entry point (boot.rst).
const BZIMAGE_ENTRY64: u64 = 0x200;
/// `xloadflags`: the image has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Offsets in a bzImage (boot.rst, "The Real-Mode Kernel Header").
const SETUP_SECTS: u64 = 0x1f1;
const SYSSIZE: u64 = 0x1f4;
const HEADER: u64 = 0x202;
const XLOADFLAGS: u64 = 0x236;
const PREF_ADDRESS: u64 = 0x258;
const INIT_SIZE: u64 = 0x260;

/// Why a kernel could not be loaded.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file cannot be opened or read.
    #[error("cannot read the kernel {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither an x86-64 ELF nor a bzImage.
    #[error("{path} is not a kernel: {why}; give an uncompressed vmlinux or a bzImage for x86-64")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What was expected and not there.
        why: &'static str,
    },
    /// The file ends before the data that its headers name.
    #[error(
        "the kernel {path} is truncated: it has {len} bytes, its headers name {needed}; get it again"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that there are.
        len: u64,
        /// Bytes that there should be.
        needed: u64,
    },
    /// The kernel does not lie within the guest's RAM.
    #[error(
        "the kernel {path} does not fit: it takes guest memory from {start:#x} to {end:#x}, RAM for it is from 0x100000 to {ram_end:#x}; give more --memory"
    )]
    DoesNotFit {
        /// The file.
        path: PathBuf,
        /// Lowest address that it takes.
        start: u64,
        /// First address after it.
        end: u64,
        /// First address after the RAM below the hole.
        ram_end: u64,
    },
    /// It could not be copied into guest memory.
    #[error("cannot copy the kernel {path} into guest memory: {source}")]
    Copy {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The loader found fault with it all the same.
    #[error("cannot load the kernel {path}: {source}")]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        source: loader::Error,
    },
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Guest-physical address of the 64-bit entry point.
    pub entry: u64,
    /// A bzImage's own setup header, for `boot_params`.
    pub setup: Option<setup_header>,
}

/// Bytes of the file that belong into guest memory.
struct Segment {
    /// Offset in the file.
    offset: u64,
    /// Guest-physical address.
    address: u64,
    /// Bytes.
    len: u64,
}

enum Image {
    Elf { entry: u64, segments: Vec<Segment> },
    BzImage,
}

/// A kernel file that was found whole and is ready to be loaded.
pub struct Kernel {
    path: PathBuf,
    file: File,
    image: Image,
}

impl Kernel {
    /// Opens `path` and checks it; `ram_end` is the end of the RAM below the hole, in bytes.
    pub fn open(path: &Path, ram_end: u64) -> Result<Self, KernelError> {
        let read_error = |source| KernelError::Read {
            path: path.to_owned(),
            source,
        };
        // Non-blocking: nobody may be at the other end of a pipe.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(read_error)?;
        let meta = file.metadata().map_err(read_error)?;
        let not = |why| KernelError::NotAKernel {
            path: path.to_owned(),
            why,
        };
        if !meta.is_file() {
            return Err(not("it is no regular file"));
        }
        let check = Check {
            path,
            file: &file,
            len: meta.len(),
            ram_end,
        };
        let mut magic = [0; 4];
        if meta.len() < 4 {
            return Err(not("it has fewer than 4 bytes"));
        }
        file.read_exact_at(&mut magic, 0).map_err(read_error)?;
        let image = if &magic == b"\x7fELF" {
            check.elf()?
        } else {
            check.bzimage()?
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            image,
        })
    }

    /// Copies the kernel into guest memory.
    pub fn load(self, memory: &GuestMemory) -> Result<LoadedKernel, KernelError> {
        let Self {
            path,
            mut file,
            image,
        } = self;
        match image {
            Image::Elf { entry, segments } => {
                for segment in segments {
                    copy_segment(&file, &segment, memory).map_err(|source| KernelError::Copy {
                        path: path.clone(),
                        source,
                    })?;
                }
                Ok(LoadedKernel { entry, setup: None })
            }
            Image::BzImage => {
                let himem = Some(GuestAddress(HIMEM_START));
                let loaded = BzImage::load(memory, himem, &mut file, himem)
                    .map_err(|source| KernelError::Load { path, source })?;
                let entry = loaded.kernel_load.0 + BZIMAGE_ENTRY64;
                Ok(LoadedKernel {
                    entry,
                    setup: loaded.setup_header,
                })
            }
        }
    }
}

/// Copies a segment straight from the host's page cache. Huge pages, where the host gives any, spare most of the page faults,
/// which are what takes the time.
fn copy_segment(kernel: &File, segment: &Segment, memory: &GuestMemory) -> io::Result<()> {
    let len = usize::try_from(segment.len).map_err(io::Error::other)?;
    let start = GuestAddress(segment.address);
    let target = memory.get_slice(start, len).map_err(io::Error::other)?;
    advise::prefer_huge_pages(&target);
    let mut done = 0;
    while done < len {
        let rest = target.offset(done).map_err(io::Error::other)?;
        let offset = segment.offset + done as u64;
        match vectored::read_at(kernel, &[rest], offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The file under examination.
struct Check<'a> {
    path: &'a Path,
    file: &'a File,
    len: u64,
    ram_end: u64,
}

impl Check<'_> {
    fn not(&self, why: &'static str) -> KernelError {
        KernelError::NotAKernel {
            path: self.path.to_owned(),
            why,
        }
    }

    fn bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N], KernelError> {
        self.within(offset, N as u64)?;
        let mut bytes = [0; N];
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|source| KernelError::Read {
            path: self.path.to_owned(),
            source,
        })?;
        Ok(bytes)
    }

    fn within(&self, offset: u64, len: u64) -> Result<(), KernelError> {
        let needed = offset.saturating_add(len);
        if needed > self.len {
            return Err(KernelError::Truncated {
                path: self.path.to_owned(),
                len: self.len,
                needed,
            });
        }
        Ok(())
    }

    fn fits(&self, start: u64, len: u64) -> Result<(), KernelError> {
        let end = start.saturating_add(len);
        if start < HIMEM_START || end > self.ram_end {
            let (path, ram_end) = (self.path.to_owned(), self.ram_end);
            return Err(KernelError::DoesNotFit {
                path,
                start,
                end,
                ram_end,
            });
        }
        Ok(())
    }

    fn elf(&self) -> Result<Image, KernelError> {
        let header: [u8; ELF_HEADER_LEN] = self.bytes(0)?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        if header[4] != 2 || header[5] != 1 || u16_at(18) != EM_X86_64 {
            return Err(self.not("it is an ELF file, but not a 64-bit little-endian x86-64 one"));
        }
        if u16_at(16) != 2 {
            return Err(self.not("it is an ELF file, but no executable (ET_EXEC)"));
        }
        if usize::from(u16_at(54)) != PROGRAM_HEADER_LEN {
            return Err(self.not("its program headers are not of 56 bytes"));
        }
        let table = u64_at(&header, 32);
        let mut segments = Vec::new();
        for index in 0..u64::from(u16_at(56)) {
            let offset = table.saturating_add(index * PROGRAM_HEADER_LEN as u64);
            let program: [u8; PROGRAM_HEADER_LEN] = self.bytes(offset)?;
            if u32_at(&program, 0) != PT_LOAD {
                continue;
            }
            let (offset, address) = (u64_at(&program, 8), u64_at(&program, 24));
            let (len, size) = (u64_at(&program, 32), u64_at(&program, 40));
            self.within(offset, len)?;
            self.fits(address, size.max(len))?;
            segments.push(Segment {
                offset,
                address,
                len,
            });
        }
        if segments.is_empty() {
            return Err(self.not("it is an ELF file with nothing to load"));
        }
        // Segments may not add up to more than RAM: overlapping ones would have the same memory written for hours.
        let total = segments
            .iter()
            .map(|segment| segment.len)
            .fold(0, u64::saturating_add);
        self.fits(HIMEM_START, total)?;
        let entry = u64_at(&header, 24);
        if self.fits(entry, 1).is_err() {
            return Err(self.not("its entry point lies outside of RAM"));
        }
        Ok(Image::Elf { entry, segments })
    }

    fn bzimage(&self) -> Result<Image, KernelError> {
        if self.len < HEADER + 4 || &self.bytes::<4>(HEADER)? != b"HdrS" {
            return Err(self.not("it begins neither as an ELF file nor as a bzImage"));
        }
        if u16::from_le_bytes(self.bytes(XLOADFLAGS)?) & XLF_KERNEL_64 == 0 {
            return Err(self.not("this bzImage has no 64-bit entry point"));
        }
        let sectors = match self.bytes::<1>(SETUP_SECTS)?[0] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let body = u64::from(u32::from_le_bytes(self.bytes(SYSSIZE)?)) * 16;
        // The size is rounded up to 16 bytes, the file need not be.
        self.within((sectors + 1) * 512, body.saturating_sub(15))?;
        let init_size = u64::from(u32::from_le_bytes(self.bytes(INIT_SIZE)?));
        let preferred = u64::from_le_bytes(self.bytes(PREF_ADDRESS)?).max(HIMEM_START);
        // The loader copies up to the end of the file, whatever the header says.
        let rest = self.len.saturating_sub((sectors + 1) * 512);
        self.fits(HIMEM_START, body.max(rest))?;
        self.fits(preferred, init_size)?;
        Ok(Image::BzImage)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..]
        .iter()
        .take(4)
        .rev()
        .fold(0, |value, byte| (value << 8) | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..]
        .iter()
        .take(8)
        .rev()
        .fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// An ELF executable with one segment of `len` bytes at `paddr`.
    fn elf(paddr: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        bytes[16] = 2;
        bytes[18] = 62;
        bytes[24..32].copy_from_slice(&paddr.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 1;
        bytes[72] = 120;
        bytes[88..96].copy_from_slice(&paddr.to_le_bytes());
        bytes[96..104].copy_from_slice(&len.to_le_bytes());
        bytes[104..112].copy_from_slice(&len.to_le_bytes());
        bytes.resize(120 + usize::try_from(len).unwrap_or(0).min(1 << 20), 0x90);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Kernel, KernelError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Kernel::open(file.path(), 32 << 20)
    }

    fn message(bytes: &[u8]) -> String {
        open(bytes).err().expect("refused").to_string()
    }

    #[test]
    fn an_elf_kernel_is_loaded_where_it_says() {
        use vm_memory::Bytes;
        let memory = crate::memory::create(&[(0, 32 << 20)]).unwrap();
        let loaded = open(&elf(0x100_0000, 0x1000))
            .unwrap()
            .load(&memory)
            .unwrap();
        assert_eq!(loaded.entry, 0x100_0000);
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(0x100_0fff)).unwrap(),
            0x90
        );
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        assert!(message(b"").contains("not a kernel: it has fewer than 4 bytes"));
        assert!(message(&[b'#'; 4096]).contains("neither as an ELF file nor as a bzImage"));
        let mut arm = elf(0x100_0000, 16);
        arm[18] = 183;
        assert!(message(&arm).contains("not a 64-bit little-endian x86-64 one"));
        let mut empty = elf(0x100_0000, 16);
        empty[56] = 0;
        assert!(message(&empty).contains("nothing to load"));
    }

    #[test]
    fn truncation_is_found_before_anything_is_loaded() {
        let whole = elf(0x100_0000, 0x1000);
        for len in [5, 63, 100, 121, whole.len() - 1] {
            assert!(message(&whole[..len]).contains("is truncated"), "{len}");
        }
        let mut far = whole.clone();
        far[72..80].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(message(&far).contains("is truncated"));
    }

    #[test]
    fn a_bzimage_with_a_long_tail_does_not_fit() {
        let mut bytes = vec![0; 0x2000];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x236] = 1;
        assert!(open(&bytes).is_ok());
        // Its headers name none of this, but the loader copies it.
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        let error = Kernel::open(file.path(), 32 << 20).err().unwrap();
        assert!(matches!(error, KernelError::DoesNotFit { .. }), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (start, len) in [
            (0, 16),
            (31 << 20, 2 << 20),
            (u64::MAX - 3, 16),
            (0x100_0000, u64::MAX),
        ] {
            let message = message(&elf(start, len));
            assert!(
                message.contains("does not fit") || message.contains("truncated"),
                "{message}"
            );
        }
        assert!(message(&elf((32 << 20) - 8, 16)).contains("--memory"));
    }
}
