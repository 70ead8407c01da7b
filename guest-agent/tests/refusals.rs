//! What must not work does not, and says why: requests that cannot be served, and
//! clients that break the protocol. The agent serves others all the same.

mod common;

use common::{TestAgent, exec, shell, variable};
use guest_agent::frame::MAX_MESSAGE;
use guest_agent::proto::{
    ErrorCode, Exec, Hello, Ping, Restored, RunCode, Shutdown, StdinData, from_agent::Kind,
    to_agent::Kind as Ask,
};

fn refused(exec: Exec) -> (ErrorCode, String) {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let error = client.run(exec).error.expect("a refusal");
    // The connection is none the worse for it.
    assert_eq!(client.run(shell("echo on")).stdout(), "on\n");
    (error.code(), error.message)
}

#[test]
fn a_missing_program_is_not_found() {
    let (code, message) = refused(exec(["no-such-program"]));
    assert_eq!(code, ErrorCode::NotFound);
    assert_eq!(message, "no-such-program: No such file or directory");
    assert_eq!(refused(exec(["/no/such/program"])).0, ErrorCode::NotFound);
}

#[test]
fn a_file_that_may_not_be_executed_is_denied() {
    assert_eq!(
        refused(exec(["/etc/passwd"])).0,
        ErrorCode::PermissionDenied
    );
    assert_eq!(refused(exec(["/usr"])).0, ErrorCode::PermissionDenied);
}

#[test]
fn a_file_of_no_format_is_not_executable() {
    use std::os::unix::fs::OpenOptionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nonsense");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .create(true)
        .write(true)
        .mode(0o755)
        .open(&path)
        .unwrap();
    std::io::Write::write_all(&mut file, b"\0\x01\x02").unwrap();
    drop(file);
    let (code, _) = refused(exec([path.to_str().unwrap()]));
    assert_eq!(code, ErrorCode::NotExecutable);
}

#[test]
fn a_missing_directory_is_named() {
    let (code, message) = refused(Exec {
        cwd: b"/no/such/place".to_vec(),
        ..exec(["true"])
    });
    assert_eq!(code, ErrorCode::BadWorkingDirectory);
    assert!(message.contains("/no/such/place"), "{message}");
}

#[test]
fn arguments_that_cannot_be_are_refused() {
    let bad = [
        Exec::default(),
        exec([""]),
        exec(["echo", "a\0b"]),
        Exec {
            cwd: b"/\0".to_vec(),
            ..exec(["true"])
        },
        Exec {
            env: vec![variable("", "x")],
            ..exec(["true"])
        },
        Exec {
            env: vec![variable("A=B", "x")],
            ..exec(["true"])
        },
        Exec {
            env: vec![variable("A", "x\0")],
            ..exec(["true"])
        },
        exec(["true", &"x".repeat(200_000)]),
    ];
    for exec in bad {
        let (code, message) = refused(exec);
        assert_eq!(code, ErrorCode::InvalidArgument, "{message}");
    }
}

#[test]
fn unknown_languages_and_names_with_paths_are_refused() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    for (language, filename) in [(0, ""), (77, ""), (1, "../x.py"), (1, ".."), (1, "a/b")] {
        let code = RunCode {
            language,
            filename: filename.into(),
            ..RunCode::default()
        };
        client.send(1, Ask::RunCode(code));
        let error = client.follow(1).error.expect("a refusal");
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error:?}");
    }
}

#[test]
fn an_ordinary_process_does_not_end_or_change_the_machine() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let restored = Restored {
        entropy: vec![1; 32],
        realtime_ns: 1,
        ..Restored::default()
    };
    let asked = [Ask::Shutdown(Shutdown::default()), Ask::Restored(restored)];
    for (id, ask) in (1..).zip(asked) {
        client.send(id, ask);
        assert_eq!(
            client.follow(id).error.unwrap().code(),
            ErrorCode::Unsupported
        );
    }
}

#[test]
fn an_unknown_request_is_answered() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    // Request id 5, and a kind with the number 400.
    client.send_raw(&[5, 0, 0, 0, 0x08, 5, 0x82, 0x19, 0]);
    let answer = client.receive().unwrap();
    assert_eq!(answer.request_id, 5);
    let Some(Kind::Error(error)) = answer.kind else {
        panic!("not an error: {answer:?}");
    };
    assert_eq!(error.code(), ErrorCode::Unsupported);
    client.send(6, Ask::Ping(Ping {}));
    assert!(matches!(
        client.receive().unwrap().kind,
        Some(Kind::Pong(_))
    ));
}

