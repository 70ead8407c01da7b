//! The monitor's client (`vmm::agent`) against a real agent, and against agents that
//! lie. It lives here since it needs this crate's program.

mod common;

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use common::{TestAgent, exec, shell, wait_for};
use guest_agent::frame::{self, FrameBuffer};
use guest_agent::proto::{
    ErrorCode, Exited, FromAgent, Hello, Stdout, ToAgent, exited::Status, from_agent::Kind,
};
use vmm::agent::{
    Agent, AgentError, ExecRequest, ExitStatus, Language, RunCodeRequest, ShutdownMode, Stdin,
    Stdio,
};

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(20))
}

fn connect(agent: &TestAgent) -> Agent {
    Agent::from_stream(UnixStream::connect(agent.socket()).unwrap(), soon()).unwrap()
}

/// Runs a program and gives its outputs as text.
fn run(
    agent: &mut Agent,
    request: ExecRequest,
    stdin: Stdin,
) -> Result<(String, String, ExitStatus), AgentError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let stdio = Stdio {
        stdin,
        stdout: &mut stdout,
        stderr: &mut stderr,
    };
    let status = agent.exec(request, stdio)?;
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ok((text(stdout), text(stderr), status))
}

#[test]
fn programs_run_one_after_the_other() {
    let agent = TestAgent::start();
    let mut client = connect(&agent);
    assert!(client.hello().software.starts_with("bough-agent"));
    client.ping().unwrap();
    for code in 0..3 {
        let line = format!("echo out {code}; echo err >&2; exit {code}");
        let (stdout, stderr, status) = run(&mut client, shell(&line), Stdin::Null).unwrap();
        assert_eq!((stdout, stderr), (format!("out {code}\n"), "err\n".into()));
        assert_eq!(status, ExitStatus::Code(code));
    }
    let (_, _, status) = run(&mut client, shell("kill -9 $$"), Stdin::Null).unwrap();
    assert_eq!(status, ExitStatus::Signal(9));
    assert_eq!(status.shell_status(), 137);
}

#[test]
fn input_from_memory_arrives() {
    let agent = TestAgent::start();
    let data = vec![b'x'; 1_000_000];
    let request = exec(["wc", "-c"]);
    let (stdout, ..) = run(&mut connect(&agent), request, Stdin::Bytes(&data)).unwrap();
    assert_eq!(stdout, "1000000\n");
    let (stdout, ..) = run(&mut connect(&agent), exec(["wc", "-c"]), Stdin::Bytes(b"")).unwrap();
    assert_eq!(stdout, "0\n");
}

#[test]
fn input_from_a_descriptor_arrives_while_output_comes_back() {
    let agent = TestAgent::start();
    let (reader, mut writer) = UnixStream::pair().unwrap();
    let feeder = std::thread::spawn(move || {
        for _ in 0..200 {
            writer.write_all(&[b'y'; 10_000]).unwrap();
        }
    });
    let mut client = connect(&agent);
    let (stdout, _, status) = run(&mut client, exec(["cat"]), Stdin::Fd(reader.as_fd())).unwrap();
    feeder.join().unwrap();
    assert_eq!(stdout.len(), 2_000_000);
    assert_eq!(status, ExitStatus::Code(0));
}

#[test]
fn an_open_input_does_not_outlast_the_program() {
    let agent = TestAgent::start();
    let (reader, _writer) = UnixStream::pair().unwrap();
    let input = Stdin::Fd(reader.as_fd());
    let (stdout, ..) = run(&mut connect(&agent), exec(["echo", "hi"]), input).unwrap();
    assert_eq!(stdout, "hi\n");
}

#[test]
fn code_runs() {
    let agent = TestAgent::start();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let request = RunCodeRequest {
        language: Language::Python.into(),
        source: b"import sys; print(sum(range(10)), sys.stdin.read()); sys.exit(7)".to_vec(),
        ..RunCodeRequest::default()
    };
    let stdio = Stdio {
        stdin: Stdin::Bytes(b"typed"),
        stdout: &mut stdout,
        stderr: &mut stderr,
    };
    let status = connect(&agent).run_code(request, stdio).unwrap();
    assert_eq!(String::from_utf8(stdout).unwrap(), "45 typed\n");
    assert_eq!(status, ExitStatus::Code(7));
}

#[test]
fn refusals_carry_the_shells_status() {
    let agent = TestAgent::start();
    let mut client = connect(&agent);
    for (program, status) in [("no-such-program", 127), ("/etc/passwd", 126)] {
        let error = run(&mut client, exec([program]), Stdin::Null).unwrap_err();
        assert_eq!(error.shell_status(), Some(status), "{error}");
        assert!(error.to_string().starts_with(program), "{error}");
    }
    let error = client
        .shutdown(ShutdownMode::PowerOff, Duration::ZERO)
        .unwrap_err();
    let unsupported = ErrorCode::Unsupported;
    assert!(matches!(error, AgentError::Refused { code, .. } if code == unsupported));
}

/// A sink that takes a few bytes and then none.
struct Closing(usize);

