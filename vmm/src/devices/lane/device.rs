//! The lane's registers, and its side of the event loop: bytes between the rings and the stream of the host.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{HOST_STATE, Over, RingError, TO_GUEST, TO_HOST, WANTS_DATA, WANTS_ROOM, Window};
use crate::devices::bus::BusDevice;
use crate::devices::interrupt::Interrupt;
use crate::devices::virtio::GuestSlice;
use crate::devices::virtio::vsock::connect_to_host;
use crate::memory::GuestMemory;
use crate::sys::bus_error::wait_where_lost;

/// Bytes of the page of registers.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Offset of the doorbell, which KVM writes to an eventfd.
pub const DOORBELL: u64 = 0x10;

const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
const FRAME: u64 = 0x08;
const CONNECT: u64 = 0x0c;

const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"Lane");
const VERSION_VALUE: u32 = 1;

/// Events of the device: the doorbell, and the stream.
const RUNG: u32 = 0;
const STREAM: u32 = 1;

/// How often an event looks whether the other side has more; then others have their turn. Each time is a ring's worth of bytes, both ways.
const TURNS: u32 = 4;
/// How many messages the guest can provoke.
const MAX_MESSAGES: u32 = 32;

/// A lane.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// The sandbox's vsock socket.
    pub socket_path: PathBuf,
    /// The port of the host that the guest reaches: whoever listens on `<socket>_<port>`.
    pub port: u32,
}

/// Why there is no lane.
#[derive(Debug, Error)]
pub enum LaneError {
    /// No events or streams for it.
    #[error("cannot make the lane's events: {0}")]
    Events(#[from] io::Error),
    /// The host has no random bytes for its guest.
    #[error("no random bytes for the guest: {0}")]
    NoSeed(Errno),
    /// A saved state that no lane can have had.
    #[error("the saved lane: {0}; the snapshot is damaged")]
    Saved(&'static str),
}

/// Why a stream is over.
#[derive(Debug, Error)]
enum End {
    /// The host has closed it.
    #[error("the host has closed it")]
    Host,
    /// The guest has broken the rules.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// The device.
pub struct Lane {
    config: LaneConfig,
    memory: Arc<GuestMemory>,
    irq: Arc<dyn Interrupt>,
    doorbell: EventFd,
    /// Watches the stream: one that a processor's thread opens as well.
    epoll: Epoll,
    /// The page that the window begins at; none before the driver has said.
    pub(super) frame: u32,
    pub(super) stream: Option<UnixStream>,
    /// Written to with the first bytes, or at the end, of a stream that was kept.
    pub(super) spoken: EventFd,
    /// There is such a stream, and nothing has come of it yet.
    pub(super) is_awaited: bool,
    /// A restored guest is to learn that its stream is gone.
    pub(super) is_lost: bool,
    /// An interrupt of the saved device may not have arrived.
    pub(super) interrupts_again: bool,
    messages: u32,
}

impl Lane {
    /// A lane that nobody has opened. `spoken` is written to once the guest has said something on a stream that was [kept](Self::load), or that has ended.
    pub fn new(
        config: LaneConfig,
        memory: Arc<GuestMemory>,
        irq: Arc<dyn Interrupt>,
        spoken: EventFd,
    ) -> Result<Self, LaneError> {
        Ok(Self {
            config,
            memory,
            irq,
            doorbell: EventFd::new(EFD_NONBLOCK)?,
            epoll: Epoll::new()?,
            frame: 0,
            stream: None,
            spoken,
            is_awaited: false,
            is_lost: false,
            interrupts_again: false,
            messages: 0,
        })
    }

    /// What the guest's doorbell writes to.
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// The window, if the driver has named one that can be.
    pub(super) fn window(&self) -> Option<Window<'_>> {
        Window::new(&self.memory, self.frame).filter(|_| self.frame != 0)
    }

    /// Looks at everything again, from the event loop.
    pub(super) fn ring_own_doorbell(&self) {
        // It fails only where the counter is full, and then the loop wakes as well.
        let _ = self.doorbell.write(1);
    }

    fn warn(&mut self, message: std::fmt::Arguments<'_>) {
        if self.messages < MAX_MESSAGES {
            self.messages += 1;
            log::warn!("lane: {message}");
        }
    }

    /// The stream from now on; it is non-blocking.
    pub(super) fn attach(&mut self, stream: UnixStream) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, 0);
        self.epoll
            .ctl(ControlOperation::Add, stream.as_raw_fd(), event)?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Calls the host.
    fn open(&mut self) {
        self.close();
        let Some(window) = self.window() else {
            return;
        };
        window.clear();
        let called = connect_to_host(&self.config.socket_path, self.config.port);
        if let Err(error) = called.and_then(|stream| self.attach(stream)) {
            let port = self.config.port;
            self.warn(format_args!("no connection to host port {port}: {error}"));
        }
        // What the host says first finds the guest asleep, or looking for it; either way the loop is to look.
        self.ring_own_doorbell();
    }

    /// The guest has no use for the stream any more. What it has said goes out, as far as there is room.
    fn close(&mut self) {
        self.serve();
        self.stream = None;
        self.say_spoken();
    }

    fn say_spoken(&mut self) {
        if std::mem::take(&mut self.is_awaited) {
            // It fails only where the counter is full, and then it is readable as well.
            let _ = self.spoken.write(1);
        }
    }

    /// Moves bytes until neither side has any that the other has room for.
    fn serve(&mut self) {
        if std::mem::take(&mut self.is_lost) {
            self.tell(Over::Lost);
        }
        if std::mem::take(&mut self.interrupts_again) {
            self.interrupt();
        }
        for _ in 0..TURNS {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return,
                Err(end) => {
                    if let End::Ring(error) = &end {
                        self.warn(format_args!("the stream is closed: {error}"));
                    }
                    self.stream = None;
                    self.say_spoken();
                    self.tell(Over::Ended);
                    return;
                }
            }
        }
        self.ring_own_doorbell();
    }

