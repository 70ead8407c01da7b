//! What goes wrong only with time, load and loss: slow readers, clients that vanish,
//! orphans, leaks.

mod common;

use std::time::{Duration, Instant};

use common::{TestAgent, exec, shell, wait_for};
use guest_agent::proto::{
    Exec, Hello, Ping, StdinData, Stream, exited::Status, from_agent::Kind, to_agent::Kind as Ask,
};

#[test]
fn a_slow_reader_makes_the_program_wait() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.run(exec(["true"]));
    let before = agent.resident();
    client.send(1, Ask::Exec(exec(["head", "-c", "200000000", "/dev/zero"])));
    // Without a credit, no more than the window comes, and the agent holds no more either.
    let mut came = 0;
    while came < 256 * 1024 {
        if let Some(Kind::Stdout(out)) = client.receive().unwrap().kind {
            came += out.data.len();
        }
    }
    assert_eq!(came, 256 * 1024);
    std::thread::sleep(Duration::from_millis(200));
    client.send(2, Ask::Ping(Ping {}));
    let next = client.receive().unwrap();
    assert!(
        matches!(next.kind, Some(Kind::Pong(_))),
        "more than the credit: {next:?}"
    );
    let grown = agent.resident().saturating_sub(before);
    assert!(grown < 2 << 20, "the agent grew by {grown} bytes");

    client.give_credit(1, Stream::Stdout, came);
    let outcome = client.follow(1);
    assert_eq!(came + outcome.stdout.len(), 200_000_000);
    assert_eq!(outcome.status, Some(Status::Code(0)));
}

#[test]
fn a_stalled_stream_stalls_no_other() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.send(1, Ask::Exec(exec(["yes"])));
    let line = "head -c 1000000 /dev/zero >&2";
    client.send(2, Ask::Exec(shell(line)));
    let mut errors = 0;
    while errors < 1_000_000 {
        let message = client.receive().unwrap();
        if let (2, Some(Kind::Stderr(out))) = (message.request_id, message.kind) {
            errors += out.data.len();
            client.give_credit(2, Stream::Stderr, out.data.len());
        }
    }
    assert_eq!(errors, 1_000_000);
}

#[test]
fn a_client_that_reads_nothing_costs_bounded_memory() {
    let agent = TestAgent::start();
    let mut idle = agent.connect();
    let before = agent.resident();
    for id in 1..=40 {
        idle.send(id, Ask::Exec(exec(["yes"])));
    }
    // All of them have filled what they can.
    std::thread::sleep(Duration::from_millis(500));
    let grown = agent.resident().saturating_sub(before);
    assert!(grown < 8 << 20, "the agent grew by {grown} bytes");
    assert_eq!(agent.connect().run(shell("echo on")).stdout(), "on\n");
}

#[test]
fn a_full_pipe_of_input_stalls_no_other() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let stdin = Exec {
        stdin: true,
        ..exec(["sleep", "1000"])
    };
    client.send(1, Ask::Exec(stdin));
    client.send(
        1,
        Ask::StdinData(StdinData {
            data: vec![0; 65536],
        }),
    );
    client.send(
        1,
        Ask::StdinData(StdinData {
            data: vec![0; 65536],
        }),
    );
    client.send(2, Ask::Ping(Ping {}));
    while !matches!(client.receive().unwrap().kind, Some(Kind::Pong(_))) {}
}

#[test]
fn a_client_that_vanishes_takes_its_programs_along() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.send(1, Ask::Exec(shell("sleep 1000 & sleep 1000 | sleep 1000")));
    assert!(matches!(
        client.receive().unwrap().kind,
        Some(Kind::Started(_))
    ));
    wait_for("the shell", || !agent.children().is_empty());
    std::thread::sleep(Duration::from_millis(100));
    drop(client);
    let start = Instant::now();
    wait_for("the end of all", || agent.children().is_empty());
    assert!(start.elapsed() < Duration::from_secs(1));
    let left = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x001000\x00")
            && parent(&entry.path()) == agent.pid().to_string()
    });
    assert!(!left, "a sleep is left");
}

fn parent(process: &std::path::Path) -> String {
    let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
    let rest = stat.rsplit_once(") ").unwrap_or_default().1;
    rest.split(' ').nth(1).unwrap_or_default().to_owned()
}

#[test]
fn orphans_are_reaped() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.run(shell("for i in 1 2 3 4 5; do (sleep 0.3 &) ; done"));
    assert_eq!(agent.children().len(), 5, "the orphans are the agent's");
    wait_for("the orphans to be reaped", || agent.children().is_empty());
}

#[test]
fn what_a_program_leaves_behind_does_not_hold_it_up() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let start = Instant::now();
    let outcome = client.run(shell("sleep 3 & echo done"));
    assert_eq!(outcome.stdout(), "done\n");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "waited for the background"
    );
}

#[test]
fn a_leftover_that_never_stops_writing_does_not_hold_it_up() {
    let agent = TestAgent::start();
    let outcome = agent.connect().run(shell("yes & echo done; sleep 0.1"));
    assert_eq!(outcome.status, Some(Status::Code(0)));
}

#[test]
fn output_at_the_very_end_is_not_lost() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    for _ in 0..100 {
        let outcome = client.run(shell("printf 0123456789; printf err >&2"));
        assert_eq!((outcome.stdout(), outcome.stderr()), ("0123456789", "err"));
    }
}

#[test]
fn a_thousand_clients_that_come_and_go_leave_nothing() {
    let agent = TestAgent::start();
    agent.connect().run(exec(["true"]));
    let files = agent.open_files();
    let memory = agent.resident();
    for turn in 0..1000 {
        let mut client = agent.dial();
        match turn % 4 {
            0 => {}
            1 => client.send_raw(&[9, 0]),
            2 => client.send_raw(&[0xff; 4]),
            _ => {
                client.shake_hands(Hello {
                    min_version: 1,
                    max_version: 1,
                    ..Hello::default()
                });
                client.send(1, Ask::Exec(exec(["sleep", "1000"])));
                // Something unread would make it a connection that was lost.
                let started = client.receive().unwrap().kind;
                assert!(matches!(started, Some(Kind::Started(_))));
            }
        }
    }
    wait_for("all to be gone", || {
        agent.children().is_empty() && agent.open_files() <= files
    });
    let grown = agent.resident().saturating_sub(memory);
    assert!(grown < 1 << 20, "the agent grew by {grown} bytes");
}

#[test]
fn requests_cut_into_single_bytes_are_understood() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let message = guest_agent::proto::ToAgent {
        request_id: 4,
        kind: Some(Ask::Exec(exec(["echo", "slowly"]))),
    };
    let mut bytes = Vec::new();
    guest_agent::frame::encode(&message, &mut bytes).unwrap();
    for byte in bytes {
        client.send_raw(&[byte]);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(client.follow(4).stdout(), "slowly\n");
}
