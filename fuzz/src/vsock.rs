//! The socket device, between a driver that breaks its rules and host programs that come and go.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use arbitrary::Arbitrary;
use snapshot_fmt::state::virtio::{VsockConnectionState, VsockPorts, VsockState};
use vmm::devices::virtio::testing::{HIGH, r, w};
use vmm::devices::virtio::vsock::{Vsock, VsockConfig};

use crate::guest::{BUFFERS, Guest, MAX_STEPS};
use crate::step::Step;

const CID: u32 = 52;
const HOST_CID: u64 = 2;
/// A port of the host where somebody listens.
const SERVER: u32 = 9;
/// Where a packet is that is sent.
const PACKET: u64 = BUFFERS;
/// Where packets are received.
pub const RECEIVE: u64 = HIGH;
/// Packets that the receive queue has room for.
const RECEIVED_AT_ONCE: u32 = 16;
/// Most clients, and most connections that the server takes.
const MAX_STREAMS: usize = 16;

/// Operations.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Grants it.
    pub const RESPONSE: u16 = 2;
    /// Data.
    pub const RW: u16 = 5;
}

/// `struct virtio_vsock_hdr`.
#[derive(Arbitrary, Clone, Copy, Debug, Default)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Its port.
    pub src_port: u32,
    /// Its port.
    pub dst_port: u32,
    /// Bytes of data.
    pub len: u32,
    /// Type of the socket.
    pub kind: u16,
    /// Operation.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// The sender's credit.
    pub buf_alloc: u32,
    /// And its count.
    pub fwd_cnt: u32,
}

impl Header {
    /// From the first 44 bytes.
    pub fn parse(bytes: &[u8]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ]
        .concat()
    }

    /// A packet of the same connection the other way.
    pub fn answer(&self, op: u16, buf_alloc: u32) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op,
            buf_alloc,
            ..Self::default()
        }
    }

    /// Sends the packet as it is, with these data.
    pub fn send(&self, guest: &mut Guest<Vsock>, data: &[u8]) {
        guest.write(PACKET, &self.bytes());
        guest.write(PACKET + 44, data);
        let len = u32::try_from(data.len()).unwrap_or(0);
        guest.offer(1, &[r(PACKET, 44), r(PACKET + 44, len)]);
    }
}

/// Steps of the driver and of the host's programs.
pub type Input = Vec<VsockStep>;

/// A port.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Port {
    /// The server's.
    Server,
    /// One of those that clients get.
    Client(u8),
    /// One of a few.
    Few(u8),
    /// Any.
    Any(u32),
}

impl Port {
    fn number(self) -> u32 {
        match self {
            Self::Server => SERVER,
            Self::Client(index) => (1 << 30) + u32::from(index % 8),
            Self::Few(port) => u32::from(port % 4),
            Self::Any(port) => port,
        }
    }
}

/// A step.
#[derive(Arbitrary, Clone, Debug)]
pub enum VsockStep {
    /// Any driver's.
    Any(Step),
    /// A packet whose header may be anything.
    Raw(Header, u16),
    /// A packet of a connection: host port, guest port, operation, flags, bytes of data, credit.
    Packet(Port, Port, u8, u8, u16, u32, u32),
    /// So many receive buffers, of so many bytes each.
    Post(u8, u16),
    /// A host client comes, asks for this port, and sends so many bytes.
    Connect(u32, u16),
    /// Or says something else.
    Nonsense(Vec<u8>),
    /// A host program sends so many bytes.
    HostSend(u8, u16),
    /// A host program reads what there is.
    HostRead(u8),
    /// A host program hangs up.
    HostClose(u8),
    /// The server takes a connection.
    Accept,
}

/// The sandbox's socket; there is one, as each input is over before the next begins.
pub fn socket_path() -> PathBuf {
    socket_called("sock")
}

fn socket_called(extension: &str) -> PathBuf {
    std::env::temp_dir().join(format!("bough-fuzz-{}.{extension}", std::process::id()))
}

fn device(socket_path: PathBuf) -> Vsock {
    let config = VsockConfig {
        cid: CID,
        socket_path,
        kept_port: SERVER,
    };
    Vsock::new(config).expect("a device")
}