    /// Has the guest see that the stream is over.
    fn tell(&self, over: Over) {
        if let Some(window) = self.window() {
            window.set(HOST_STATE, over as u32);
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        if let Err(error) = self.irq.trigger() {
            log::error!("lane: cannot interrupt the guest: {error}");
        }
    }

    /// Moves what there is, a ring's worth each way at most; says whether there may be more already.
    fn turn(&mut self) -> Result<bool, End> {
        let Some(mut stream) = self.stream.as_ref() else {
            return Ok(false);
        };
        // The driver's window is checked when it is named.
        let Some(window) = self.window() else {
            return Err(End::Host);
        };
        window.wait_for(0);
        let (mut sent, mut received) = (0, 0);
        let (mut sends, mut receives) = (true, true);
        while sends && sent < TO_HOST.bytes {
            let Some(piece) = window.taken_next(&TO_HOST)? else {
                break;
            };
            match moved(piece, |piece| stream.write_volatile(piece))? {
                Some(count) => {
                    window.take(&TO_HOST, count);
                    sent += count;
                }
                None => sends = false,
            }
        }
        while receives && received < TO_GUEST.bytes {
            let Some(piece) = window.filled_next(&TO_GUEST)? else {
                break;
            };
            match moved(piece, |piece| stream.read_volatile(piece))? {
                Some(0) => return Err(End::Host),
                Some(count) => {
                    window.put(&TO_GUEST, count);
                    received += count;
                }
                None => receives = false,
            }
        }
        let news = |count, news| if count > 0 { news } else { 0 };
        let news = news(received, WANTS_DATA) | news(sent, WANTS_ROOM);
        if window.guest_wants(news) {
            self.interrupt();
        }
        // Where the stream has no room, or nothing to say, it is the stream that is waited for.
        let wants = if sends { WANTS_DATA } else { 0 } | if receives { WANTS_ROOM } else { 0 };
        window.wait_for(wants);
        let more = sends && window.filled(&TO_HOST)? > 0
            || receives && window.filled(&TO_GUEST)? < TO_GUEST.bytes;
        if sent > 0 {
            self.say_spoken();
        }
        Ok(more)
    }
}

/// How many bytes a `call` on the stream has moved from or to `piece`; none where it would have to wait.
fn moved(
    mut piece: GuestSlice<'_>,
    mut call: impl FnMut(&mut GuestSlice<'_>) -> Result<usize, VolatileMemoryError>,
) -> Result<Option<u32>, End> {
    loop {
        match call(&mut piece) {
            Ok(count) => return Ok(Some(u32::try_from(count).unwrap_or(u32::MAX))),
            Err(VolatileMemoryError::IOError(error)) => match error.kind() {
                ErrorKind::WouldBlock => return Ok(None),
                ErrorKind::Interrupted => {}
                _ => {
                    wait_where_lost(&error, &[piece]);
                    return Err(End::Host);
                }
            },
            Err(_) => return Err(End::Host),
        }
    }
}

impl BusDevice for Lane {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => VERSION_VALUE,
            FRAME => self.frame,
            CONNECT => self.stream.is_some().into(),
            _ => 0,
        };
        data.fill(0);
        if data.len() == 4 {
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            FRAME => {
                self.close();
                let is_ram = Window::new(&self.memory, value).is_some();
                self.frame = if is_ram { value } else { 0 };
            }
            CONNECT if value == 0 => self.close(),
            CONNECT => self.open(),
            // Without ioeventfds.
            DOORBELL => self.ring_own_doorbell(),
            _ => {}
        }
    }
}

impl MutEventSubscriber for Lane {
    fn init(&mut self, ops: &mut EventOps) {
        let watched = [
            Events::with_data(&self.doorbell, RUNG, EventSet::IN),
            Events::with_data(&self.epoll, STREAM, EventSet::IN),
        ];
        for events in watched {
            if let Err(error) = ops.add(events) {
                log::error!("lane: its events cannot be watched: {error:?}");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        if events.data() == RUNG {
            // An empty counter is as good as a full one: everything is looked at either way.
            let _ = self.doorbell.read();
        } else {
            // The edge is taken, whatever it says.
            let _ = self.epoll.wait(0, &mut [EpollEvent::default()]);
        }
        self.serve();
    }
}
