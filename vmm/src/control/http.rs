//! HTTP/1.1 messages on a stream, as much of it as the API needs (RFC 9112): one request and one answer per
//! connection, bodies with a length, answers also in chunks. `httparse` reads the heads; all lengths are bounded.

use std::io::{self, BufRead, Read, Write};

use serde::Serialize;
use thiserror::Error;

/// Longest head that is read, in bytes.
const HEAD_MAX: usize = 16 << 10;
/// Most header fields.
const FIELDS_MAX: usize = 64;

/// A message cannot be read.
#[derive(Debug, Error)]
pub enum HttpError {
    /// The stream failed or ended early.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// It is no HTTP/1.1.
    #[error("not HTTP: {0}")]
    Syntax(#[from] httparse::Error),
    /// It is longer than it may be.
    #[error("the {part} is longer than {max} bytes")]
    TooLong {
        /// Head or body.
        part: &'static str,
        /// The bound.
        max: usize,
    },
    /// It uses what is not supported here.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// `GET`, `POST` and so on.
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// What follows the question mark.
    pub query: String,
    /// The body.
    pub body: Vec<u8>,
}

/// An answer's head, and what came of its body with it.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The body comes in chunks.
    chunked: bool,
    length: Option<u64>,
    rest: Vec<u8>,
}

/// Reads up to the empty line; returns the head and what came after it.
fn read_head(stream: &mut impl Read) -> Result<(Vec<u8>, Vec<u8>), HttpError> {
    let mut head = Vec::new();
    let mut buffer = [0; 2048];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let from = head.len().saturating_sub(3);
        head.extend_from_slice(&buffer[..count]);
        if let Some(end) = head[from..].windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = head.split_off(from + end + 4);
            return Ok((head, rest));
        }
        if head.len() > HEAD_MAX {
            let max = HEAD_MAX;
            return Err(HttpError::TooLong { part: "head", max });
        }
    }
}

fn field<'a>(fields: &'a [httparse::Header<'_>], name: &str) -> Option<&'a [u8]> {
    let mut fields = fields.iter();
    let found = fields.find(|field| field.name.eq_ignore_ascii_case(name));
    found.map(|field| field.value)
}

fn content_length(fields: &[httparse::Header<'_>]) -> Result<Option<u64>, HttpError> {
    let Some(value) = field(fields, "content-length") else {
        return Ok(None);
    };
    let digits = std::str::from_utf8(value).ok();
    let length = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let length = length.and_then(|digits| digits.parse().ok());
    length
        .map(Some)
        .ok_or(HttpError::Unsupported("this Content-Length"))
}

/// Reads a request whose body is at most `body_max` bytes long.
pub fn read_request(
    stream: &mut (impl Read + Write),
    body_max: usize,
) -> Result<Request, HttpError> {
    let (head, mut body) = read_head(stream)?;
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut fields);
    if parsed.parse(&head)?.is_partial() {
        return Err(HttpError::Unsupported("an empty line inside the head"));
    }
    if field(parsed.headers, "transfer-encoding").is_some() {
        return Err(HttpError::Unsupported("Transfer-Encoding in a request"));
    }
    let length = content_length(parsed.headers)?.unwrap_or(0);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > body_max {
        return Err(HttpError::TooLong {
            part: "body",
            max: body_max,
        });
    }
    let expects = field(parsed.headers, "expect").is_some();
    let (method, target) = (parsed.method.unwrap_or(""), parsed.path.unwrap_or(""));
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (method, path, query) = (method.to_owned(), path.to_owned(), query.to_owned());
    body.truncate(length);
    if body.len() < length {
        if expects {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let have = body.len();
        body.resize(length, 0);
        stream.read_exact(&mut body[have..])?;
    }
    Ok(Request {
        method,
        path,
        query,
        body,
    })
}

/// Writes a request with a JSON body.
pub fn write_request(
    stream: &mut impl Write,
    method: &str,
    target: &str,
    body: &[u8],
) -> io::Result<()> {
    let length = body.len();
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: sandbox\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

fn phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

/// Writes an answer with this body.
pub fn write_answer(
    stream: &mut impl Write,
    status: u16,
    content_type: &str,
    body: &[u8],
) -> io::Result<()> {
    let (phrase, length) = (phrase(status), body.len());
    let head = format!(
        "HTTP/1.1 {status} {phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(&[head.as_bytes(), body].concat())
}

/// An answer whose body is written as it comes, in chunks.
pub struct Chunks<W: Write>(W);

impl<W: Write> Chunks<W> {
    /// Writes the head.
    pub fn start(mut stream: W, content_type: &str) -> io::Result<Self> {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        Ok(Self(stream))
    }

    /// Writes a chunk.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(()); // an empty chunk would be the last
        }
        let head = format!("{:x}\r\n", bytes.len());
        self.0
            .write_all(&[head.as_bytes(), bytes, b"\r\n"].concat())
    }

    /// Writes a line of JSON, as a chunk.
    pub fn write_json(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.write(&line)
    }

    /// The stream that it writes to.
    pub fn stream(&self) -> &W {
        &self.0
    }

    /// Writes the end, without which the body counts as cut short.
    pub fn end(&mut self) -> io::Result<()> {
        self.0.write_all(b"0\r\n\r\n")
    }
}

/// Reads an answer's head.
pub fn read_answer(stream: &mut impl Read) -> Result<Answer, HttpError> {
    let (head, rest) = read_head(stream)?;
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Response::new(&mut fields);
    if parsed.parse(&head)?.is_partial() {
        return Err(HttpError::Unsupported("an empty line inside the head"));
    }
    let encoding = field(parsed.headers, "transfer-encoding");
    Ok(Answer {
        status: parsed.code.unwrap_or(0),
        chunked: encoding.is_some_and(|value| value.eq_ignore_ascii_case(b"chunked")),
        length: content_length(parsed.headers)?,
        rest,
    })
}

impl Answer {
    /// Reads a body of at most `max` bytes that has a length, or none.
    pub fn body(self, stream: &mut impl Read, max: usize) -> Result<Vec<u8>, HttpError> {
        if self.chunked {
            return Err(HttpError::Unsupported("an answer in chunks"));
        }
        let mut body = Vec::new();
        let length = self.length.unwrap_or(u64::MAX);
        let bound = max as u64 + 1;
        (&self.rest[..])
            .chain(stream)
            .take(length.min(bound))
            .read_to_end(&mut body)?;
        if body.len() > max {
            return Err(HttpError::TooLong { part: "body", max });
        }
        Ok(body)
    }

    /// Whether the body comes in chunks.
    pub fn is_chunked(&self) -> bool {
        self.chunked
    }

    /// The body of an answer in chunks, as it comes.
    pub fn chunks<'a>(self, stream: &'a mut impl Read) -> impl Read + 'a {
        Dechunked {
            stream: io::BufReader::new(io::Cursor::new(self.rest).chain(stream)),
            left: 0,
            first: true,
            ended: false,
        }
    }
}

