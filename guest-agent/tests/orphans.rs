//! Programs whose connection was lost run on, without anybody who hears of them.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Client, TestAgent, exec, shell, wait_for};
use guest_agent::proto::{
    Exec, Language, Pty, RunCode, StdinClose, StdinData, Warm, Watch, WriteFile, from_agent::Kind,
    to_agent::Kind as Ask,
};

/// The number that a program counts in a file.
fn count(file: &Path) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Waits until the number in a file has grown by `more`.
fn wait_for_growth(file: &Path, more: u64) {
    let before = count(file);
    wait_for("the program to go on", || count(file) >= before + more);
}

/// The process id of a program that was asked for.
fn started(client: &mut Client) -> u32 {
    let Some(Kind::Started(started)) = client.receive().unwrap().kind else {
        panic!("not started");
    };
    started.pid
}

/// Every stream has more to say than its credit and its pipe hold.
const ENDLESS: &str = "while head -c 100000 /dev/zero && head -c 100000 /dev/zero >&2; do
    n=$((n + 1)); echo $n >count; [ -e stop ] && exit; done";

#[test]
fn output_that_nobody_hears_never_blocks() {
    let agent = TestAgent::start();
    let files = agent.open_files();
    let (count, stop) = (agent.path().join("count"), agent.path().join("stop"));
    for exec in [
        shell(ENDLESS),
        Exec {
            pty: Some(Pty::default()),
            ..shell(&format!("trap \"echo 0 >count; exit\" HUP; {ENDLESS}"))
        },
    ] {
        let mut client = agent.connect();
        client.send(1, Ask::Exec(exec));
        started(&mut client);
        // Nobody reads, so it stands still once everything is full.
        wait_for("the program", || count.exists());
        client.lose();
        wait_for_growth(&count, 20);
        // The agent has time for others meanwhile.
        assert_eq!(agent.connect().run(shell("echo on")).stdout(), "on\n");
        std::fs::write(&stop, "").unwrap();
        wait_for("its end", || agent.children().is_empty());
        wait_for("its files to be closed", || agent.open_files() <= files);
        std::fs::remove_file(&stop).unwrap();
        std::fs::remove_file(&count).unwrap();
    }
}

#[test]
fn input_stays_open_and_silent() {
    let agent = TestAgent::start();
    let (first, second) = (agent.path().join("first"), agent.path().join("second"));
    let line = "read line; echo $line >first; read line; echo over >second";
    for pty in [None, Some(Pty::default())] {
        let mut client = agent.connect();
        let stdin = pty.is_none();
        client.send(
            1,
            Ask::Exec(Exec {
                stdin,
                pty,
                ..shell(line)
            }),
        );
        let data = b"word\n".to_vec();
        client.send(1, Ask::StdinData(StdinData { data }));
        let pid = started(&mut client);
        client.lose();
        wait_for("what was sent before", || {
            std::fs::read(&first).is_ok_and(|text| text == b"word\n")
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!second.exists(), "its input has ended");
        assert_eq!(agent.children().len(), 1);
        std::fs::remove_file(&first).unwrap();
        // It ends as any program does.
        let kill = shell(&format!("kill -KILL {pid}"));
        assert_eq!(agent.connect().run(kill).stderr(), "");
        wait_for("its end", || agent.children().is_empty());
    }

    // An end that was told is told.
    let mut client = agent.connect();
    let stdin = Exec {
        stdin: true,
        ..shell("sleep 0.3; cat; echo over >second")
    };
    client.send(1, Ask::Exec(stdin));
    let data = vec![0; 65536];
    client.send(1, Ask::StdinData(StdinData { data }));
    client.send(1, Ask::StdinClose(StdinClose {}));
    started(&mut client);
    client.lose();
    wait_for("the end of its input", || second.exists());
}

#[test]
fn its_time_still_ends_it() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let exec = Exec {
        timeout_ms: 1000,
        ..shell("sleep 1000 & sleep 1000")
    };
    let start = Instant::now();
    client.send(1, Ask::Exec(exec));
    started(&mut client);
    client.lose();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!agent.children().is_empty(), "it was killed at once");
    wait_for("the end of its time", || agent.children().is_empty());
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn code_goes_on_in_a_copy_of_an_interpreter_and_in_a_fresh_one() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let language = Language::Python.into();
    client.send(
        9,
        Ask::Warm(Warm {
            language,
            ..Warm::default()
        }),
    );
    assert!(matches!(
        client.receive().unwrap().kind,
        Some(Kind::Done(_))
    ));
    let code = |name: &str, cold| {
        let source = format!(
            "import os, time\nopen('{name}.file', 'w').write(__file__)\nn = 0\n\
             while not os.path.exists('stop'):\n    n += 1\n    print('x' * 100_000, flush=True)\n    \
             open('{name}.new', 'w').write(str(n))\n    os.rename('{name}.new', '{name}')\n    time.sleep(.01)\n"
        );
        Ask::RunCode(RunCode {
            language,
            source: source.into(),
            cold,
            ..RunCode::default()
        })
    };
    client.send(1, code("warm", false));
    client.send(2, code("cold", true));
    let counts = ["warm", "cold"].map(|name| agent.path().join(name));
    wait_for("both", || counts.iter().all(|count| count.exists()));
    client.lose();
    for count in &counts {
        wait_for_growth(count, 10);
    }
    // Others still have a copy, and the next after it.
    let mut client = agent.connect();
    for _ in 0..2 {
        let source = b"print(1)".to_vec();
        client.send(
            1,
            Ask::RunCode(RunCode {
                language,
                source,
                ..RunCode::default()
            }),
        );
        let outcome = client.follow(1);
        assert_eq!((outcome.stdout(), outcome.warm), ("1\n", true));
    }
    std::fs::write(agent.path().join("stop"), "").unwrap();
    for count in &counts {
        let file = std::fs::read_to_string(count.with_extension("file")).unwrap();
        wait_for("its source to go", || !Path::new(&file).exists());
    }
}

#[test]
fn work_on_files_is_given_up() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let path = |name: &str| {
        agent
            .path()
            .join(name)
            .into_os_string()
            .into_encoded_bytes()
    };
    let write = WriteFile {
        path: path("written"),
        ..WriteFile::default()
    };
    client.send(1, Ask::WriteFile(write));
    let data = vec![0; 60_000];
    client.send(1, Ask::StdinData(StdinData { data }));
    let watch = Watch {
        path: path("."),
        ..Watch::default()
    };
    client.send(2, Ask::Watch(watch));
    client.send(3, Ask::Exec(exec(["sleep", "1000"])));
    wait_for("all three", || agent.children().len() == 3);
    client.lose();
    wait_for("the program alone", || agent.children().len() == 1);
    let names: Vec<_> = std::fs::read_dir(agent.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "only the agent's socket: {names:?}");
}
