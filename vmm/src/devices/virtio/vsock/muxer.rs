//! All connections of a guest, and the host clients that want one.
//!
//! It takes the guest's packets, has the next packet for the guest, and watches the host's sockets with
//! an epoll of its own, which is one file descriptor to the event loop. Everything in it is bounded: see
//! the constants. At a bound it stops taking, from the guest or from the listening socket, and goes on
//! when there is room; it drops nothing.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use snapshot_fmt::state::virtio::{VsockConnectionState, VsockPorts};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Key, write_front};
use super::handshake::{Handshake, Progress};
use super::held::Held;
use super::listener::Listener;
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use crate::devices::virtio::GuestSlice;
use crate::devices::virtio::signal::Signal;

/// Most connections, those that only have their last bytes to write among them.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// Most host clients that have not finished their `CONNECT` line. Others wait in the kernel.
pub(super) const MAX_HANDSHAKES: usize = 64;
/// How long a host client may take for its line.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Most replies to packets without a connection; then the guest's packets wait.
pub(super) const MAX_REPLIES: usize = 64;
/// Most connections that a restored guest is told to be no more, each by a reset.
pub(super) const MAX_ENDED: usize = MAX_CONNECTIONS + MAX_REPLIES;
/// Bytes that a connection takes from the guest ahead of its socket. A guest hears of used credit by an
/// interrupt per half of it, so the usual few connections get more than a crowd does.
pub(super) const BUFFER_SIZE: u32 = 256 * 1024;
pub(super) const CROWD: usize = 64;
pub(super) const CROWD_BUFFER_SIZE: u32 = 64 * 1024;
/// Ports for connections from the host.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// Epoll data: two fixed ones, then ids, which are never used twice.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;

/// A connection that is over, but for its last bytes to the host.
struct Rest {
    stream: UnixStream,
    buffer: VecDeque<u8>,
}

/// The host's side of the socket device.
pub(super) struct Muxer {
    guest_cid: u64,
    listener: Listener,
    epoll: Epoll,
    timer: TimerFd,
    /// When the timer fires.
    alarm: Option<Instant>,
    next_id: u64,
    pub next_host_port: u32,
    connections: HashMap<Key, Connection>,
    keys: HashMap<u64, Key>,
    handshakes: HashMap<u64, Handshake>,
    rests: HashMap<u64, Rest>,
    /// Connections with something to tell the guest, each once, the longest waiting first.
    line: VecDeque<Key>,
    replies: VecDeque<Header>,
    /// In a restored guest, until it has spoken.
    held: Option<Held>,
    /// Whether clients may wait at the listener.
    clients_wait: bool,
}

impl Muxer {
    pub fn new(guest_cid: u64, socket_path: PathBuf) -> io::Result<Self> {
        let this = Self {
            guest_cid,
            listener: Listener::bind(socket_path)?,
            epoll: Epoll::new()?,
            timer: TimerFd::new().map_err(io::Error::from)?,
            alarm: None,
            next_id: TIMER + 1,
            next_host_port: FIRST_HOST_PORT,
            connections: HashMap::new(),
            keys: HashMap::new(),
            handshakes: HashMap::new(),
            rests: HashMap::new(),
            line: VecDeque::new(),
            replies: VecDeque::new(),
            held: None,
            clients_wait: false,
        };
        this.watch(this.listener.as_raw_fd(), LISTENER)?;
        this.watch(this.timer.as_raw_fd(), TIMER)?;
        Ok(this)
    }

    /// The connection to the host's `port`, if there is exactly one and it can go on, and the ends of all others that the
    /// guest may know of.
    pub fn save(&self, port: u32) -> (Option<VsockConnectionState>, Vec<VsockPorts>) {
        let mut candidates = self
            .connections
            .values()
            .filter(|c| c.key.host_port == port);
        let kept = match (candidates.next(), candidates.next()) {
            (Some(only), None) => only.save(),
            _ => None,
        };
        let kept_ports = kept.as_ref().map(|kept| kept.ports);
        let connected = self.connections.keys().map(|&key| key.into());
        // A refusal that the guest has not got yet ends what it takes for a connection, too.
        let refused = self.replies.iter().map(|reply| VsockPorts {
            host: reply.src_port,
            guest: reply.dst_port,
        });
        let held = self.held.iter().flat_map(Held::ended).copied();
        let ended = connected.chain(refused).chain(held);
        (
            kept,
            ended.filter(|&ports| Some(ports) != kept_ports).collect(),
        )
    }

