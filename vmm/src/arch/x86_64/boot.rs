//! The 64-bit Linux boot protocol: what lies in memory when the kernel is entered.
//!
//! Source: Linux, Documentation/arch/x86/boot.rst ("64-bit Boot Protocol") and zero-page.rst. The
//! kernel is entered in long mode, with the first 4 GiB mapped one to one, flat segments, RSI at `boot_params`.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use thiserror::Error;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    self, CMDLINE_MAX, CMDLINE_START, GDT_START, PD_START, PDPT_START, PML4_START,
};
use crate::memory::GuestMemory;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Segments of the entry, in the order of their selectors: null, unused, 64-bit code (0x10), data (0x18).
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Why the boot protocol's data could not be laid out.
#[derive(Debug, Error)]
pub enum BootError {
    /// The command line is longer than Linux takes.
    #[error("kernel command line is {len} bytes, at most {max} are possible: shorten --cmdline")]
    CmdlineTooLong {
        /// Bytes, NUL excluded.
        len: usize,
        /// Limit in bytes, NUL excluded.
        max: usize,
    },
    /// Guest memory refused a write.
    #[error("cannot write boot data to guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Writes the zero page, command line, GDT, IDT and page tables.
///
/// `setup` is a bzImage's own header; an ELF kernel has none. `ram` is `(start, length)` in bytes.
pub fn write_boot_data(
    memory: &GuestMemory,
    ram: &[(u64, u64)],
    cmdline: &str,
    setup: Option<setup_header>,
) -> Result<(), BootError> {
    write_cmdline(memory, cmdline)?;
    let params = zero_page(ram, cmdline.len(), setup);
    memory.write_slice(params.as_slice(), GuestAddress(layout::ZERO_PAGE_START))?;
    write_gdt(memory)?;
    write_page_tables(memory)?;
    Ok(())
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX {
        let (len, max) = (cmdline.len(), CMDLINE_MAX - 1);
        return Err(BootError::CmdlineTooLong { len, max });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(CMDLINE_START))?;
    Ok(())
}

fn zero_page(ram: &[(u64, u64)], cmdline_len: usize, setup: Option<setup_header>) -> boot_params {
    let mut params = boot_params {
        hdr: setup.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // Both are below their limits: the address by the layout, the size by `write_cmdline`.
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE_START).unwrap_or(0);
    params.hdr.cmdline_size = u32::try_from(cmdline_len).unwrap_or(0);

    let map = e820(ram);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    params
}

/// The memory map: RAM, with what lies between the end of conventional memory and 1 MiB reserved.
fn e820(ram: &[(u64, u64)]) -> Vec<boot_e820_entry> {
    let entry = |addr, size, type_| boot_e820_entry {
        addr,
        size,
        r#type: type_,
    };
    let mut map = vec![
        entry(0, layout::EBDA_START, E820_RAM),
        entry(
            layout::EBDA_START,
            layout::HIMEM_START - layout::EBDA_START,
            E820_RESERVED,
        ),
    ];
    for &(start, len) in ram {
        let first = start.max(layout::HIMEM_START);
        if start + len > first {
            map.push(entry(first, start + len - first, E820_RAM));
        }
    }
    map
}

fn write_gdt(memory: &GuestMemory) -> Result<(), BootError> {
    for (offset, descriptor) in (GDT_START..).step_by(8).zip(GDT) {
        memory.write_obj(descriptor, GuestAddress(offset))?;
    }
    memory.write_obj(0u64, GuestAddress(layout::IDT_START))?;
    Ok(())
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const PAGE_2M: u64 = 1 << 7;
    memory.write_obj(PDPT_START | PRESENT_WRITABLE, GuestAddress(PML4_START))?;
    let mut directory = [0u64; 512];
    for gib in 0..4u64 {
        let table = PD_START + gib * 0x1000;
        memory.write_obj(table | PRESENT_WRITABLE, GuestAddress(PDPT_START + gib * 8))?;
        for (entry, page) in directory.iter_mut().zip(0u64..) {
            *entry = (gib << 30) | (page << 21) | PRESENT_WRITABLE | PAGE_2M;
        }
        let bytes: Vec<u8> = directory.iter().flat_map(|e| e.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(table))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn memory_map_leaves_out_the_legacy_hole() {
        let map = e820(&layout::ram_ranges(layout::GAP_START + (1 << 30)));
        let parts: Vec<(u64, u64, u32)> = map.iter().map(|e| (e.addr, e.size, e.r#type)).collect();
        assert_eq!(
            parts,
            [
                (0, 0x9fc00, 1),
                (0x9fc00, 0x60400, 2),
                (0x100000, layout::GAP_START - 0x100000, 1),
                (layout::GAP_END, 1 << 30, 1)
            ]
        );
    }

    #[test]
    fn boot_data_is_where_the_protocol_says() {
        let memory = memory();
        write_boot_data(&memory, &[(0, 64 << 20)], "quiet", None).unwrap();
        let magic: u32 = memory
            .read_obj(GuestAddress(layout::ZERO_PAGE_START + 0x202))
            .unwrap();
        assert_eq!(magic, HEADER_MAGIC);
        let ptr: u32 = memory
            .read_obj(GuestAddress(layout::ZERO_PAGE_START + 0x228))
            .unwrap();
        assert_eq!(u64::from(ptr), CMDLINE_START);
        let mut line = [0; 6];
        memory
            .read_slice(&mut line, GuestAddress(CMDLINE_START))
            .unwrap();
        assert_eq!(&line, b"quiet\0");
        let pde: u64 = memory
            .read_obj(GuestAddress(PD_START + 0x3000 + 8))
            .unwrap();
        assert_eq!(pde, 0xc020_0083);
    }

    #[test]
    fn too_long_a_command_line_is_refused() {
        let error = write_boot_data(&memory(), &[], &"x".repeat(2048), None).unwrap_err();
        assert!(
            error.to_string().contains("2048 bytes, at most 2047"),
            "{error}"
        );
    }
}