#[test]
fn versions_without_overlap_are_named() {
    let agent = TestAgent::start();
    let mut client = agent.dial();
    client.shake_hands(Hello {
        min_version: 2,
        max_version: 9,
        ..Hello::default()
    });
    let error = client.receive_last_error();
    assert_eq!(error.code(), ErrorCode::VersionMismatch);
    assert_eq!(
        error.message,
        "the agent speaks protocol version 1, the client 2 to 9"
    );
}

/// What the agent says to a client that does `wrong` after the handshake.
fn last_words(wrong: impl FnOnce(&mut common::Client)) -> ErrorCode {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    wrong(&mut client);
    let code = client.receive_last_error().code();
    // Another client notices nothing.
    assert_eq!(agent.connect().run(shell("echo on")).stdout(), "on\n");
    code
}

#[test]
fn a_request_before_hello_is_refused() {
    let agent = TestAgent::start();
    let mut client = agent.dial();
    client.send(1, Ask::Ping(Ping {}));
    assert!(matches!(
        client.receive().unwrap().kind,
        Some(Kind::Hello(_))
    ));
    assert_eq!(client.receive_last_error().code(), ErrorCode::HelloExpected);
    let second = last_words(|client| client.send(0, Ask::Hello(Hello::default())));
    assert_eq!(second, ErrorCode::HelloExpected);
}

#[test]
fn an_oversized_frame_is_refused_by_its_length() {
    for length in [u32::MAX, u32::try_from(MAX_MESSAGE).unwrap() + 1] {
        let code = last_words(|client| client.send_raw(&length.to_le_bytes()));
        assert_eq!(code, ErrorCode::FrameTooLarge);
    }
}

#[test]
fn garbage_is_refused() {
    let code = last_words(|client| client.send_raw(&[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]));
    assert_eq!(code, ErrorCode::Malformed);
    // A field that says it is longer than the message.
    let code = last_words(|client| client.send_raw(&[4, 0, 0, 0, 0x22, 0xff, 0xff, 0x03]));
    assert_eq!(code, ErrorCode::Malformed);
}

#[test]
fn a_request_needs_an_id_of_its_own() {
    let zero = last_words(|client| client.send(0, Ask::Ping(Ping {})));
    assert_eq!(zero, ErrorCode::BadRequestId);
    let empty = last_words(|client| client.send_raw(&[0; 4]));
    assert_eq!(empty, ErrorCode::BadRequestId);
    let taken = last_words(|client| {
        client.send(7, Ask::Exec(exec(["sleep", "1000"])));
        assert!(matches!(
            client.receive().unwrap().kind,
            Some(Kind::Started(_))
        ));
        client.send(7, Ask::Ping(Ping {}));
    });
    assert_eq!(taken, ErrorCode::BadRequestId);
}

#[test]
fn input_beyond_the_credit_is_refused() {
    let code = last_words(|client| {
        let exec = Exec {
            stdin: true,
            ..exec(["sleep", "1000"])
        };
        client.send(1, Ask::Exec(exec));
        assert!(matches!(
            client.receive().unwrap().kind,
            Some(Kind::Started(_))
        ));
        // Two of these fit into the pipe and the window, and one that fits into neither is too many.
        for _ in 0..3 {
            let data = vec![0; 60_000];
            client.send(1, Ask::StdinData(StdinData { data }));
        }
        for _ in 0..2 {
            assert!(matches!(
                client.receive().unwrap().kind,
                Some(Kind::Credit(_))
            ));
        }
    });
    assert_eq!(code, ErrorCode::CreditExceeded);
}

#[test]
fn messages_about_requests_that_are_over_are_ignored() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.run(exec(["true"]));
    for kind in [
        Ask::StdinData(StdinData { data: vec![0; 99] }),
        Ask::StdinClose(guest_agent::proto::StdinClose {}),
        Ask::Signal(guest_agent::proto::Signal { signo: 9 }),
        Ask::Cancel(guest_agent::proto::Cancel {}),
        Ask::Credit(guest_agent::proto::Credit {
            stream: 2,
            bytes: u32::MAX,
        }),
    ] {
        client.send(1, kind);
    }
    client.send(2, Ask::Ping(Ping {}));
    let answer = client.receive().unwrap();
    assert!(matches!(answer.kind, Some(Kind::Pong(_))), "{answer:?}");
}

#[test]
fn the_agent_needs_something_to_serve() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_guest-agent"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("usage:"));
}
