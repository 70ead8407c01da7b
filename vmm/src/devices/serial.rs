//! The serial port COM1, a 16550 as `vm-superio` has it, and the keyboard controller for its reset line.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use snapshot_fmt::state::serial::SerialState;
use thiserror::Error;
use vm_superio::serial::{self, NoEvents};
use vm_superio::{I8042Device, Serial, Trigger};

use super::bus::BusDevice;
use super::interrupt::Interrupt;

/// Bytes of console output that are kept for a failure's report.
const KEPT_BYTES: usize = 16 << 10;

/// Raises an interrupt line on behalf of `vm-superio`.
pub struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// The last bytes that the guest printed.
#[derive(Clone, Default)]
pub struct ConsoleTail(Arc<Mutex<std::collections::VecDeque<u8>>>);

impl ConsoleTail {
    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..excess);
    }

    /// What is kept, as text: at most the last 16 KiB.
    pub fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (front, back) = kept.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }
}

/// Where the port's output goes: the tail, and a stream.
struct Output {
    tail: ConsoleTail,
    stream: Option<Box<dyn Write + Send>>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        if let Some(stream) = &mut self.stream
            && let Err(error) = stream.write_all(bytes).and_then(|()| stream.flush())
        {
            // The guest must not suffer from a full disk or a closed terminal.
            log::warn!("console output is no longer written: {error}");
            self.stream = None;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a saved port cannot be restored.
#[derive(Debug, Error)]
pub enum SerialError {
    /// More bytes than the port can hold.
    #[error("the saved serial port has received {received} bytes, more than a port can hold")]
    Received {
        /// How many.
        received: usize,
    },
    /// Its interrupt, which was pending, cannot be raised.
    #[error("cannot raise the serial port's interrupt: {0}")]
    Interrupt(#[source] io::Error),
}

/// COM1.
pub struct SerialPort {
    port: Serial<Line, NoEvents, Output>,
    /// Whether its line has failed before: the guest can have it fail as often as it likes.
    warned: bool,
}

impl SerialPort {
    /// A port that interrupts by `line` and prints to `tail`, and to `stream` if there is one.
    pub fn new(
        line: Arc<dyn Interrupt>,
        tail: ConsoleTail,
        stream: Option<Box<dyn Write + Send>>,
    ) -> Self {
        Self {
            port: Serial::new(Line(line), Output { tail, stream }),
            warned: false,
        }
    }

    /// The registers as they are. No processor may run meanwhile.
    pub fn save(&self) -> SerialState {
        let state = self.port.state();
        SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// A port as [`SerialPort::save`] left it. An interrupt that the driver has not seen to is raised again: its edge may
    /// have been lost.
    pub fn restore(
        line: Arc<dyn Interrupt>,
        tail: ConsoleTail,
        stream: Option<Box<dyn Write + Send>>,
        state: &SerialState,
    ) -> Result<Self, SerialError> {
        let port = load(Line(line), Output { tail, stream }, state)?;
        Ok(Self {
            port,
            warned: false,
        })
    }

    /// Takes the port back to what [`SerialPort::save`] gave. What it prints goes where it went.
    pub fn rewind(&mut self, state: &SerialState) -> Result<(), SerialError> {
        let line = Line(Arc::clone(&self.port.interrupt_evt().0));
        let output = self.port.writer_mut();
        let output = Output {
            tail: output.tail.clone(),
            stream: output.stream.take(),
        };
        self.port = load(line, output, state)?;
        Ok(())
    }

    /// Whether it has said that its line fails.
    #[cfg(test)]
    pub(super) fn has_warned(&self) -> bool {
        self.warned
    }
}

/// A port as it was saved. An interrupt that the driver has not seen to is raised.
fn load(
    line: Line,
    output: Output,
    state: &SerialState,
) -> Result<Serial<Line, NoEvents, Output>, SerialError> {
    let received = state.received.len();
    let state = serial::SerialState {
        baud_divisor_low: state.baud_divisor_low,
        baud_divisor_high: state.baud_divisor_high,
        interrupt_enable: state.interrupt_enable,
        interrupt_identification: state.interrupt_identification,
        line_control: state.line_control,
        line_status: state.line_status,
        modem_control: state.modem_control,
        modem_status: state.modem_status,
        scratch: state.scratch,
        in_buffer: state.received.clone(),
    };
    Serial::from_state(&state, line, NoEvents, output).map_err(|error| match error {
        serial::Error::FullFifo => SerialError::Received { received },
        serial::Error::Trigger(error) | serial::Error::IOError(error) => {
            SerialError::Interrupt(error)
        }
    })
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The registers are bytes; a wider access reads the first and nothing else.
        data.fill(0);
        if let (Some(byte), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *byte = self.port.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Some(byte), Ok(offset)) = (data.first(), u8::try_from(offset))
            && let Err(error) = self.port.write(offset, *byte)
            && !std::mem::replace(&mut self.warned, true)
        {
            log::warn!("serial port: {error:?}; this is said once");
        }
    }
}

/// The keyboard controller; all that works of it is the reset line.
pub struct Keyboard<T: Trigger>(I8042Device<T>);

impl<T: Trigger> Keyboard<T> {
    /// A controller that triggers `reset` when the guest asks for a reset.
    pub fn new(reset: T) -> Self {
        Self(I8042Device::new(reset))
    }
}

impl<T: Trigger + Send> BusDevice for Keyboard<T> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Some(byte), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Some(byte), Ok(offset)) = (data.first(), u8::try_from(offset))
            && self.0.write(offset, *byte).is_err()
        {
            log::warn!("keyboard controller: the reset was not delivered");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::CountingInterrupt;

    struct NoLine;
    impl Interrupt for NoLine {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A stream on a full disk.
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_is_kept_bounded_and_survives_a_failing_stream() {
        let tail = ConsoleTail::default();
        let mut port = SerialPort::new(Arc::new(NoLine), tail.clone(), Some(Box::new(Full)));
        for _ in 0..KEPT_BYTES {
            port.write(0, b"x");
        }
        port.write(0, b"y");
        assert_eq!(tail.text().len(), KEPT_BYTES);
        assert!(tail.text().ends_with("xy"));
    }

    #[test]
    fn a_port_goes_on_where_it_was_saved() {
        let mut old = SerialPort::new(Arc::new(NoLine), ConsoleTail::default(), None);
        // Divisor, word length, loopback with two bytes on the way, scratch, and both interrupts enabled.
        for (offset, value) in [
            (3, 0x83),
            (0, 1),
            (1, 2),
            (3, 0x1b),
            (4, 0x1f),
            (0, b'a'),
            (0, b'b'),
            (7, 0x5a),
            (1, 3),
        ] {
            old.write(offset, &[value]);
        }
        let state = old.save();
        assert_eq!(state.received, b"ab");

        let line = Arc::new(CountingInterrupt::default());
        let tail = ConsoleTail::default();
        let restore = |state| SerialPort::restore(line.clone(), tail.clone(), None, state);
        let mut port = restore(&state).unwrap();
        assert_eq!(port.save(), state);
        assert!(line.count() > 0, "what was pending is raised again");
        for offset in [3, 4, 5, 6, 7, 2, 0, 0, 5] {
            let (mut want, mut got) = ([0], [0]);
            old.read(offset, &mut want);
            port.read(offset, &mut got);
            assert_eq!(got, want, "register {offset}");
        }
        port.write(4, &[0x0f]);
        port.write(0, b"c");
        assert_eq!(tail.text(), "c");

        let received = vec![0; 65];
        let error = restore(&SerialState { received, ..state }).err().unwrap();
        assert!(matches!(error, SerialError::Received { received: 65 }));
    }

    #[test]
    fn the_reset_line_is_pulled_by_its_command_alone() {
        let exit = crate::exit::ExitLatch::new().unwrap();
        let mut keyboard = Keyboard::new(exit.clone());
        for (offset, value) in [(0, 0xfe), (4, 0xff), (4, 0xd1)] {
            keyboard.write(offset, &[value]);
        }
        assert_eq!(exit.get(), None);
        keyboard.write(4, &[0xfe]);
        assert_eq!(exit.get(), Some(crate::exit::ExitReason::Reset));
    }
}
