//! Programs run as they should: input, output, environment, signals, many at once.

mod common;

use std::process::Command;

use common::{Client, TestAgent, exec, shell, variable, wait_for};
use guest_agent::proto::{
    Cancel, Exec, Feature, Hello, Language, Ping, RunCode, Signal, StdinClose, StdinData, Stream,
    exited::Status, from_agent::Kind, to_agent::Kind as Ask,
};

#[test]
fn the_agent_says_who_it_is() {
    let agent = TestAgent::start();
    let hello = agent.dial().shake_hands(Hello {
        min_version: 1,
        max_version: 7,
        ..Hello::default()
    });
    assert_eq!((hello.min_version, hello.max_version), (1, 1));
    assert!(hello.software.starts_with("bough-agent "));
    assert_eq!(hello.boot_id.len(), 16);
    assert!(hello.stdin_window > 0);
    assert!(hello.features.contains(&Feature::Exec.into()));
    assert!(!hello.features.contains(&Feature::Shutdown.into()));
}

#[test]
fn a_ping_is_answered() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.send(9, Ask::Ping(Ping {}));
    let answer = client.receive().unwrap();
    assert_eq!(answer.request_id, 9);
    assert!(matches!(answer.kind, Some(Kind::Pong(_))));
}

#[test]
fn standard_output_and_error_stay_apart() {
    let agent = TestAgent::start();
    let outcome = agent.connect().run(shell("echo out; echo err >&2; exit 7"));
    assert_eq!(outcome.stdout(), "out\n");
    assert_eq!(outcome.stderr(), "err\n");
    assert_eq!(outcome.status, Some(Status::Code(7)));
}

#[test]
fn a_program_is_started_as_process_group_leader() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.send(1, Ask::Exec(shell("echo $$; ps -o pgid= -p $$")));
    let Some(Kind::Started(started)) = client.receive().unwrap().kind else {
        panic!("not started");
    };
    let outcome = client.follow(1);
    let numbers: Vec<u32> = outcome
        .stdout()
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    assert_eq!(numbers, [started.pid, started.pid]);
}

#[test]
fn ten_thousand_lines_come_whole() {
    let agent = TestAgent::start();
    let outcome = agent.connect().run(exec(["seq", "10000"]));
    assert_eq!(outcome.stdout().lines().count(), 10_000);
    assert!(outcome.stdout().ends_with("\n10000\n"));
}

#[test]
fn binary_output_comes_intact() {
    const SIZE: usize = 20 << 20;
    let agent = TestAgent::start();
    let code = format!(
        "import sys\nblock = bytes(i * i % 251 for i in range(4099))\n\
         data = (block * ({SIZE} // len(block) + 1))[:{SIZE}]\nsys.stdout.buffer.write(data)"
    );
    let outcome = agent.connect().run(exec(["python3", "-c", &code]));
    assert_eq!(outcome.stderr(), "");
    assert_eq!(outcome.stdout.len(), SIZE);
    let block: Vec<u8> = (0..4099_u32)
        .map(|i| u8::try_from(i * i % 251).unwrap())
        .collect();
    assert!(outcome.stdout.iter().eq(block.iter().cycle().take(SIZE)));
}

/// Sends `data` within the credit that the agent gives, and reads what comes meanwhile.
fn pour(client: &mut Client, id: u32, data: &[u8]) -> Vec<u8> {
    let mut credit = 65536;
    let mut sent = 0;
    let mut echoed = Vec::new();
    while sent < data.len() {
        let count = credit.min(data.len() - sent);
        if count > 0 {
            let data = data[sent..sent + count].to_vec();
            client.send(id, Ask::StdinData(StdinData { data }));
            sent += count;
            credit -= count;
        }
        match client.receive().unwrap().kind {
            Some(Kind::Credit(more)) => credit += usize::try_from(more.bytes).unwrap(),
            Some(Kind::Stdout(out)) => {
                client.give_credit(id, Stream::Stdout, out.data.len());
                echoed.extend(out.data);
            }
            _ => {}
        }
    }
    client.send(id, Ask::StdinClose(StdinClose {}));
    echoed
}

