//! A guest's side of the socket device, packet by packet.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::device::QUEUE_SIZES;
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use super::{Vsock, VsockConfig};
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, HIGH, WRITE, r};

pub(super) const CID: u32 = 52;
/// The host's port of the connection that is kept.
pub(super) const LINK: u32 = 1024;
/// Where a packet to be sent is.
pub(super) const PACKET: u64 = BUFFERS;
/// Payload that fits into one of the receive buffers.
pub(super) const ROOM: usize = 4096;

/// A packet that the guest received.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub header: Header,
    pub data: Vec<u8>,
}

pub(super) struct Guest {
    pub driver: FakeDriver<Vsock>,
    pub dir: TempDir,
    /// The credit that the guest gives in each packet, and its count.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

pub(super) fn config(dir: &TempDir) -> VsockConfig {
    VsockConfig {
        cid: CID,
        socket_path: dir.path().join("vsock"),
        kept_port: LINK,
    }
}

impl Guest {
    /// A guest with receive buffers.
    pub fn new() -> Self {
        let mut this = Self::without_buffers();
        this.post_all();
        this
    }

    pub fn without_buffers() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let driver = FakeDriver::started(Vsock::new(config(&dir)).unwrap());
        Self {
            driver,
            dir,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        }
    }

    pub fn post_all(&mut self) {
        for index in 0..QUEUE_SIZES[0] {
            self.post(index);
        }
        self.driver.kick(0);
    }

    /// Gives a receive buffer to the device, one descriptor each as Linux does.
    pub fn post(&mut self, index: u16) {
        let len = u32::try_from(44 + ROOM).unwrap();
        self.driver
            .raw_desc(0, index, buffer(index.into()), len, WRITE, 0);
        self.driver.make_available(0, index);
    }

    /// Packets that came; their buffers are posted again.
    pub fn receive(&mut self) -> Vec<Packet> {
        self.driver.run();
        let mut packets = Vec::new();
        loop {
            let used = self.driver.used(0);
            if used.is_empty() {
                return packets;
            }
            for (id, len) in used {
                let at = buffer(id.into());
                let len = usize::try_from(len).unwrap();
                let bytes = self.driver.read(at, len);
                let header = Header::parse(bytes[..44].try_into().unwrap());
                assert_eq!(header.len as usize, len - 44);
                let data = bytes[44..].to_vec();
                packets.push(Packet { header, data });
                self.post(u16::try_from(id).unwrap());
            }
            self.driver.kick(0);
        }
    }

    /// The only packet that came.
    pub fn receive_one(&mut self) -> Packet {
        let mut packets = self.receive();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.pop().unwrap()
    }

    pub fn header(&self, op: u16, host_port: u32, guest_port: u32, len: usize) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            len: u32::try_from(len).unwrap(),
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    pub fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.driver.write(PACKET, &header.to_bytes());
        self.driver.write(PACKET + 44, data);
        let len = u32::try_from(data.len()).unwrap();
        let mut chain = vec![r(PACKET, 44)];
        if len > 0 {
            chain.push(r(PACKET + 44, len));
        }
        self.driver.add(1, &chain);
        self.driver.kick(1);
    }

    pub fn send(&mut self, op: u16, (host_port, guest_port): (u32, u32), data: &[u8]) {
        let header = self.header(op, host_port, guest_port, data.len());
        self.send_raw(header, data);
    }

    pub fn shut_down(&mut self, (host_port, guest_port): (u32, u32), flags: u32) {
        let mut header = self.header(op::SHUTDOWN, host_port, guest_port, 0);
        header.flags = flags;
        self.send_raw(header, &[]);
    }

    pub fn socket_path(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// A host client that has sent its line.
    pub fn client(&mut self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.socket_path()).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        writeln!(client, "CONNECT {port}").unwrap();
        client
    }

    /// A connection from a host client to the guest's `port`: its ports and the client.
    pub fn connected_from_host(&mut self, port: u32) -> ((u32, u32), UnixStream) {
        let mut client = self.client(port);
        let request = self.receive_one().header;
        assert_eq!((request.op, request.dst_port), (op::REQUEST, port));
        let ports = (request.src_port, port);
        self.send(op::RESPONSE, ports, &[]);
        let answer = read_some(&mut client);
        assert_eq!(answer, format!("OK {}\n", request.src_port).as_bytes());
        // A guest that gives no credit is asked for some.
        let rest = self.receive();
        assert!(rest.iter().all(|p| p.header.op == op::CREDIT_REQUEST));
        (ports, client)
    }

    /// Somebody who listens at the host's `port`.
    pub fn listen(&self, port: u32) -> UnixListener {
        let path = self.dir.path().join(format!("vsock_{port}"));
        UnixListener::bind(path).unwrap()
    }

    /// A connection from the guest's `guest_port` to a new listener at `host_port`.
    pub fn connected_from_guest(&mut self, ports: (u32, u32)) -> UnixStream {
        let listener = self.listen(ports.0);
        self.send(op::REQUEST, ports, &[]);
        let response = self.receive_one().header;
        assert_eq!(response.op, op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), ports);
        let (server, _) = listener.accept().unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        server
    }

    /// Connections, handshakes and rests.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.driver.device.lock().unwrap().muxer.counts()
    }

    pub fn expire(&mut self) {
        self.driver.device.lock().unwrap().muxer.expire();
        self.driver.run_for(1000);
    }
}

fn buffer(index: u64) -> u64 {
    HIGH + index * 0x2000
}

/// What one read brings; empty at the end.
pub(super) fn read_some(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    match stream.read(&mut bytes) {
        Ok(len) => bytes.truncate(len),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => bytes.clear(),
        Err(error) => panic!("{error}"),
    }
    bytes
}
