//! One connection: a Unix socket on the host's side, credit and half-closes on the guest's
//! (Virtio 1.2, section 5.10.6).
//!
//! Invariants:
//! - `buffer` holds what the guest sent and the socket did not take, at most `buf_alloc` bytes; a guest
//!   that sends more than its credit loses the connection;
//! - the guest is sent at most what its last word on credit allows;
//! - after the guest's SHUTDOWN of both directions nothing is read or taken any more.
//!
//! The socket is watched edge-triggered: `readable` stays true until a read would block.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};
use vmm_sys_util::epoll::EventSet;

use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use crate::devices::virtio::GuestSlice;
use crate::sys::bus_error::wait_where_lost;

mod state;

/// How long the guest may take to answer a request, or a shutdown of both directions.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A port of the host and one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A host client waits for the guest's answer.
    Requested,
    Established,
    /// To be reset, and then forgotten.
    Dead,
}

/// What there is to tell the guest, apart from data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pending {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One connection.
pub(super) struct Connection {
    pub id: u64,
    pub key: Key,
    /// Whether it stands in the muxer's line of those with something to tell.
    pub queued: bool,
    /// When the guest has taken too long for an answer.
    pub deadline: Option<Instant>,
    guest_cid: u64,
    stream: UnixStream,
    state: State,
    pending: Pending,
    /// From the guest, for the socket.
    buffer: VecDeque<u8>,
    buf_alloc: u32,
    /// What left the buffer, and how much of that the guest knows.
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    /// To the guest: what we sent, what it has dealt with, and its room for both.
    sent: Wrapping<u32>,
    peer_fwd_cnt: Wrapping<u32>,
    peer_buf_alloc: u32,
    credit_asked: bool,
    /// Flags of the guest's SHUTDOWN, and of ours.
    guest_shutdown: u32,
    host_shutdown: u32,
    closed_sending: bool,
    readable: bool,
    hung_up: bool,
}

impl Connection {
    /// The guest has asked for it with `header`, and the host's side accepted.
    pub fn from_guest(id: u64, stream: UnixStream, header: &Header, buf_alloc: u32) -> Self {
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let mut this = Self::new(id, stream, key, header.src_cid, buf_alloc);
        this.state = State::Established;
        this.pending.response = true;
        this.readable = true;
        this.note_credit(header);
        this
    }

    /// A host client asks for it.
    pub fn from_host(
        id: u64,
        stream: UnixStream,
        key: Key,
        guest_cid: u64,
        buf_alloc: u32,
    ) -> Self {
        let mut this = Self::new(id, stream, key, guest_cid, buf_alloc);
        this.pending.request = true;
        this.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
        this
    }

    fn new(id: u64, stream: UnixStream, key: Key, guest_cid: u64, buf_alloc: u32) -> Self {
        Self {
            id,
            key,
            queued: false,
            deadline: None,
            guest_cid,
            stream,
            state: State::Requested,
            pending: Pending::default(),
            buffer: VecDeque::new(),
            buf_alloc,
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            sent: Wrapping(0),
            peer_fwd_cnt: Wrapping(0),
            peer_buf_alloc: 0,
            credit_asked: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            closed_sending: false,
            readable: false,
            hung_up: false,
        }
    }

    /// Whether there may be something to tell the guest.
    pub fn has_packet(&self) -> bool {
        let pending = self.pending;
        self.state == State::Dead
            || pending.request
            || pending.response
            || pending.shutdown
            || pending.credit_update
            || pending.credit_request
            || self.wants_read() && (self.credit() > 0 || !self.credit_asked)
    }

    /// Whether it can be forgotten: the guest's last word was said, or ours is.
    pub fn is_dead(&self) -> bool {
        self.state == State::Dead
    }

    /// What the guest sent that the socket has not taken, for a connection that ends.
    pub fn into_rest(self) -> Option<(UnixStream, VecDeque<u8>)> {
        let alive = !self.buffer.is_empty() && !self.hung_up;
        alive.then_some((self.stream, self.buffer))
    }

