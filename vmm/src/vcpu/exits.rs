//! What a processor's exits mean: a device access to carry out, or the end of the VM.

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::VcpuContext;
use crate::exit::ExitReason;

/// Longest instruction of x86 (Intel SDM volume 2, 2.3.11).
const INSTRUCTION_MAX: usize = 15;

/// What to do after an exit.
pub enum Next {
    /// Enter the guest again.
    Run,
    /// A signal came: look whether the processor should stop.
    Interrupted,
    /// The VM ends.
    Exit(ExitReason),
}

/// Runs the guest until it leaves KVM_RUN, and carries out what it left for.
pub fn run_once(vcpu: &mut VcpuFd, context: &VcpuContext) -> Next {
    let id = context.id;
    let why = match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            context.pio.read(u64::from(port), data);
            return Next::Run;
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            context.pio.write(u64::from(port), data);
            return Next::Run;
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            if context.mmio.read(address, data) || !is_ram(context, address) {
                return Next::Run;
            }
            unreachable_ram(address)
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            if context.mmio.write(address, data) || !is_ram(context, address) {
                return Next::Run;
            }
            unreachable_ram(address)
        }
        Ok(VcpuExit::Intr) => return Next::Interrupted,
        Ok(VcpuExit::Shutdown) => {
            return Next::Exit(ExitReason::TripleFault {
                vcpu: id,
                rip: rip(vcpu),
            });
        }
        Ok(VcpuExit::InternalError) => return Next::Exit(internal_error(vcpu, context)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            format!("the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})")
        }
        Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
            kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN | kvm_bindings::KVM_SYSTEM_EVENT_RESET => {
                return Next::Exit(ExitReason::Reset);
            }
            kind => format!("KVM reported system event {kind}"),
        },
        Ok(VcpuExit::Hlt) => "it halted with nothing to wake it".to_owned(),
        Ok(other) => format!("KVM_RUN ended in an exit that bough does not know: {other:?}"),
        Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {
            return Next::Interrupted;
        }
        Err(errno) => format!("KVM_RUN failed: {}", std::io::Error::from(errno)),
    };
    Next::Exit(ExitReason::VcpuDied { vcpu: id, why })
}

fn is_ram(context: &VcpuContext, address: u64) -> bool {
    context.memory.address_in_range(GuestAddress(address))
}

/// KVM's emulator takes memory that it cannot reach for a device's.
fn unreachable_ram(address: u64) -> String {
    format!("KVM cannot reach the guest's memory at {address:#x}")
}

fn rip(vcpu: &VcpuFd) -> Option<u64> {
    vcpu.get_regs().ok().map(|regs| regs.rip)
}

fn internal_error(vcpu: &mut VcpuFd, context: &VcpuContext) -> ExitReason {
    let (suberror, bytes) = crate::kvm::internal_error(vcpu.get_kvm_run());
    if suberror != KVM_INTERNAL_ERROR_EMULATION {
        let why = format!("KVM gave up (internal error {suberror})");
        return ExitReason::VcpuDied {
            vcpu: context.id,
            why,
        };
    }
    let rip = rip(vcpu);
    // Older kernels do not hand the bytes over: read them where the guest has them.
    let bytes = bytes
        .or_else(|| instruction_bytes(vcpu, context, rip?))
        .unwrap_or_default();
    ExitReason::Emulation {
        vcpu: context.id,
        rip,
        bytes,
        software: context.software,
    }
}

fn instruction_bytes(vcpu: &VcpuFd, context: &VcpuContext, rip: u64) -> Option<Vec<u8>> {
    let translation = vcpu.translate_gva(rip).ok().filter(|t| t.valid != 0)?;
    let in_page = usize::try_from(0x1000 - (rip & 0xfff)).unwrap_or(0);
    let mut bytes = vec![0; INSTRUCTION_MAX.min(in_page)];
    context
        .memory
        .read_slice(&mut bytes, GuestAddress(translation.physical_address))
        .ok()?;
    Some(bytes)
}