    /// Goes on with a connection that was saved; returns the host's end of it. Until the guest has said something on it, or it
    /// ends, the resets of those that `ended` are held back, and new clients wait.
    pub fn restore(
        &mut self,
        kept: &VsockConnectionState,
        ended: &[VsockPorts],
    ) -> io::Result<UnixStream> {
        let (stream, host) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let id = self.new_id();
        self.watch(stream.as_raw_fd(), id)?;
        self.add(Connection::restored(id, stream, self.guest_cid, kept));
        self.hold_back(Held::new(Some(kept.ports.into()), ended));
        Ok(host)
    }

    /// Holds back the resets of connections that have ended, and new clients.
    pub fn hold_back(&mut self, held: Held) {
        self.held = Some(held);
    }

    /// Lets go of the resets that waited for the connection `kept`; none for the lane's.
    pub fn release(&mut self, kept: Option<Key>) {
        if let Some(held) = self.held.take_if(|held| held.kept == kept) {
            self.replies.extend(held.resets(self.guest_cid));
        }
    }

    /// Forgets every connection; the clients see theirs closed. Bytes that the guest has sent still go
    /// out.
    pub fn reset(&mut self) {
        let keys: Vec<_> = self.connections.keys().copied().collect();
        for key in keys {
            self.remove(key);
        }
        self.handshakes.clear();
        self.line.clear();
        self.replies.clear();
        self.held = None;
    }

