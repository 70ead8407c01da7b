//! The bus, the serial port and the keyboard controller under a guest that breaks their rules.

use std::io;
use std::sync::{Arc, Mutex};

use super::bus::{Bus, BusDevice};
use super::interrupt::Interrupt;
use super::serial::{ConsoleTail, Keyboard, SerialPort};
use super::virtio::testing::CountingInterrupt;
use crate::exit::{ExitLatch, ExitReason};

const COM1: u64 = 0x3f8;
const I8042: u64 = 0x60;
/// Modem control: what is written comes back.
const LOOPBACK: u8 = 0x10;

struct Pc {
    bus: Bus,
    tail: ConsoleTail,
    line: Arc<CountingInterrupt>,
    exit: ExitLatch,
}

fn pc() -> Pc {
    let (mut bus, tail) = (Bus::default(), ConsoleTail::default());
    let line = Arc::new(CountingInterrupt::default());
    let exit = ExitLatch::new().unwrap();
    let serial = SerialPort::new(line.clone(), tail.clone(), None);
    bus.insert(COM1, 8, Arc::new(Mutex::new(serial))).unwrap();
    let keyboard = Keyboard::new(exit.clone());
    bus.insert(I8042, 5, Arc::new(Mutex::new(keyboard)))
        .unwrap();
    Pc {
        bus,
        tail,
        line,
        exit,
    }
}

#[test]
fn accesses_of_any_width_anywhere() {
    // Address, width, whether somebody is there.
    let cases = [
        (0, 1, false),
        (I8042 - 1, 1, false),
        (I8042 - 1, 2, false),
        (I8042, 1, true),
        (I8042, 5, true),
        (I8042, 8, false),
        (I8042 + 4, 1, true),
        (I8042 + 4, 2, false),
        (I8042 + 5, 1, false),
        (COM1 - 1, 1, false),
        (COM1 - 4, 8, false),
        (COM1, 2, true),
        (COM1, 3, true),
        (COM1, 4, true),
        (COM1, 8, true),
        (COM1, 9, false),
        (COM1, 1024, false),
        (COM1 + 1, 8, false),
        (COM1 + 7, 1, true),
        (COM1 + 7, 2, false),
        (COM1 + 8, 1, false),
        (0xffff, 4, false),
        (u64::MAX, 1, false),
        (u64::MAX - 3, 8, false),
        (1 << 63, 8, false),
    ];
    for (addr, width, there) in cases {
        let pc = pc();
        let mut data = vec![0x55; width];
        assert_eq!(pc.bus.read(addr, &mut data), there, "{addr:#x}+{width}");
        // A register is a byte; nothing of the host's memory is in the others.
        let rest = if there { 0 } else { 0xff };
        assert!(
            data[1..].iter().all(|&byte| byte == rest),
            "{addr:#x}+{width}"
        );
        assert_eq!(pc.bus.write(addr, &data), there, "{addr:#x}+{width}");
        assert!(!pc.bus.read(addr, &mut []) || addr >= I8042);
        assert_eq!(pc.exit.get(), None);
    }
}

#[test]
fn every_register_takes_every_byte() {
    for register in 0..8 {
        let pc = pc();
        for value in 0..=u8::MAX {
            assert!(pc.bus.write(COM1 + register, &[value]));
            for other in 0..8 {
                pc.bus.read(COM1 + other, &mut [0]);
            }
        }
        assert!(pc.tail.text().len() <= 3 * 256);
    }
}

#[test]
fn a_loop_is_bounded() {
    let pc = pc();
    pc.bus.write(COM1 + 4, &[LOOPBACK]);
    for _ in 0..100_000 {
        pc.bus.write(COM1, b"x");
    }
    let mut held = 0;
    loop {
        let mut status = [0];
        pc.bus.read(COM1 + 5, &mut status);
        if status[0] & 1 == 0 {
            break;
        }
        pc.bus.read(COM1, &mut [0]);
        held += 1;
    }
    assert!(held <= 64, "{held} bytes were held");
    assert_eq!(pc.tail.text(), "");
}

#[test]
fn output_that_is_no_text_is_bounded() {
    let pc = pc();
    for byte in (0..=u8::MAX).cycle().take(100_000) {
        pc.bus.write(COM1, &[byte]);
    }
    assert!(pc.tail.text().len() <= 3 * (16 << 10));
    // Interrupts were not asked for.
    assert_eq!(pc.line.count(), 0);
}

#[test]
fn only_one_command_resets() {
    for offset in 0..5 {
        for value in 0..=u8::MAX {
            let pc = pc();
            pc.bus.write(I8042 + offset, &[value]);
            pc.bus.read(I8042 + offset, &mut [0]);
            let resets = (offset, value) == (4, 0xfe);
            assert_eq!(pc.exit.get().is_some(), resets, "{offset} {value:#x}");
        }
    }
    // Again and again is once.
    let pc = pc();
    for _ in 0..1000 {
        pc.bus.write(I8042 + 4, &[0xfe]);
    }
    assert_eq!(pc.exit.get(), Some(ExitReason::Reset));
}

#[test]
fn a_line_that_fails_is_said_once() {
    struct Broken;
    impl Interrupt for Broken {
        fn trigger(&self) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }
    }
    let tail = ConsoleTail::default();
    let mut port = SerialPort::new(Arc::new(Broken), tail.clone(), None);
    assert!(!port.has_warned());
    for _ in 0..1000 {
        port.write(1, &[0xff]);
        port.write(0, b"x");
        assert!(port.has_warned());
    }
    assert_eq!(tail.text().len(), 1000);
}
