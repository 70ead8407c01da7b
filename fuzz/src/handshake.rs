//! What a host client says first, against a plain reading of the rule: `CONNECT `, a port in decimal, a newline.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use vmm::devices::virtio::testing::w;

use crate::vsock::{Header, RECEIVE, new_guest, op, socket_path};

/// Longest line that is taken.
const MAX_LINE: usize = 32;
const ROOM: u32 = 0x1000;

/// A client.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    pieces: Vec<Piece>,
    /// It hangs up after its last piece.
    leaves: bool,
}

/// What it writes at once.
#[derive(Arbitrary, Clone, Debug)]
pub enum Piece {
    /// Anything.
    Raw(Vec<u8>),
    /// The word.
    Connect,
    /// A number.
    Port(u64),
    /// The end of the line.
    Newline,
}

/// Lets a client connect, and a guest that behaves take the connection.
pub fn run(input: &Input) {
    let mut guest = new_guest();
    for index in 0..8 {
        guest
            .driver
            .add(0, &[w(RECEIVE + index * 0x2000, 44 + ROOM)]);
    }
    guest.driver.kick(0);
    let mut client = UnixStream::connect(socket_path()).expect("a connection");
    client.set_nonblocking(true).expect("a socket");
    guest.driver.run();
    let mut sent = Vec::new();
    for piece in input.pieces.iter().take(16) {
        let bytes = match piece {
            Piece::Raw(bytes) => bytes.iter().copied().take(64).collect(),
            Piece::Connect => b"CONNECT ".to_vec(),
            Piece::Port(port) => port.to_string().into_bytes(),
            Piece::Newline => b"\n".to_vec(),
        };
        // Once it is refused, nobody listens.
        if client.write_all(&bytes).is_err() {
            break;
        }
        sent.extend(bytes);
        guest.driver.run();
    }
    let want = port(&sent);
    if input.leaves {
        drop(client);
        guest.driver.run();
        assert!(!guest.driver.needs_reset());
        return;
    }
    let used = guest.driver.used(0);
    let Some((port, rest)) = want else {
        assert_eq!(used, [], "{sent:?} is no line");
        return;
    };
    assert_eq!(used.len(), 1, "{sent:?} is a line");
    let request = Header::parse(&guest.driver.read(RECEIVE, 44));
    assert_eq!((request.op, request.dst_port), (op::REQUEST, port));
    let response = request.answer(op::RESPONSE, 1 << 16);
    response.send(&mut guest, &[]);
    let mut answer = [0; 64];
    let len = match client.read(&mut answer) {
        Ok(len) => len,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    };
    let ok = format!("OK {}\n", request.src_port);
    assert_eq!(&answer[..len], ok.as_bytes());
    // What came after the line is the connection's.
    let mut got: Vec<u8> = Vec::new();
    for (id, len) in guest.driver.used(0) {
        let packet = guest
            .driver
            .read(RECEIVE + u64::from(id) * 0x2000, len as usize);
        let header = Header::parse(&packet);
        assert_eq!(
            (header.op, header.len as usize),
            (op::RW, packet.len() - 44)
        );
        got.extend(&packet[44..]);
    }
    assert_eq!(got, rest);
    assert!(!guest.driver.needs_reset());
}

/// The port that a client asks for, and what it sent after that.
fn port(sent: &[u8]) -> Option<(u32, &[u8])> {
    let end = sent
        .iter()
        .position(|&byte| byte == b'\n')
        .filter(|&end| end < MAX_LINE)?;
    let line = std::str::from_utf8(&sent[..end]).ok()?;
    let port = line.strip_prefix("CONNECT ")?;
    if port.starts_with('+') {
        return None;
    }
    Some((port.parse().ok()?, &sent[end + 1..]))
}
