//! Guests of a few instructions: how a VM ends, and what is said of it.

use std::process::ExitCode;

use libtest_mimic::Failed;
use tests::Needs::{Kvm, SoftwareKvm};
use tests::elf::kernel;
use tests::{Output, Vmm, test};

fn main() -> ExitCode {
    tests::main(vec![
        test("a_guest_that_resets_ends_well", Kvm, resets),
        test("the_serial_port_prints", Kvm, prints),
        test("a_triple_fault_is_named", Kvm, triple_fault),
        test(
            "an_instruction_that_cannot_be_emulated_is_named",
            SoftwareKvm,
            emulation,
        ),
        test("a_guest_that_loops_is_stopped_in_time", Kvm, loops),
        test("a_guest_that_halts_is_stopped_in_time", Kvm, halts),
    ])
}

/// Boots `code` at the kernel's entry point, in long mode, interrupts off.
fn boot(code: &[u8]) -> Result<Output, Failed> {
    let kernel = kernel(code)?;
    let path = kernel.path().as_os_str();
    Vmm::new([
        "boot".as_ref(),
        "--memory".as_ref(),
        "32".as_ref(),
        "--timeout".as_ref(),
        "2".as_ref(),
        "--kernel".as_ref(),
        path,
    ])
    .run()
}

/// `mov $0xfe, %al; out %al, $0x64`: the keyboard controller's reset line.
const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];
/// `hlt; jmp` to it.
const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

fn resets() -> Result<(), Failed> {
    boot(&[&RESET[..], &HALT].concat())?.expect_status(0)?;
    Ok(())
}

fn prints() -> Result<(), Failed> {
    // mov $0x3f8, %dx; then for each letter: mov $letter, %al; out %al, (%dx)
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for letter in b"hello\n" {
        code.extend([0xb0, *letter, 0xee]);
    }
    code.extend(RESET);
    code.extend(HALT);
    boot(&code)?.expect_status(0)?.expect_stderr(&["hello\n"])?;
    Ok(())
}

fn triple_fault() -> Result<(), Failed> {
    // ud2, with an interrupt table that has no entry for it.
    let output = boot(&[0x0f, 0x0b])?;
    output
        .expect_status(122)?
        .expect_stderr(&["triple fault on vCPU 0"])?
        .expect_one_line()?;
    Ok(())
}

fn emulation() -> Result<(), Failed> {
    // popcnt %rdi, %rax
    let output = boot(&[0xf3, 0x48, 0x0f, 0xb8, 0xc7, 0xf4])?;
    output
        .expect_status(121)?
        .expect_stderr(&[
            "cannot emulate popcnt on vCPU 0 at RIP 0x200000",
            "f3 48 0f b8 c7",
            "software KVM",
            "tools/build-kernel",
        ])?
        .expect_one_line()?;
    Ok(())
}

fn loops() -> Result<(), Failed> {
    let output = boot(&[0xeb, 0xfe])?;
    output.expect_status(124)?;
    let told = output.stderr.split_once("timed out after ");
    let seconds =
        told.and_then(|(_, rest)| rest.split_once("s (--timeout)")?.0.parse::<f64>().ok());
    match seconds {
        // A busy machine is late.
        Some(2.0..10.0) => Ok(()),
        _ => Err(format!("not stopped in time: {output:#?}").into()),
    }
}

fn halts() -> Result<(), Failed> {
    boot(&HALT)?.expect_status(124)?;
    Ok(())
}