impl Write for Closing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0 = self
            .0
            .checked_sub(data.len())
            .ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_program_without_a_reader_is_killed() {
    let agent = TestAgent::start();
    let client = connect(&agent);
    let stdio = Stdio {
        stdin: Stdin::Null,
        stdout: &mut Closing(1_000_000),
        stderr: &mut io::sink(),
    };
    let error = client.exec(exec(["yes"]), stdio).unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::Output {
                stream: "standard output",
                ..
            }
        ),
        "{error}"
    );
    wait_for("the end of yes", || agent.children().is_empty());
    client.ping().expect("the connection lives on");
}

#[test]
fn a_deadline_is_kept() {
    let agent = TestAgent::start();
    let mut client = connect(&agent);
    client.set_deadline(Some(Instant::now() + Duration::from_millis(100)));
    let error = run(&mut client, exec(["sleep", "1000"]), Stdin::Null).unwrap_err();
    assert!(matches!(error, AgentError::TimedOut), "{error}");
}

#[test]
fn the_monitor_is_asked_for_the_port() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let agent = TestAgent::start();
    let target = agent.socket();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = [0; 13];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        stream.write_all(b"OK 1073741824\n").unwrap();
        let agent = UnixStream::connect(target).unwrap();
        let (mut from, mut to) = (agent.try_clone().unwrap(), stream.try_clone().unwrap());
        std::thread::spawn(move || io::copy(&mut from, &mut to));
        let (mut from, mut to) = (stream, agent);
        let _ = io::copy(&mut from, &mut to);
    });
    let client = Agent::connect(&path, vmm::agent::AGENT_PORT, soon()).unwrap();
    client.ping().unwrap();
}

#[test]
fn a_port_that_nobody_listens_on_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let missing = Agent::connect(&path, 1024, soon()).err().unwrap();
    assert!(matches!(missing, AgentError::Connect { .. }), "{missing}");
    for answer in [&b""[..], b"no\n", b"a line that does not come to its end"] {
        let listener = UnixListener::bind(&path).unwrap();
        let monitor = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).unwrap();
            stream.write_all(answer).unwrap();
        });
        let error = Agent::connect(&path, 1024, soon()).err().unwrap();
        assert!(matches!(error, AgentError::NotAccepted { .. }), "{error}");
        monitor.join().unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}

fn hello(min_version: u32, max_version: u32) -> FromAgent {
    FromAgent {
        request_id: 0,
        kind: Some(Kind::Hello(Hello {
            min_version,
            max_version,
            software: "liar \x1b[31m".into(),
            stdin_window: u32::MAX,
            ..Hello::default()
        })),
    }
}

fn frames(messages: &[FromAgent]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        frame::encode(message, &mut bytes).unwrap();
    }
    bytes
}

/// What the client makes of an agent that says `bytes`, whatever it is told, and hangs up.
fn against(bytes: Vec<u8>) -> Result<ExitStatus, AgentError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&bytes).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let mut client = Agent::from_stream(ours, soon())?;
    run(&mut client, exec(["true"]), Stdin::Null).map(|(_, _, status)| status)
}

/// What the client makes of an agent whose only answer to its request is `message`.
fn answered(message: FromAgent) -> Result<ExitStatus, AgentError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let agent = std::thread::spawn(move || {
        theirs.write_all(&frames(&[hello(1, 1)])).unwrap();
        // The client's Hello and its request: what came before that would be about nothing.
        let mut asked = FrameBuffer::default();
        let mut messages = 0;
        while messages < 2 {
            let mut bytes = [0; 4096];
            let count = theirs.read(&mut bytes).unwrap();
            asked.input().extend_from_slice(&bytes[..count]);
            while let Some(ToAgent { .. }) = asked.next_message().unwrap() {
                messages += 1;
            }
        }
        theirs.write_all(&frames(&[message])).unwrap();
    });
    let mut client = Agent::from_stream(ours, soon())?;
    let result = run(&mut client, exec(["true"]), Stdin::Null).map(|(_, _, status)| status);
    agent.join().unwrap();
    result
}

#[test]
fn agents_that_lie_are_found_out() {
    let error = against(frames(&[hello(2, 3)])).unwrap_err();
    assert!(matches!(error, AgentError::Version { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("2 to 3") && text.contains("monitor 1;"),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "{text:?}");

    let message = |kind| FromAgent {
        request_id: 1,
        kind: Some(kind),
    };
    let stdout = message(Kind::Stdout(Stdout {
        data: b"early".to_vec(),
    }));
    let error = against(frames(&[stdout])).unwrap_err();
    assert!(matches!(error, AgentError::Protocol { .. }), "{error}");
    for status in [
        None,
        Some(Status::Code(256)),
        Some(Status::Signal(u32::MAX)),
    ] {
        let exited = message(Kind::Exited(Exited {
            status,
            ..Exited::default()
        }));
        let error = answered(exited).unwrap_err();
        assert!(matches!(error, AgentError::Protocol { .. }), "{error}");
    }
    for garbage in [&[0xff; 4][..], &[3, 0, 0, 0, 0xff, 0xff, 0xff]] {
        let error = against(garbage.to_vec()).unwrap_err();
        assert!(matches!(error, AgentError::Frame(_)), "{error}");
    }
    for early in [vec![], vec![9], frames(&[hello(1, 1)])] {
        let error = against(early).unwrap_err();
        assert!(matches!(error, AgentError::Disconnected), "{error}");
    }
}