/// What chunks hold (RFC 9112, section 7.1).
struct Dechunked<R> {
    stream: R,
    /// Bytes of the chunk that have not been read.
    left: u64,
    first: bool,
    ended: bool,
}

impl<R: BufRead> Dechunked<R> {
    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        (&mut self.stream).take(64).read_line(&mut line)?;
        match line.strip_suffix("\r\n") {
            Some(line) => Ok(line.to_owned()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl<R: BufRead> Read for Dechunked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !self.ended {
            if !self.first {
                self.line()?;
            }
            self.first = false;
            let length = self.line()?;
            let length = length.split(';').next().unwrap_or_default();
            self.left = u64::from_str_radix(length, 16).map_err(io::Error::other)?;
            self.ended = self.left == 0;
        }
        if self.ended {
            return Ok(0);
        }
        let count = (&mut self.stream).take(self.left).read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that is read from one end and written to another, a byte at a time.
    struct Slow<'a>(&'a [u8], Vec<u8>);
    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(1);
            (&mut self.0).take(1).read(&mut buffer[..count])
        }
    }
    impl Write for Slow<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn request(bytes: &[u8]) -> Result<Request, HttpError> {
        read_request(&mut Slow(bytes, Vec::new()), 16)
    }

    #[test]
    fn a_request_is_read() {
        let bytes = b"POST /v1/stop?now HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}";
        let request = request(bytes).unwrap();
        let Request {
            method,
            path,
            query,
            body,
        } = request;
        assert_eq!(
            (&*method, &*path, &*query, &*body),
            ("POST", "/v1/stop", "now", &b"{}"[..])
        );
    }

    #[test]
    fn bad_requests_are_refused() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(HEAD_MAX));
        for bytes in [
            &b"GET"[..],
            b"GET / HTTP/1.1\r\n",
            b"\0\x01\r\n\r\n",
            b"GET / HTTP/1.1\r\ncontent-length: 17\r\n\r\n12345678901234567",
            b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
            b"GET / HTTP/1.1\r\ncontent-length: 4\r\n\r\n12",
            b"GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            long.as_bytes(),
        ] {
            assert!(request(bytes).is_err(), "{:?}", bytes.escape_ascii());
        }
    }

    #[test]
    fn an_answer_comes_back() {
        let mut sent = Vec::new();
        write_answer(&mut sent, 409, "application/json", b"{}").unwrap();
        let mut stream = Slow(&sent, Vec::new());
        let answer = read_answer(&mut stream).unwrap();
        assert_eq!(answer.status, 409);
        assert_eq!(answer.body(&mut stream, 2).unwrap(), b"{}");
    }

    #[test]
    fn chunks_have_lengths_and_an_end() {
        let mut sent = Vec::new();
        let mut chunks = Chunks::start(&mut sent, "text/plain").unwrap();
        chunks.write(b"").unwrap();
        chunks.write(b"0123456789abcdefg").unwrap();
        chunks.end().unwrap();
        assert!(sent.ends_with(b"\r\n\r\n11\r\n0123456789abcdefg\r\n0\r\n\r\n"));
    }

    fn dechunked(sent: &[u8]) -> io::Result<String> {
        let mut stream = Slow(sent, Vec::new());
        let answer = read_answer(&mut stream).map_err(io::Error::other)?;
        assert!(answer.is_chunked());
        let mut body = String::new();
        answer.chunks(&mut stream).read_to_string(&mut body)?;
        Ok(body)
    }

    #[test]
    fn chunks_come_back() {
        let mut sent = Vec::new();
        let mut chunks = Chunks::start(&mut sent, "text/plain").unwrap();
        chunks.write(b"one\n").unwrap();
        chunks.write(b"0123456789abcdefg").unwrap();
        chunks.end().unwrap();
        assert_eq!(dechunked(&sent).unwrap(), "one\n0123456789abcdefg");
        for cut in 1..=b"g\r\n0\r\n".len() {
            assert!(dechunked(&sent[..sent.len() - 2 - cut]).is_err(), "{cut}");
        }
    }
}
