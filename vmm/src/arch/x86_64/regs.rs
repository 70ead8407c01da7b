//! Registers of a virtual processor at the kernel's 64-bit entry point.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use super::boot::GDT;
use super::layout::{BOOT_STACK, GDT_START, IDT_START, PML4_START, ZERO_PAGE_START};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Local vector table entries of the local APIC (Intel SDM volume 3, 11.5.1).
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVERY_NMI: u8 = 4;
const DELIVERY_EXTINT: u8 = 7;

/// General registers: entry point, stack, `boot_params` in RSI.
pub fn entry_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rflags: 2, // bit 1 is always set
        rip: entry,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rsi: ZERO_PAGE_START,
        ..Default::default()
    }
}

/// x87 and SSE control words as after FNINIT and a reset.
pub fn entry_fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// Turns a processor's system registers to long mode, flat segments, paging on.
pub fn set_entry_sregs(sregs: &mut kvm_sregs) {
    let code = segment(2);
    let data = segment(3);
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.gdt.base = GDT_START;
    sregs.gdt.limit = 8 * 4 - 1;
    sregs.idt.base = IDT_START;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4_START;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
}

/// KVM's form of the boot GDT's descriptor `index` (Intel SDM volume 3, 3.4.5).
fn segment(index: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(index)];
    let bits = |shift: u32, mask: u64| u8::try_from((descriptor >> shift) & mask).unwrap_or(0);
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: bits(40, 0xf),
        s: bits(44, 1),
        dpl: bits(45, 3),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

/// Virtual wire mode: the PIC on LINT0, NMI on LINT1.
pub fn set_virtual_wire(lapic: &mut kvm_lapic_state) {
    for (register, delivery) in [(APIC_LVT0, DELIVERY_EXTINT), (APIC_LVT1, DELIVERY_NMI)] {
        // Bits 8 to 10 of the register; its second byte, the rest of which is left as it is.
        let byte = &mut lapic.regs[register + 1];
        let value = (byte.to_ne_bytes()[0] & !7) | delivery;
        *byte = std::ffi::c_char::from_ne_bytes([value]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_is_flat_long_mode() {
        let mut sregs = kvm_sregs::default();
        set_entry_sregs(&mut sregs);
        assert_eq!(
            (sregs.cs.l, sregs.cs.db, sregs.cs.type_, sregs.cs.selector),
            (1, 0, 0xb, 0x10)
        );
        assert_eq!(
            (sregs.ss.l, sregs.ss.db, sregs.ss.type_, sregs.ss.selector),
            (0, 1, 0x3, 0x18)
        );
        assert_eq!(sregs.cr0, 0x8000_0011);
    }

    #[test]
    fn virtual_wire_keeps_the_rest_of_the_registers() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT0 + 2] = 1;
        set_virtual_wire(&mut lapic);
        assert_eq!(lapic.regs[APIC_LVT0 + 1..APIC_LVT0 + 3], [7, 1]);
        assert_eq!(lapic.regs[APIC_LVT1 + 1], 4);
    }
}
