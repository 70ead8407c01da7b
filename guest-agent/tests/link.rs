//! The connection that the agent makes to the host itself.

mod common;

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Client, shell, wait_for};
use guest_agent::proto::{Hello, from_agent::Kind, to_agent::Kind as Ask};
use tempfile::TempDir;

/// A host, and an agent that calls it.
struct Host {
    listener: UnixListener,
    agent: Child,
    directory: TempDir,
}

impl Host {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("host");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let agent = Command::new(env!("CARGO_BIN_EXE_guest-agent"))
            .arg("--dial-unix")
            .arg(&path)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            listener,
            agent,
            directory,
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn accept(&self) -> Client {
        let mut stream = None;
        wait_for("the agent's call", || {
            stream = self.try_accept();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_nonblocking(false).unwrap();
        Client::new(stream)
    }

    fn try_accept(&self) -> Option<UnixStream> {
        match self.listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Whether the agent does not call for a while.
    fn is_left_alone(&self) -> bool {
        let end = Instant::now() + Duration::from_millis(200);
        while Instant::now() < end {
            if self.try_accept().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn greet(client: &mut Client) {
    client.shake_hands(Hello {
        min_version: 1,
        max_version: 1,
        ..Hello::default()
    });
}

#[test]
fn a_lost_connection_is_made_anew_and_its_programs_are_killed() {
    let host = Host::new();
    let mut client = host.accept();
    for _ in 0..3 {
        greet(&mut client);
        client.send(1, Ask::Exec(shell("echo $$ >pid; exec sleep 1000")));
        let mut started = None;
        wait_for("the program", || {
            if let Some(Kind::Started(program)) = client.receive().and_then(|m| m.kind) {
                started = Some(program.pid);
            }
            started.is_some()
        });
        wait_for("its first line", || {
            std::fs::read_to_string(host.path().join("pid")).is_ok_and(|pid| !pid.is_empty())
        });
        drop(client);
        client = host.accept();
        let pid = started.unwrap();
        wait_for("the program's end", || {
            !Path::new(&format!("/proc/{pid}")).exists()
        });
    }
    greet(&mut client);
    assert_eq!(client.run(shell("echo on")).stdout(), "on\n");
}

#[test]
fn a_connection_lost_by_a_reset_is_made_anew_and_its_programs_run_on() {
    let host = Host::new();
    let count = || std::fs::read_to_string(host.path().join("count")).unwrap_or_default();
    let mut client = host.accept();
    greet(&mut client);
    let line = "while sleep 0.02; do n=$((n + 1)); echo $n >count; done";
    client.send(1, Ask::Exec(shell(line)));
    wait_for("the program", || !count().is_empty());
    client.lose();
    let mut client = host.accept();
    greet(&mut client);
    let before = count();
    wait_for("the program to go on", || count() != before);
    assert!(host.is_left_alone(), "the agent calls again and again");
    assert_eq!(client.run(shell("echo on")).stdout(), "on\n");
}

#[test]
fn a_host_that_hangs_up_at_once_is_not_called_again() {
    let host = Host::new();
    drop(host.accept());
    assert!(host.is_left_alone());
}