/// A guest whose driver is ready.
pub fn new_guest() -> Guest<Vsock> {
    let mut guest = Guest::new(device(socket_path()));
    guest.restart(true);
    guest
}

/// The host's programs.
struct Host {
    server: UnixListener,
    path: PathBuf,
    /// The device's socket.
    socket: PathBuf,
    streams: Vec<UnixStream>,
}

impl Host {
    fn new(socket: PathBuf) -> Self {
        let mut path = socket.clone().into_os_string();
        path.push(format!("_{SERVER}"));
        // An input that failed, or a process that was killed, leaves its own.
        let _ = std::fs::remove_file(&path);
        let server = UnixListener::bind(&path).expect("a socket");
        server.set_nonblocking(true).expect("a socket");
        Self {
            server,
            path: path.into(),
            socket,
            streams: Vec::new(),
        }
    }

    fn connect(&mut self, bytes: &[u8]) {
        if self.streams.len() == MAX_STREAMS {
            return;
        }
        let mut client = UnixStream::connect(&self.socket).expect("a connection");
        client.set_nonblocking(true).expect("a socket");
        client.write_all(bytes).expect("room for a line");
        self.streams.push(client);
    }

    fn stream(&mut self, which: u8) -> Option<&mut UnixStream> {
        let count = self.streams.len().max(1);
        self.streams.get_mut(usize::from(which) % count)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Runs the device between both.
pub fn run(steps: &Input) {
    let mut host = Host::new(socket_path());
    let mut guest = new_guest();
    take_all(&mut guest, &mut host, steps);
    end(guest, host);
}

/// A guest that is saved after some steps, and takes others once it goes on.
#[derive(Arbitrary, Clone, Debug)]
pub struct SavedInput {
    before: Input,
    /// What it goes on from, if not from what was saved.
    saved: Option<Saved>,
    after: Input,
}

/// A state that a file may have.
#[derive(Arbitrary, Clone, Debug)]
pub struct Saved {
    has_cid: bool,
    next_host_port: u32,
    /// The connection's port in the guest, and its counts.
    kept: Option<(Port, Port, [u32; 6])>,
    ended: Vec<(Port, Port)>,
    reset: bool,
}

impl Saved {
    fn state(&self) -> VsockState {
        let ports = |&(host, guest): &(Port, Port)| VsockPorts {
            host: host.number(),
            guest: guest.number(),
        };
        let kept = self
            .kept
            .as_ref()
            .map(|(host, guest, counts)| VsockConnectionState {
                ports: ports(&(*host, *guest)),
                buf_alloc: counts[0],
                forwarded: counts[1],
                forwarded_told: counts[2],
                sent: counts[3],
                peer_fwd_cnt: counts[4],
                peer_buf_alloc: counts[5],
            });
        VsockState {
            cid: if self.has_cid { CID } else { CID + 1 },
            next_host_port: self.next_host_port,
            kept,
            // More than a device can have.
            ended: self
                .ended
                .iter()
                .cycle()
                .take(self.ended.len() * 300)
                .map(ports)
                .collect(),
            reset: self.reset,
        }
    }
}

/// Saves the device between its steps, and goes on with another: in that the guest's connections are gone, but for one at most.
pub fn run_saved(input: &SavedInput) {
    let mut host = Host::new(socket_path());
    let mut guest = new_guest();
    take_all(&mut guest, &mut host, &input.before);
    let own = guest.driver.device.lock().expect("a device").save();
    drop(host);
    let socket = socket_called("restored");
    let mut host = Host::new(socket.clone());
    let mut device = device(socket);
    let state = input.saved.as_ref().map_or(own, Saved::state);
    let is_kept = state.kept.is_some() && state.cid == CID;
    match device.load(&state) {
        Ok(stream) => {
            assert_eq!(stream.is_some(), is_kept);
            if let Some(stream) = stream {
                stream.set_nonblocking(true).expect("a socket");
                host.streams.push(stream);
            }
        }
        Err(error) => {
            assert!(input.saved.is_some(), "what was saved is refused: {error}");
            return;
        }
    }
    if guest.go_on(device) {
        guest.driver.run();
        take_all(&mut guest, &mut host, &input.after);
        end(guest, host);
    }
}

fn take_all(guest: &mut Guest<Vsock>, host: &mut Host, steps: &[VsockStep]) {
    for step in steps.iter().take(MAX_STEPS) {
        take(guest, host, step);
        guest.driver.run();
    }
}

/// Whatever was before: nothing but buffers was written to, and the device is usable.
fn end(mut guest: Guest<Vsock>, mut host: Host) {
    guest.check_memory();
    // A device that was reset has forgotten everybody, and serves those who come.
    guest.restart(true);
    for stream in &mut host.streams {
        while stream.read(&mut [0; 4096]).is_ok_and(|len| len > 0) {}
    }
    host.streams.clear();
    guest.driver.run();
    while host.server.accept().is_ok() {}
    let request = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: 77,
        dst_port: SERVER,
        kind: 1,
        op: op::REQUEST,
        ..Header::default()
    };
    request.send(&mut guest, &[]);
    // A client that came and went while the device was in reset is still a client: the guest hears of it too. The queue has room for few packets.
    let address = |buffer: u32| RECEIVE + u64::from(buffer) * 0x100;
    let mut free: Vec<u32> = (0..RECEIVED_AT_ONCE).collect();
    let mut answered = false;
    while !answered && !free.is_empty() {
        for buffer in free.drain(..) {
            guest.driver.add(0, &[w(address(buffer), 100)]);
        }
        guest.driver.kick(0);
        // Buffers are used in their order, so descriptors and buffers have the same numbers.
        for (id, _) in guest.driver.used(0) {
            let header = Header::parse(&guest.driver.read(address(id), 44));
            answered |= (header.op, header.dst_port) == (op::RESPONSE, 77);
            free.push(id);
        }
    }
    assert!(answered);
    host.server.accept().expect("a connection");
}

fn take(guest: &mut Guest<Vsock>, host: &mut Host, step: &VsockStep) {
    match *step {
        VsockStep::Any(ref step) => guest.step(step),
        VsockStep::Raw(ref header, len) => header.send(guest, &data(len)),
        VsockStep::Packet(to, from, op, flags, len, buf_alloc, fwd_cnt) => {
            let data = data(if u16::from(op % 9) == op::RW { len } else { 0 });
            let header = Header {
                src_cid: CID.into(),
                dst_cid: HOST_CID,
                src_port: from.number(),
                dst_port: to.number(),
                len: u32::try_from(data.len()).unwrap_or(0),
                kind: 1,
                op: u16::from(op % 9),
                flags: flags.into(),
                buf_alloc,
                fwd_cnt,
            };
            header.send(guest, &data);
        }
        VsockStep::Post(count, len) => {
            for index in 0..u64::from(count % 8) {
                guest.post(0, w(RECEIVE + index * 0x2000, len.into()));
            }
            guest.driver.kick(0);
        }
        VsockStep::Connect(port, len) => {
            let mut bytes = format!("CONNECT {port}\n").into_bytes();
            bytes.extend(data(len));
            host.connect(&bytes);
        }
        VsockStep::Nonsense(ref bytes) => host.connect(&bytes[..bytes.len().min(64)]),
        VsockStep::HostSend(which, len) => {
            if let Some(stream) = host.stream(which) {
                // It takes what it takes.
                let _ = stream.write(&data(len));
            }
        }
        VsockStep::HostRead(which) => {
            if let Some(stream) = host.stream(which) {
                let _ = stream.read(&mut vec![0; 0x1_0000]);
            }
        }
        VsockStep::HostClose(which) => {
            if !host.streams.is_empty() {
                host.streams
                    .swap_remove(usize::from(which) % host.streams.len());
            }
        }
        VsockStep::Accept => {
            if let Ok((stream, _)) = host.server.accept()
                && host.streams.len() < MAX_STREAMS
            {
                stream.set_nonblocking(true).expect("a socket");
                host.streams.push(stream);
            }
        }
    }
}

fn data(len: u16) -> Vec<u8> {
    (0..len).map(|at| at as u8 | 1).collect()
}
