//! An agent on this host, as an ordinary process behind a Unix socket, and a client
//! that speaks the protocol frame by frame, so that it can also break it.

#![allow(dead_code, reason = "no test program uses all of it")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest_agent::frame::{self, FrameBuffer};
use guest_agent::proto::{
    Credit, EnvVar, Error, Exec, FromAgent, Hello, Ping, Stream, ToAgent, exited::Status,
    from_agent::Kind, to_agent::Kind as Ask,
};
use rustix::net::{RecvFlags, recv};
use tempfile::TempDir;

/// Nothing here takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// An agent; it ends with this value.
pub struct TestAgent {
    process: Child,
    directory: TempDir,
}

impl TestAgent {
    pub fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_guest-agent"))
            .arg("--listen-unix")
            .arg(directory.path().join("agent"))
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { process, directory };
        wait_for("the agent's socket", || {
            UnixStream::connect(agent.socket()).is_ok()
        });
        agent
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent")
    }

    /// Where its programs run.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A client that has not said hello.
    pub fn dial(&self) -> Client {
        Client::new(UnixStream::connect(self.socket()).unwrap())
    }

    /// A client that has.
    pub fn connect(&self) -> Client {
        let mut client = self.dial();
        client.shake_hands(Hello {
            min_version: 1,
            max_version: 1,
            ..Hello::default()
        });
        client
    }

    /// The agent's own memory, in bytes.
    pub fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid())).unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    /// The states of the agent's children, as in proc(5): 'Z' is a zombie.
    pub fn children(&self) -> Vec<char> {
        let mut states = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
                continue;
            };
            let (_, rest) = stat.rsplit_once(") ").unwrap();
            let mut fields = rest.split(' ');
            let state = fields.next().unwrap().chars().next().unwrap();
            if fields.next().unwrap() == self.pid().to_string() {
                states.push(state);
            }
        }
        states
    }

    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until `done`, or fails.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a program wrote, and how it ended.
#[derive(Debug, Default)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub status: Option<Status>,
    pub warm: bool,
    pub error: Option<Error>,
}

impl Outcome {
    pub fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub fn stderr(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }
}

/// A client.
pub struct Client {
    stream: UnixStream,
    frames: FrameBuffer,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            frames: FrameBuffer::default(),
        }
    }

    /// Takes the agent's Hello and answers it.
    pub fn shake_hands(&mut self, hello: Hello) -> Hello {
        let Some(Kind::Hello(theirs)) = self.receive().unwrap().kind else {
            panic!("the agent did not say hello");
        };
        self.send(0, Ask::Hello(hello));
        theirs
    }

    /// Ends it so that the agent's socket fails by `ECONNRESET`, as all do in a guest that goes on without its connections.
    /// Between Unix sockets that is what becomes of one whose peer has left something unread.
    pub fn lose(mut self) {
        self.send(u32::MAX, Ask::Ping(Ping {}));
        recv(&self.stream, &mut [0; 1][..], RecvFlags::PEEK).unwrap();
    }

    pub fn send(&mut self, request_id: u32, kind: Ask) {
        let message = ToAgent {
            request_id,
            kind: Some(kind),
        };
        let mut bytes = Vec::new();
        frame::encode(&message, &mut bytes).unwrap();
        self.send_raw(&bytes);
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next message; `None` when the agent has closed the connection.
    pub fn receive(&mut self) -> Option<FromAgent> {
        loop {
            if let Some(message) = self.frames.next_message().unwrap() {
                return Some(message);
            }
            let mut chunk = [0; 65536];
            let count = match self.stream.read(&mut chunk) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
                Err(error) => panic!("waited in vain for a message: {error}"),
            };
            if count == 0 {
                return None;
            }
            self.frames.input().extend_from_slice(&chunk[..count]);
        }
    }

    /// The error that the agent ends the connection with.
    pub fn receive_last_error(&mut self) -> Error {
        let message = self.receive().expect("an error before the end");
        assert_eq!(message.request_id, 0, "{message:?}");
        let Some(Kind::Error(error)) = message.kind else {
            panic!("not an error: {message:?}");
        };
        assert!(
            self.receive().is_none(),
            "the connection goes on after {error:?}"
        );
        error
    }

    /// Follows a request to its end, giving credit for all that comes.
    pub fn follow(&mut self, id: u32) -> Outcome {
        let mut outcome = Outcome::default();
        loop {
            let message = self.receive().expect("the agent hung up");
            assert_eq!(message.request_id, id, "{message:?}");
            match message.kind.unwrap() {
                Kind::Stdout(out) => {
                    self.give_credit(id, Stream::Stdout, out.data.len());
                    outcome.stdout.extend(out.data);
                }
                Kind::Stderr(out) => {
                    self.give_credit(id, Stream::Stderr, out.data.len());
                    outcome.stderr.extend(out.data);
                }
                Kind::Exited(exited) => {
                    outcome.status = exited.status;
                    outcome.warm = exited.warm;
                    return outcome;
                }
                Kind::Error(error) => {
                    outcome.error = Some(error);
                    return outcome;
                }
                Kind::Started(_) | Kind::Credit(_) => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    pub fn give_credit(&mut self, id: u32, stream: Stream, bytes: usize) {
        let credit = Credit {
            stream: stream.into(),
            bytes: bytes.try_into().unwrap(),
        };
        self.send(id, Ask::Credit(credit));
    }

    /// Runs a program to its end.
    pub fn run(&mut self, exec: Exec) -> Outcome {
        self.send(1, Ask::Exec(exec));
        self.follow(1)
    }
}

/// A program and its arguments.
pub fn exec<const N: usize>(argv: [&str; N]) -> Exec {
    Exec {
        argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
        ..Exec::default()
    }
}

/// A line of shell.
pub fn shell(line: &str) -> Exec {
    exec(["sh", "-c", line])
}

pub fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.into(),
        value: value.into(),
    }
}
