//! Makes the smallest of kernels: a few instructions in an ELF file.

use std::io::Write;

use tempfile::NamedTempFile;

/// Guest-physical address at which the code is loaded and entered.
pub const ENTRY: u64 = 0x20_0000;

const HEADER_LEN: u64 = 64;
const PROGRAM_HEADER_LEN: u64 = 56;

/// A 64-bit x86-64 executable with one segment, `code`, that is entered at its first byte.
pub fn kernel(code: &[u8]) -> std::io::Result<NamedTempFile> {
    let offset = HEADER_LEN + PROGRAM_HEADER_LEN;
    let len = code.len() as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, x86-64, version 1
    for field in [ENTRY, HEADER_LEN, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend([0; 4]);
    for field in [64u16, 56, 1, 0, 0, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, readable, writable, executable
    for field in [offset, ENTRY, ENTRY, len, len, 0x1000] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(code);
    let mut file = NamedTempFile::new()?;
    file.write_all(&bytes)?;
    Ok(file)
}