#[test]
fn standard_input_arrives_and_ends() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let data: Vec<u8> = (0..3_000_000_u32)
        .map(|i| u8::try_from(i % 253).unwrap())
        .collect();
    client.send(
        5,
        Ask::Exec(Exec {
            stdin: true,
            ..exec(["cat"])
        }),
    );
    let mut echoed = pour(&mut client, 5, &data);
    let outcome = client.follow(5);
    echoed.extend(outcome.stdout);
    assert!(
        echoed == data,
        "{} bytes went, {} came back",
        data.len(),
        echoed.len()
    );
    assert_eq!(outcome.status, Some(Status::Code(0)));
}

#[test]
fn without_standard_input_it_is_empty() {
    let agent = TestAgent::start();
    let outcome = agent.connect().run(exec(["wc", "-c"]));
    assert_eq!(outcome.stdout(), "0\n");
}

#[test]
fn a_program_that_closes_its_input_loses_only_that() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let exec = Exec {
        stdin: true,
        ..shell("exec <&-; sleep 0.3; echo fine")
    };
    client.send(1, Ask::Exec(exec));
    assert!(matches!(
        client.receive().unwrap().kind,
        Some(Kind::Started(_))
    ));
    pour(&mut client, 1, &[b'x'; 300_000]);
    let outcome = client.follow(1);
    assert_eq!(outcome.stdout(), "fine\n");
}

#[test]
fn environment_and_directory_are_as_asked() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let outcome = client.run(Exec {
        env: vec![
            variable("GREETING", "hi there"),
            variable("HOME", "/nowhere"),
        ],
        cwd: b"/usr".to_vec(),
        ..shell("echo $GREETING $HOME $USER; pwd; echo $PATH")
    });
    let expected = "hi there /nowhere root\n/usr\n\
                    /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n";
    assert_eq!(outcome.stdout(), expected);

    let outcome = client.run(Exec {
        clear_env: true,
        env: vec![variable("ONLY", "this")],
        ..exec(["env"])
    });
    assert_eq!(outcome.stdout(), "ONLY=this\n");
}

#[test]
fn the_agent_itself_stays_where_it_was() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let home = client.run(shell("pwd")).stdout;
    client.run(Exec {
        cwd: b"/usr".to_vec(),
        ..shell("pwd")
    });
    assert_eq!(client.run(shell("pwd")).stdout, home);
}

#[test]
fn death_by_signal_is_told() {
    let agent = TestAgent::start();
    let outcome = agent.connect().run(shell("kill -SEGV $$"));
    assert_eq!(outcome.status, Some(Status::Signal(11)));
}

#[test]
fn a_signal_reaches_the_whole_group() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.send(1, Ask::Exec(shell("sleep 1000 & echo up; wait")));
    assert!(matches!(
        client.receive().unwrap().kind,
        Some(Kind::Started(_))
    ));
    assert!(matches!(
        client.receive().unwrap().kind,
        Some(Kind::Stdout(_))
    ));
    client.send(1, Ask::Signal(Signal { signo: 15 }));
    assert_eq!(client.follow(1).status, Some(Status::Signal(15)));
    wait_for("the end of the sleep", || agent.children().is_empty());
}

#[test]
fn a_cancelled_program_is_killed() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.send(3, Ask::Exec(shell("trap '' TERM; sleep 1000")));
    client.send(3, Ask::Cancel(Cancel {}));
    assert_eq!(client.follow(3).status, Some(Status::Signal(9)));
}

