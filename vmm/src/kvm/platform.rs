//! What KVM keeps for a whole machine, saved and restored: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use snapshot_fmt::state::platform::PlatformState;
use zerocopy::IntoBytes;

use super::{KvmError, call_failed, structure};
use crate::timings::monotonic_ns;

/// Saves what processors share. They are outside of KVM_RUN.
pub fn save(vm: &VmFd) -> Result<PlatformState, KvmError> {
    let pit = vm.get_pit2().map_err(call_failed("KVM_GET_PIT2"))?;
    let clock = vm.get_clock().map_err(call_failed("KVM_GET_CLOCK"))?;
    Ok(PlatformState {
        pic_master: get_chip(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: get_chip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: get_chip(vm, KVM_IRQCHIP_IOAPIC)?,
        pit: pit.as_bytes().to_vec(),
        clock_ns: clock.clock,
    })
}

/// Restores interrupt controllers and timer, before the processors' local APICs.
pub fn restore(vm: &VmFd, state: &PlatformState) -> Result<(), KvmError> {
    set_chip(vm, KVM_IRQCHIP_PIC_MASTER, &state.pic_master)?;
    set_chip(vm, KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave)?;
    set_chip(vm, KVM_IRQCHIP_IOAPIC, &state.ioapic)?;
    vm.set_pit2(&structure("kvm_pit_state2", &state.pit)?)
        .map_err(call_failed("KVM_SET_PIT2"))
}

fn get_chip(vm: &VmFd, chip_id: u32) -> Result<Vec<u8>, KvmError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(call_failed("KVM_GET_IRQCHIP"))?;
    Ok(chip.as_bytes().to_vec())
}

fn set_chip(vm: &VmFd, chip_id: u32, bytes: &[u8]) -> Result<(), KvmError> {
    let chip = kvm_irqchip {
        chip_id,
        ..structure("kvm_irqchip", bytes)?
    };
    vm.set_irqchip(&chip)
        .map_err(call_failed("KVM_SET_IRQCHIP"))
}

/// Lets the guest's clock go on from where it was saved, or, where it was a running parent's at that `moment` ([`monotonic_ns`]), from where that one's
/// is now. Last of all: from here on it runs.
pub fn restore_clock(
    vm: &VmFd,
    state: &PlatformState,
    moment: Option<u64>,
) -> Result<(), KvmError> {
    let since = moment.map_or(0, |moment| monotonic_ns().saturating_sub(moment));
    let clock = kvm_clock_data {
        clock: state.clock_ns.saturating_add(since),
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(call_failed("KVM_SET_CLOCK"))
}
