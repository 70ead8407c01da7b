//! What a host client says first: `CONNECT <port>\n`.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, recv};

/// Longest line: the word, a space, ten digits, the newline; and a little more.
const MAX_LINE: usize = 32;

/// A client that has not finished its line.
pub(super) struct Handshake {
    pub stream: UnixStream,
    pub deadline: Instant,
}

/// How far a client has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not complete.
    Waiting,
    /// It wants this port of the guest.
    Connect(u32),
    /// It said something else, or it is gone.
    Refused,
}

impl Handshake {
    /// Looks at what the client has sent. Takes the line, when it is complete, and nothing after it.
    pub fn progress(&mut self) -> Progress {
        match self.line() {
            Ok(Some(line)) => match parse(&line) {
                Some(port) => Progress::Connect(port),
                None => Progress::Refused,
            },
            Ok(None) => Progress::Waiting,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Progress::Waiting,
            Err(error) if error.kind() == ErrorKind::Interrupted => self.progress(),
            Err(_) => Progress::Refused,
        }
    }

    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = [0; MAX_LINE];
        let (len, _) = recv(&self.stream, &mut bytes[..], RecvFlags::PEEK)?;
        match bytes[..len].iter().position(|&byte| byte == b'\n') {
            Some(end) => {
                let mut line = vec![0; end + 1];
                self.stream.read_exact(&mut line)?;
                line.pop();
                Ok(Some(line))
            }
            None if len == 0 || len == MAX_LINE => Err(ErrorKind::InvalidData.into()),
            None => Ok(None),
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = line.strip_prefix(b"CONNECT ")?;
    if !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(port).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (Handshake, UnixStream) {
        let (stream, client) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let deadline = Instant::now();
        (Handshake { stream, deadline }, client)
    }

    #[test]
    fn a_line_may_come_in_pieces_and_leaves_what_follows() {
        let (mut handshake, mut client) = pair();
        for piece in ["", "CONN", "ECT 52"] {
            client.write_all(piece.as_bytes()).unwrap();
            assert_eq!(handshake.progress(), Progress::Waiting);
        }
        client.write_all(b"0\nCONNECT 1\n").unwrap();
        assert_eq!(handshake.progress(), Progress::Connect(520));
        let mut rest = [0; 10];
        handshake.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"CONNECT 1\n");
    }

    #[test]
    fn anything_else_is_refused() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 1 \n",
            "CONNECT 1\r\n",
            "CONNECT 4294967296\n",
            "connect 1\n",
            "CONNECT 00000000000000000000000000001\n",
            "GET / HTTP/1.1\r\nHost: a sandbox\r\n",
            "\u{ff}\u{ff}\n",
        ] {
            let (mut handshake, mut client) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(handshake.progress(), Progress::Refused, "{line:?}");
        }
        let (mut handshake, client) = pair();
        drop(client);
        assert_eq!(handshake.progress(), Progress::Refused);
    }
}