/// What a program prints when this test, and not the agent, starts it: the test's own caller may
/// have left it open files and ignored signals.
fn without_agent(program: &str, argument: &str) -> String {
    let mut command = Command::new(program);
    let output = command.arg(argument).arg("/proc/self/status").output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

#[test]
fn signals_are_not_blocked_in_programs() {
    let agent = TestAgent::start();
    let exec = exec(["grep", "^Sig[BI]", "/proc/self/status"]);
    let outcome = agent.connect().run(exec);
    let ignored = outcome
        .stdout()
        .strip_prefix("SigBlk:\t0000000000000000\n")
        .map(str::to_owned);
    // The signals that a shell's background ignores (SIGINT and SIGQUIT) are the program's, also where this test runs there.
    let without = without_agent("grep", "^SigIgn");
    let without = without.trim_end().trim_start_matches("SigIgn:\t");
    let without = u64::from_str_radix(without, 16).unwrap() & !0b110;
    assert_eq!(ignored, Some(format!("SigIgn:\t{without:016x}\n")));
}

#[test]
fn only_the_standard_streams_are_inherited() {
    let agent = TestAgent::start();
    let _other = agent.connect();
    let exec = exec(["ls", "/proc/self/fd", "/proc/self/status"]);
    let outcome = agent.connect().run(exec);
    assert_eq!(outcome.stdout(), without_agent("ls", "/proc/self/fd"));
}

#[test]
fn many_programs_run_at_once_on_one_connection() {
    const PROGRAMS: u32 = 20;
    let agent = TestAgent::start();
    let mut client = agent.connect();
    for id in 1..=PROGRAMS {
        let line = format!("for i in $(seq 200); do echo {id} $i; done; exit {id}");
        client.send(id, Ask::Exec(shell(&line)));
    }
    let mut outputs = vec![Vec::new(); 1 + PROGRAMS as usize];
    let mut running = PROGRAMS;
    while running > 0 {
        let message = client.receive().unwrap();
        let id = message.request_id;
        match message.kind.unwrap() {
            Kind::Stdout(out) => outputs[id as usize].extend(out.data),
            Kind::Exited(exited) => {
                assert_eq!(exited.status, Some(Status::Code(id)));
                running -= 1;
            }
            Kind::Started(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
    for id in 1..=PROGRAMS {
        let expected: String = (1..=200).map(|i| format!("{id} {i}\n")).collect();
        assert_eq!(String::from_utf8_lossy(&outputs[id as usize]), expected);
    }
}

fn code(language: Language, source: &str) -> RunCode {
    RunCode {
        language: language.into(),
        source: source.into(),
        ..RunCode::default()
    }
}

#[test]
fn python_runs_with_arguments_and_input() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let source = "import sys\nprint(__name__, sys.argv[1:], sys.stdin.read())\nsys.exit(7)";
    client.send(
        1,
        Ask::RunCode(RunCode {
            args: vec![b"a b".to_vec(), b"c".to_vec()],
            stdin: true,
            ..code(Language::Python, source)
        }),
    );
    let data = b"from stdin".to_vec();
    client.send(1, Ask::StdinData(StdinData { data }));
    client.send(1, Ask::StdinClose(StdinClose {}));
    let outcome = client.follow(1);
    assert_eq!(outcome.stdout(), "__main__ ['a b', 'c'] from stdin\n");
    assert_eq!(outcome.status, Some(Status::Code(7)));
}

#[test]
fn a_traceback_shows_file_and_line() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let code = RunCode {
        filename: "sums.py".into(),
        ..code(Language::Python, "def f():\n    return 1 / 0\nf()\n")
    };
    client.send(1, Ask::RunCode(code));
    let outcome = client.follow(1);
    assert!(
        outcome.stderr().contains("sums.py\", line 2, in f"),
        "{}",
        outcome.stderr()
    );
    assert!(
        outcome.stderr().contains("return 1 / 0"),
        "{}",
        outcome.stderr()
    );
    assert_eq!(outcome.status, Some(Status::Code(1)));
}

#[test]
fn python_imports_from_the_working_directory() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("neighbour.py"), "value = 42").unwrap();
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let code = RunCode {
        cwd: directory.path().as_os_str().as_encoded_bytes().to_vec(),
        ..code(Language::Python, "import neighbour; print(neighbour.value)")
    };
    client.send(1, Ask::RunCode(code));
    assert_eq!(client.follow(1).stdout(), "42\n");
}

#[test]
fn shell_code_runs_short_or_long() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let long = format!("echo $1 {{}}; cat\n{}", "# filler\n".repeat(20_000));
    for source in ["echo $1 {}; cat", &long] {
        client.send(
            1,
            Ask::RunCode(RunCode {
                args: vec![b"arg".to_vec()],
                stdin: true,
                ..code(Language::Shell, source)
            }),
        );
        let data = b"input".to_vec();
        client.send(1, Ask::StdinData(StdinData { data }));
        client.send(1, Ask::StdinClose(StdinClose {}));
        assert_eq!(client.follow(1).stdout(), "arg {}\ninput");
    }
}

#[test]
fn source_files_go_with_their_programs() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    client.send(1, Ask::RunCode(code(Language::Python, "print(__file__)")));
    let outcome = client.follow(1);
    let file = std::path::Path::new(outcome.stdout().trim());
    assert!(file.is_absolute());
    wait_for("the file to go", || !file.parent().unwrap().exists());
}