    /// Gives the connection up: the guest gets a reset.
    pub fn kill(&mut self) {
        self.state = State::Dead;
    }

    /// Takes a packet of this connection; returns false if it was the guest's last.
    pub fn take(&mut self, header: &Header, payload: &[GuestSlice]) -> bool {
        self.note_credit(header);
        match (header.op, self.state) {
            (op::RST, _) => return false,
            (_, State::Dead) => {}
            (op::RESPONSE, State::Requested) => self.establish(),
            (op::RW, State::Established) => self.take_data(header.len, payload),
            (op::SHUTDOWN, State::Established) => self.take_shutdown(header.flags),
            (op::CREDIT_UPDATE, State::Established) => {}
            (op::CREDIT_REQUEST, State::Established) => self.pending.credit_update = true,
            _ => self.kill(),
        }
        true
    }

    fn note_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        // A count that was never sent makes the difference huge, and the credit none.
        let on_the_way = (self.sent - self.peer_fwd_cnt).0;
        self.peer_buf_alloc.saturating_sub(on_the_way)
    }

    fn establish(&mut self) {
        self.state = State::Established;
        self.deadline = None;
        self.readable = true;
        let answer = format!("OK {}\n", self.key.host_port);
        // Nothing was written to this socket yet, so it has room for a line; if not, it is gone.
        if (&self.stream).write_all(answer.as_bytes()).is_err() {
            self.kill();
        }
    }

    fn take_data(&mut self, len: u32, payload: &[GuestSlice]) {
        let room = self.buf_alloc.saturating_sub(self.buffered());
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || len > room {
            self.kill();
            return;
        }
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            // It cannot know yet that nobody reads.
            self.advance(len);
            return;
        }
        for slice in payload {
            let mut rest = *slice;
            while !rest.is_empty() && self.buffer.is_empty() {
                match self.stream.write_volatile(&rest).map_err(io_error) {
                    Ok(done) => {
                        self.advance(u32::try_from(done).unwrap_or(u32::MAX));
                        let Ok(left) = rest.offset(done) else { return };
                        rest = left;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => {
                        wait_where_lost(&error, &[rest]);
                        self.stop_receiving();
                        self.advance(u32::try_from(rest.len()).unwrap_or(u32::MAX));
                        break;
                    }
                }
            }
            if self.host_shutdown & SHUTDOWN_RECEIVE == 0 && !rest.is_empty() {
                let mut bytes = vec![0; rest.len()];
                rest.copy_to(&mut bytes);
                self.buffer.extend(bytes);
            }
        }
    }

    fn take_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            // What it sent goes out all the same, see `into_rest`.
            self.kill();
            return;
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // The host's side may be gone already; then there is nothing to shut.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.close_sending();
    }

    /// Ends the host's stream once all of the guest's bytes are in it.
    fn close_sending(&mut self) {
        let over = self.guest_shutdown & SHUTDOWN_SEND != 0 && self.buffer.is_empty();
        // Once: it is an event of the socket itself, which would bring us here again.
        if over && !std::mem::replace(&mut self.closed_sending, true) {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The socket has something to say.
    pub fn socket_event(&mut self, events: EventSet) {
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
            if self.state == State::Requested {
                self.kill();
                return;
            }
            self.readable = true;
            self.stop_receiving();
            if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
                // Its last bytes are of no interest, so nobody will read up to its end.
                self.shut(SHUTDOWN_SEND);
            }
        } else if events.contains(EventSet::OUT) {
            self.flush();
        }
    }

    fn flush(&mut self) {
        match write_front(&self.stream, &mut self.buffer) {
            Ok(done) => self.advance(done),
            Err(_) => self.stop_receiving(),
        }
        self.close_sending();
    }

    /// The host's side reads no more: what it did not take is lost, as on any closed socket.
    fn stop_receiving(&mut self) {
        let lost = self.buffered();
        self.buffer = VecDeque::new();
        self.advance(lost);
        self.shut(SHUTDOWN_RECEIVE);
    }

    fn buffered(&self) -> u32 {
        u32::try_from(self.buffer.len()).unwrap_or(u32::MAX)
    }

    /// Bytes have left our care; tells the guest when half of the buffer is news to it.
    fn advance(&mut self, len: u32) {
        self.forwarded += len;
        if (self.forwarded - self.forwarded_told).0 >= self.buf_alloc / 2 {
            self.pending.credit_update = true;
        }
    }

    fn shut(&mut self, flag: u32) {
        if self.host_shutdown & flag == 0 {
            self.host_shutdown |= flag;
            // A hang-up shuts both directions; it is told when all that came before it was read.
            self.pending.shutdown = !self.hung_up || self.host_shutdown & SHUTDOWN_SEND != 0;
        }
    }

    fn wants_read(&self) -> bool {
        self.state == State::Established
            && self.readable
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// The next packet for the guest, its payload in `space`.
    pub fn next_packet(&mut self, space: &GuestSlice) -> Option<Header> {
        if self.state == State::Dead {
            return Some(self.header(op::RST));
        }
        if std::mem::take(&mut self.pending.request) {
            return Some(self.header(op::REQUEST));
        }
        if std::mem::take(&mut self.pending.response) {
            return Some(self.header(op::RESPONSE));
        }
        if self.wants_read()
            && let Some(len) = self.read(space)
        {
            let mut header = self.header(op::RW);
            header.len = len;
            return Some(header);
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return Some(self.header(op::CREDIT_REQUEST));
        }
        if std::mem::take(&mut self.pending.shutdown) {
            let mut header = self.header(op::SHUTDOWN);
            header.flags = self.host_shutdown;
            if self.host_shutdown == SHUTDOWN_BOTH {
                self.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
            }
            return Some(header);
        }
        if self.pending.credit_update {
            return Some(self.header(op::CREDIT_UPDATE));
        }
        None
    }

    /// Reads from the socket to `space` as far as the guest's credit goes.
    fn read(&mut self, space: &GuestSlice) -> Option<u32> {
        let credit = self.credit();
        if credit == 0 {
            // Once: its next word on credit, whenever it comes, is the answer.
            self.pending.credit_request |= !std::mem::replace(&mut self.credit_asked, true);
            return None;
        }
        let credit = usize::try_from(credit).unwrap_or(usize::MAX);
        let len = space.len().min(credit).min(MAX_PAYLOAD);
        let mut space = space.subslice(0, len).ok()?;
        loop {
            match self.stream.read_volatile(&mut space).map_err(io_error) {
                Ok(0) => break,
                Ok(len) => {
                    let len = u32::try_from(len).unwrap_or(u32::MAX);
                    self.sent += len;
                    return Some(len);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                Err(error) => {
                    wait_where_lost(&error, &[space]);
                    self.hung_up = true;
                    self.stop_receiving();
                    break;
                }
            }
        }
        self.readable = false;
        self.shut(SHUTDOWN_SEND);
        None
    }

    /// A header with the ports, and our word on credit.
    fn header(&mut self, op: u16) -> Header {
        self.pending.credit_update = false;
        self.forwarded_told = self.forwarded;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded.0,
        }
    }
}

/// Writes what the socket takes from the front of `buffer`; returns how many bytes.
pub(super) fn write_front(mut stream: &UnixStream, buffer: &mut VecDeque<u8>) -> io::Result<u32> {
    let mut total = 0;
    while !buffer.is_empty() {
        match stream.write(buffer.as_slices().0) {
            Ok(done) => {
                buffer.drain(..done);
                total += u32::try_from(done).unwrap_or(u32::MAX);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    if buffer.is_empty() {
        // An idle connection keeps no memory.
        buffer.shrink_to_fit();
    }
    Ok(total)
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