    /// Whether there is room for whatever the guest's next packet may be.
    pub fn can_take(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    /// Takes a packet from the guest.
    pub fn take(&mut self, header: &Header, payload: &[GuestSlice], signal: &Signal) {
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let known = header.src_cid == self.guest_cid
            && header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM;
        let held = self.held.as_mut();
        if let Some(connection) = self.connections.get_mut(&key).filter(|_| known) {
            if !connection.take(header, payload) {
                self.remove(key);
            } else {
                self.enqueue(key);
                if header.op == op::RW && header.len > 0 {
                    self.release(Some(key));
                }
            }
        } else if known && held.is_some_and(|held| held.silences(key, header.op)) {
            // It has yet to learn that this one is no more.
        } else if known && header.op == op::REQUEST {
            self.accept_from_guest(key, header, signal);
        } else if header.op != op::RST {
            self.replies.push_back(header.reset());
        }
    }

    fn accept_from_guest(&mut self, key: Key, header: &Header, signal: &Signal) {
        let opened = if self.is_full() {
            Err(io::Error::other("too many connections"))
        } else {
            self.listener.connect_to(key.host_port)
        };
        let added = opened.and_then(|stream| {
            let id = self.new_id();
            self.watch(stream.as_raw_fd(), id)?;
            let size = self.buffer_size();
            self.add(Connection::from_guest(id, stream, header, size));
            Ok(())
        });
        if let Err(error) = added {
            let port = key.host_port;
            signal.warn(format_args!("no connection to host port {port}: {error}"));
            self.replies.push_back(header.reset());
        }
    }

    /// Whether the guest should be given a packet.
    pub fn has_packet(&self) -> bool {
        !self.replies.is_empty() || !self.line.is_empty()
    }

    /// The next packet for the guest, its payload in `space`.
    pub fn next_packet(&mut self, space: &GuestSlice) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(key) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_packet(space);
            let deadline = connection.deadline;
            if packet.is_some() && connection.is_dead() {
                self.remove(key);
            } else {
                self.enqueue(key);
                self.wake_at(deadline);
            }
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// Deals with what has happened at the host's sockets. New clients still wait.
    pub fn process(&mut self) {
        let mut events = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                log::warn!("virtio-vsock: cannot wait for host sockets: {error}");
                return;
            }
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.clients_wait = true,
                TIMER => self.ring(),
                id => self.socket_event(id, event.event_set()),
            }
        }
    }

    fn socket_event(&mut self, id: u64, events: EventSet) {
        if let Some(&key) = self.keys.get(&id) {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.socket_event(events);
                self.enqueue(key);
            }
        } else if let Some(handshake) = self.handshakes.get_mut(&id) {
            match handshake.progress() {
                Progress::Waiting => {}
                Progress::Connect(port) => self.connect_to_guest(id, port),
                Progress::Refused => drop(self.handshakes.remove(&id)),
            }
        } else if let Some(rest) = self.rests.get_mut(&id)
            && (write_front(&rest.stream, &mut rest.buffer).is_err() || rest.buffer.is_empty())
        {
            self.rests.remove(&id);
        }
    }

    /// Takes clients from the listening socket as far as there is room.
    pub fn accept_from_host(&mut self, signal: &Signal) {
        // The guest may take a client that comes too early for one of those that are no more.
        while self.clients_wait
            && self.held.is_none()
            && self.handshakes.len() < MAX_HANDSHAKES
            && !self.is_full()
        {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => {
                    self.clients_wait = false;
                    return;
                }
                Err(error) => {
                    // Most likely we have no file descriptor left; the next event tries again.
                    signal.warn(format_args!("cannot accept a client: {error}"));
                    return;
                }
            };
            let id = self.new_id();
            if let Err(error) = self.watch(stream.as_raw_fd(), id) {
                signal.warn(format_args!("cannot watch a client: {error}"));
                continue;
            }
            let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
            self.wake_at(Some(deadline));
            self.handshakes.insert(id, Handshake { stream, deadline });
        }
    }

    fn connect_to_guest(&mut self, id: u64, guest_port: u32) {
        let Some(Handshake { stream, .. }) = self.handshakes.remove(&id) else {
            return;
        };
        // There are more ports than connections.
        let key = loop {
            let host_port = self.next_host_port;
            self.next_host_port = if host_port < LAST_HOST_PORT {
                host_port + 1
            } else {
                FIRST_HOST_PORT
            };
            let key = Key {
                host_port,
                guest_port,
            };
            if !self.connections.contains_key(&key) {
                break key;
            }
        };
        let size = self.buffer_size();
        let cid = self.guest_cid;
        self.add(Connection::from_host(id, stream, key, cid, size));
    }

    fn add(&mut self, connection: Connection) {
        let (key, deadline) = (connection.key, connection.deadline);
        self.keys.insert(connection.id, key);
        self.connections.insert(key, connection);
        self.enqueue(key);
        self.wake_at(deadline);
    }

    fn remove(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(&key) else {
            return;
        };
        let id = connection.id;
        self.keys.remove(&id);
        if connection.queued {
            self.line.retain(|&other| other != key);
        }
        if let Some((stream, buffer)) = connection.into_rest() {
            self.rests.insert(id, Rest { stream, buffer });
        }
        self.release(Some(key));
    }

    fn enqueue(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !connection.queued
            && connection.has_packet()
        {
            connection.queued = true;
            self.line.push_back(key);
        }
    }

    fn is_full(&self) -> bool {
        // A handshake will become a connection.
        self.connections.len() + self.rests.len() + self.handshakes.len() >= MAX_CONNECTIONS
    }

    fn buffer_size(&self) -> u32 {
        // Those that are over hold their buffer until its last byte is written.
        if self.connections.len() + self.rests.len() < CROWD {
            BUFFER_SIZE
        } else {
            CROWD_BUFFER_SIZE
        }
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Watches a descriptor edge-triggered until it is closed.
    fn watch(&self, fd: RawFd, id: u64) -> io::Result<()> {
        let how = if id == TIMER {
            EventSet::IN
        } else {
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED
        };
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(how, id))
    }

    /// Makes sure that the timer fires by `deadline`.
    fn wake_at(&mut self, deadline: Option<Instant>) {
        let Some(deadline) = deadline else { return };
        if self.alarm.is_some_and(|alarm| alarm <= deadline) {
            return;
        }
        let wait = deadline.saturating_duration_since(Instant::now());
        // Zero would disarm it.
        match self.timer.reset(wait.max(Duration::from_millis(1)), None) {
            Ok(()) => self.alarm = Some(deadline),
            Err(error) => log::warn!("virtio-vsock: cannot set its timer: {error}"),
        }
    }

    /// The timer has fired: ends what took too long.
    fn ring(&mut self) {
        // Reads the count, which is there: nobody else reads it.
        let _ = self.timer.wait();
        self.alarm = None;
        let now = Instant::now();
        self.handshakes.retain(|_, h| h.deadline > now);
        let mut next = self.handshakes.values().map(|h| h.deadline).min();
        let mut late = Vec::new();
        for connection in self.connections.values_mut() {
            match connection.deadline {
                Some(deadline) if deadline <= now => {
                    connection.deadline = None;
                    connection.kill();
                    late.push(connection.key);
                }
                Some(deadline) => next = Some(next.map_or(deadline, |n| n.min(deadline))),
                None => {}
            }
        }
        for key in late {
            self.enqueue(key);
        }
        self.wake_at(next);
    }

    /// How many connections there are, and host clients that are not done with their line.
    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize, usize) {
        (
            self.connections.len(),
            self.handshakes.len(),
            self.rests.len(),
        )
    }

    /// As if every deadline had passed.
    #[cfg(test)]
    pub fn expire(&mut self) {
        let now = Instant::now();
        for handshake in self.handshakes.values_mut() {
            handshake.deadline = now;
        }
        for connection in self.connections.values_mut() {
            connection.deadline = connection.deadline.map(|_| now);
        }
        self.alarm = None;
        self.wake_at(Some(now));
    }
}

impl AsRawFd for Muxer {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
