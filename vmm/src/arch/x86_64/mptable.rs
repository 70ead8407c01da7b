//! The MP table: tells the guest of its processors and of the wiring of its interrupts.
//!
//! Source: Intel MultiProcessor Specification, version 1.4, chapter 4. It takes the place of ACPI's tables:
//! a guest needs no interpreter to read it, which is most of the boot time of an ACPI guest on a software KVM.
//! Every ISA interrupt `n` is wired to IOAPIC pin `n`, edge-triggered and active high.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{EBDA_START, GSI_MAX, IOAPIC_START, LAPIC_START};
use crate::memory::GuestMemory;

const SPEC_REVISION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Family 6, stepping and model 0: Linux only prints it.
const CPU_SIGNATURE: u32 = 0x600;
/// On-chip APIC and FPU.
const CPU_FEATURES: u32 = 0x201;
const BUS_ISA: u8 = 0;

const INTERRUPT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// Writes the floating pointer and the configuration table for `cpus` processors with APIC ids from 0.
pub fn write_mptable(memory: &GuestMemory, cpus: u8) -> Result<(), GuestMemoryError> {
    let table = configuration_table(cpus);
    let table_start = EBDA_START + 16;
    memory.write_slice(&floating_pointer(table_start), GuestAddress(EBDA_START))?;
    memory.write_slice(&table, GuestAddress(table_start))
}

/// The byte that makes all bytes of a structure sum up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

fn le32(address: u64) -> [u8; 4] {
    // The addresses here are constants of the layout, all below 4 GiB.
    u32::try_from(address).unwrap_or(0).to_le_bytes()
}

/// Section 4.1: 16 bytes that say where the table is.
fn floating_pointer(table: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&le32(table));
    bytes[8] = 1; // length in 16-byte units
    bytes[9] = SPEC_REVISION;
    bytes[10] = checksum(&bytes);
    bytes
}

/// Sections 4.2 and 4.3: the header and its entries.
fn configuration_table(cpus: u8) -> Vec<u8> {
    let ioapic_id = cpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..cpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = vec![0, id, APIC_VERSION, flags];
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        entries.push(entry);
    }
    entries.push([&[1, BUS_ISA], b"ISA   ".as_slice()].concat());
    entries.push(
        [
            &[2, ioapic_id, APIC_VERSION, 1],
            le32(IOAPIC_START).as_slice(),
        ]
        .concat(),
    );
    for pin in 0..=u8::try_from(GSI_MAX).unwrap_or(0) {
        entries.push(vec![3, INTERRUPT, 0, 0, BUS_ISA, pin, ioapic_id, pin]);
    }
    entries.push(vec![4, INTERRUPT_EXTINT, 0, 0, BUS_ISA, 0, 0, 0]);
    entries.push(vec![4, INTERRUPT_NMI, 0, 0, BUS_ISA, 0, ALL_APICS, 1]);

    let body = entries.concat();
    // At most 32 processors and 24 pins: some 900 bytes.
    let length = u16::try_from(44 + body.len()).unwrap_or(0);
    let count = u16::try_from(entries.len()).unwrap_or(0);
    let mut table = Vec::with_capacity(usize::from(length));
    table.extend(b"PCMP");
    table.extend(length.to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"BOUGH   MICROVM     ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend(le32(LAPIC_START));
    table.extend([0; 4]); // no extended entries
    table.extend(body);
    table[7] = checksum(&table);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_and_lengths_hold() {
        for cpus in [1, 2, 32] {
            let table = configuration_table(cpus);
            assert_eq!(sum(&table), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            assert_eq!(table.len(), 44 + 20 * usize::from(cpus) + 8 * (2 + 24 + 2));
            assert!(EBDA_START + 16 + table.len() as u64 <= 0xa_0000, "{cpus}");
        }
        assert_eq!(sum(&floating_pointer(0x9fc10)), 0);
    }

    #[test]
    fn only_the_first_processor_boots() {
        let table = configuration_table(3);
        let flags: Vec<u8> = (0..3).map(|cpu| table[44 + 20 * cpu + 3]).collect();
        assert_eq!(flags, [3, 1, 1]);
    }
}
