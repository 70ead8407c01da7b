//! The serial port and the keyboard controller, behind a bus as port I/O is.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use vmm::devices::bus::Bus;
use vmm::devices::serial::{ConsoleTail, Keyboard, SerialPort};
use vmm::devices::virtio::testing::CountingInterrupt;
use vmm::exit::ExitLatch;

const SERIAL: u64 = 0x3f8;
const KEYBOARD: u64 = 0x60;
const COMMAND: u64 = 4;
const RESET: u8 = 0xfe;
/// What the console keeps, 16 KiB.
const KEPT: usize = 16 << 10;

/// Accesses, and whether the console's stream fails.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    broken_stream: bool,
    accesses: Vec<Access>,
}

/// Where an access goes.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Port {
    /// A register of the serial port, or a little beyond.
    Serial(u8),
    /// A register of the keyboard controller, or a little beyond.
    Keyboard(u8),
    /// Anywhere.
    Any(u64),
}

/// An access.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Access {
    port: Port,
    write: bool,
    len: u8,
    bytes: [u8; 8],
    /// Repeats it so often.
    times: u8,
}

struct Stream(bool);

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(bytes.len())
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the accesses.
pub fn run(input: &Input) {
    let tail = ConsoleTail::default();
    let stream = Box::new(Stream(input.broken_stream));
    let line = Arc::new(CountingInterrupt::default());
    let exit = ExitLatch::new().expect("a latch");
    let mut bus = Bus::default();
    let serial = SerialPort::new(line, tail.clone(), Some(stream));
    bus.insert(SERIAL, 8, Arc::new(Mutex::new(serial)))
        .expect("a free range");
    let keyboard = Keyboard::new(exit.clone());
    bus.insert(KEYBOARD, 5, Arc::new(Mutex::new(keyboard)))
        .expect("a free range");
    let mut reset = false;
    for access in input.accesses.iter().take(256) {
        let addr = match access.port {
            Port::Serial(offset) => SERIAL + u64::from(offset % 10),
            Port::Keyboard(offset) => KEYBOARD + u64::from(offset % 7),
            Port::Any(addr) => addr,
        };
        let len = usize::from(access.len % 9);
        let inside = |base: u64, size: u64| {
            addr >= base
                && addr
                    .checked_add(len as u64)
                    .is_some_and(|end| end <= base + size)
        };
        // An empty access at the very end is still inside.
        let claimed = inside(SERIAL, 8) || inside(KEYBOARD, 5);
        for _ in 0..=access.times {
            if access.write {
                assert_eq!(bus.write(addr, &access.bytes[..len]), claimed, "{access:?}");
                reset |= addr == KEYBOARD + COMMAND && len == 1 && access.bytes[0] == RESET;
            } else {
                let mut bytes = vec![0x55; len];
                assert_eq!(bus.read(addr, &mut bytes), claimed, "{access:?}");
                let rest = if claimed {
                    bytes.get(1..).unwrap_or(&[])
                } else {
                    &bytes[..]
                };
                let fill = if claimed { 0 } else { 0xff };
                assert!(
                    rest.iter().all(|&byte| byte == fill),
                    "{access:?} gave {bytes:?}"
                );
            }
        }
    }
    assert_eq!(exit.get().is_some(), reset);
    // Bytes that are no text take three each.
    assert!(tail.text().len() <= 3 * KEPT);
}
