//! The guest's physical address map.
//!
//! ```text
//! 0x0000_0500  GDT, IDT           0x0000_9000  page tables (PML4, PDPT, PDs)
//! 0x0000_7000  boot_params        0x0002_0000  kernel command line
//! 0x0009_fc00  MP table (EBDA)    0x0010_0000  kernel and the rest of RAM
//! 0xc000_0000  hole: devices      0x1_0000_0000  RAM that did not fit below, then files (pmem)
//! ```

/// Global descriptor table of the 64-bit entry.
pub const GDT_START: u64 = 0x500;
/// Empty interrupt descriptor table of the 64-bit entry.
pub const IDT_START: u64 = 0x520;
/// Initial stack pointer; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// `struct boot_params`, "zero page" (Linux, Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Top-level page table of the 64-bit entry.
pub const PML4_START: u64 = 0x9000;
/// Page directory pointer table.
pub const PDPT_START: u64 = 0xa000;
/// Four page directories: an identity map of the first 4 GiB.
pub const PD_START: u64 = 0xb000;
/// The kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Bytes that the command line may take, its NUL included (COMMAND_LINE_SIZE of x86 Linux).
pub const CMDLINE_MAX: usize = 2048;
/// End of the RAM that is usable below 1 MiB; the MP table follows.
pub const EBDA_START: u64 = 0x9_fc00;
/// Where RAM resumes above the legacy hole.
pub const HIMEM_START: u64 = 0x10_0000;

/// Start of the hole below 4 GiB: MMIO devices and the interrupt controllers.
pub const GAP_START: u64 = 0xc000_0000;
/// End of the hole; RAM continues here.
pub const GAP_END: u64 = 0x1_0000_0000;

/// First virtio-mmio window; the others follow it.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// GSI of the first virtio device. ISA interrupts below it have PC meanings.
pub const VIRTIO_GSI_START: u32 = 5;
/// Last GSI of the IOAPIC.
pub const GSI_MAX: u32 = 23;

/// Two pages, in one of which there may be memory that nobody uses (`kvm/decoy.rs`).
pub const DECOY_START: u64 = 0xe000_0000;

/// Registers of the lane.
pub const LANE_START: u64 = 0xd800_0000;
/// Interrupt of the lane: a PC's COM2, which no machine here has.
pub const LANE_GSI: u32 = 3;

/// IOAPIC, as KVM's in-kernel model has it.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Local APIC.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Three pages that Intel's VMX needs for real mode (KVM_SET_TSS_ADDR).
pub const KVM_TSS_START: usize = 0xfffb_d000;

/// First port of COM1.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Interrupt of COM1.
pub const SERIAL_GSI: u32 = 4;
/// First port of the keyboard controller, whose reset line Linux pulls with `reboot=k`.
pub const I8042_PORT: u64 = 0x60;

/// What Linux can add to its memory map: a file's guest memory is a multiple of it (SUBSECTION_SIZE).
pub const PMEM_GRANULE: u64 = 2 << 20;
/// Where a file's memory may start, so that it shares no section of Linux's memory map with RAM or another file.
pub const PMEM_ALIGN: u64 = 128 << 20;

/// First address for a file's memory above `end`, the end of RAM or of the file before it.
pub fn pmem_start(end: u64) -> u64 {
    end.max(GAP_END).next_multiple_of(PMEM_ALIGN)
}

/// RAM ranges, as (start, length), for `bytes` of memory: one below the hole, and
/// one from 4 GiB where that is not enough.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= GAP_START {
        vec![(0, bytes)]
    } else {
        vec![(0, GAP_START), (GAP_END, bytes - GAP_START)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_above_ram() {
        for (end, start) in [
            (32 << 20, GAP_END),
            (GAP_START, GAP_END),
            (GAP_END, GAP_END),
            (GAP_END + 1, GAP_END + PMEM_ALIGN),
            (GAP_END + PMEM_ALIGN, GAP_END + PMEM_ALIGN),
        ] {
            assert_eq!(pmem_start(end), start);
        }
    }

    #[test]
    fn ram_skips_the_hole() {
        assert_eq!(ram_ranges(GAP_START), [(0, GAP_START)]);
        assert_eq!(
            ram_ranges(GAP_START + 4096),
            [(0, GAP_START), (GAP_END, 4096)]
        );
        assert_eq!(ram_ranges(32 << 20), [(0, 32 << 20)]);
    }
}
