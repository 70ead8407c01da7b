//! Programs: who runs them, on what, how much they may use, and how they end.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use vmm::agent::{Agent, AgentError, ExecRequest, ExitStatus, Limits, Pty, Stdin, Stdio};

use crate::guest::{ask, connect, expect, run, shell, wait_until};

pub fn users() -> Result<(), Failed> {
    let agent = connect()?;
    let line = "id -u; id -g; id -G; pwd; echo $HOME $USER; echo again >/dev/stdout";
    for (user, expected) in [
        ("", "1000\n1000\n1000\n/home/user\n/home/user user\nagain\n"),
        ("root", "0\n0\n0\n/root\n/root root\nagain\n"),
        ("1000:0", "1000\n0\n0\n/home/user\n/home/user user\nagain\n"),
        ("4711", "4711\n4711\n4711\n/\n/ 4711\nagain\n"),
    ] {
        let user = user.to_owned();
        let (output, _) = run(
            &agent,
            ExecRequest {
                user,
                ..shell(line)
            },
        )?;
        expect(output == expected, &output)?;
    }
    let user = "nobody-knows".to_owned();
    match run(
        &agent,
        ExecRequest {
            user,
            ..shell("true")
        },
    ) {
        Err(error) => expect(
            error.message().is_some_and(|m| m.contains("no user")),
            error,
        ),
        Ok(ended) => expect(false, ended),
    }?;
    // Without privileges in earnest.
    let (output, ended) = run(
        &agent,
        shell("grep Cap /proc/self/status; cat /etc/shadow; touch /x"),
    )?;
    expect(ended.status != ExitStatus::Code(0), &output)?;
    let none = |set| output.contains(&format!("{set}:\t0000000000000000"));
    expect(none("CapPrm") && none("CapEff") && none("CapInh"), &output)
}

/// A sink that tells whose bytes come when.
struct Tagged {
    tag: usize,
    /// Whose output came, and how many bytes.
    arrivals: Arc<Mutex<Vec<(usize, usize)>>>,
    bytes: Vec<u8>,
}

impl Write for Tagged {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if let Ok(mut arrivals) = self.arrivals.lock() {
            arrivals.push((self.tag, data.len()));
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub fn twenty() -> Result<(), Failed> {
    let agent = connect()?;
    let arrivals = Arc::new(Mutex::new(Vec::new()));
    let lines = |tag: usize| -> String { (1..=1_500).map(|n| format!("{tag} {n}\n")).collect() };
    // Their standard input ends when all the first halves have come: only then do the second begin.
    let (signal, gate) = UnixStream::pair()?;
    let gate = Arc::new(gate);
    let workers: Vec<_> = (0..20)
        .map(|tag| {
            let (agent, arrivals, gate) = (agent.clone(), arrivals.clone(), gate.clone());
            std::thread::spawn(move || -> Result<(usize, Vec<u8>), AgentError> {
                let mut sink = Tagged {
                    tag,
                    arrivals,
                    bytes: Vec::new(),
                };
                let seq = format!("seq -f '{tag} %.0f' 1500");
                let line = format!("{seq}; read line; exec {seq}");
                agent.exec(
                    shell(&line),
                    Stdio {
                        stdin: Stdin::Fd(gate.as_fd()),
                        stdout: &mut sink,
                        stderr: &mut io::sink(),
                    },
                )?;
                Ok((tag, sink.bytes))
            })
        })
        .collect();
    let first_halves: usize = (0..20).map(|tag| lines(tag).len()).sum();
    while !workers.iter().any(|worker| worker.is_finished()) {
        let arrived = arrivals.lock().map_err(|_| "poisoned")?;
        if arrived.iter().map(|(_, count)| count).sum::<usize>() >= first_halves {
            break;
        }
        drop(arrived);
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(signal);
    for worker in workers {
        let (tag, bytes) = worker.join().map_err(|_| "a worker panicked")??;
        let whole = lines(tag).repeat(2);
        expect(bytes == whole.as_bytes(), (tag, bytes.len()))?;
    }
    let arrivals = arrivals.lock().map_err(|_| "poisoned")?;
    let turns = arrivals
        .windows(2)
        .filter(|pair| pair[0].0 != pair[1].0)
        .count();
    expect(turns >= 38, format!("only {turns} turns"))
}

/// A sink that passes everything on.
struct Told(Sender<Vec<u8>>);

impl Write for Told {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let sent = self.0.send(data.to_vec());
        sent.map(|()| data.len())
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub fn terminal() -> Result<(), Failed> {
    let agent = connect()?;
    let pty = Pty {
        rows: 41,
        columns: 101,
        term: String::new(),
    };
    let request = ExecRequest {
        pty: Some(pty),
        stdin: true,
        ..shell(
            "trap 'stty size' WINCH; test -t 2 && stty size; echo $TERM; tty; \
                 while read line; do echo got $line; done; echo end",
        )
    };
    let running = agent.start(request)?;
    let controller = running.controller();
    let (mut keyboard, input) = UnixStream::pair()?;
    let (sender, receiver) = channel();
    let worker = std::thread::spawn(move || {
        running.communicate(Stdio {
            stdin: Stdin::Fd(input.as_fd()),
            stdout: &mut Told(sender),
            stderr: &mut io::sink(),
        })
    });
    let mut seen = String::new();
    let mut until = |wanted: &str| -> Result<(), Failed> {
        while !seen.contains(wanted) {
            let data = receiver.recv_timeout(Duration::from_secs(20));
            let data = data.map_err(|_| format!("no {wanted:?} in {seen:?}"))?;
            seen.push_str(&String::from_utf8_lossy(&data));
        }
        Ok(())
    };
    until("41 101\r\nxterm-256color\r\n/dev/pts/")?;
    controller.resize(50, 120)?;
    // The shell runs the trap once the read is over.
    keyboard.write_all(b"hello\n")?;
    until("50 120\r\n")?;
    until("got hello\r\n")?;
    // The end of the input ends the loop.
    drop(keyboard);
    until("end\r\n")?;
    let ended = worker.join().map_err(|_| "the worker panicked")??;
    expect(ended.status == ExitStatus::Code(0), ended)?;

    // What is written at the very end arrives; and Ctrl-C works.
    let request = || ExecRequest {
        pty: Some(Pty::default()),
        ..shell("seq 20000")
    };
    let (output, _) = run(&agent, request())?;
    expect(output.ends_with("\r\n20000\r\n"), output.len())?;
    let (mut keyboard, input) = UnixStream::pair()?;
    keyboard.write_all(b"\x03")?;
    let request = ExecRequest {
        stdin: true,
        ..ExecRequest {
            argv: shell("sleep 1000").argv,
            ..request()
        }
    };
    let ended = agent.start(request)?.communicate(Stdio {
        stdin: Stdin::Fd(input.as_fd()),
        stdout: &mut io::sink(),
        stderr: &mut io::sink(),
    })?;
    expect(ended.status == ExitStatus::Signal(2), ended)
}

pub fn memory_limit() -> Result<(), Failed> {
    let agent = connect()?;
    let limits = Limits {
        memory_bytes: 4 << 20,
        ..Limits::default()
    };
    let hungry = |mebibytes: u32| ExecRequest {
        limits: Some(limits),
        ..shell(&format!(
            "dd if=/dev/zero of=/dev/null count=1 status=none bs={mebibytes}M; echo $?"
        ))
    };
    let (output, ended) = run(&agent, hungry(1))?;
    expect(
        ended.status == ExitStatus::Code(0) && !ended.oom_killed,
        (output, ended),
    )?;
    expect(
        ended.peak_memory > 1 << 20 && ended.peak_memory <= 4 << 20,
        ended,
    )?;
    let (output, ended) = run(&agent, hungry(12))?;
    expect(
        ended.oom_killed && ended.status == ExitStatus::Signal(9),
        (output, ended),
    )?;
    // Without a limit nobody is killed.
    let (output, ended) = run(
        &agent,
        ExecRequest {
            limits: None,
            ..hungry(12)
        },
    )?;
    expect(!ended.oom_killed && output == "0\n", (output, ended))?;
    expect(ended.peak_memory > 12 << 20, ended)
}

pub fn other_limits() -> Result<(), Failed> {
    let agent = connect()?;
    let limits = |processes, cpu_millis| {
        Some(Limits {
            processes,
            cpu_millis,
            ..Limits::default()
        })
    };
    let many = "for i in 1 2 3 4 5 6 7 8; do sleep 0.3 & done; wait; echo all";
    let (output, ended) = run(
        &agent,
        ExecRequest {
            limits: limits(4, 0),
            ..shell(many)
        },
    )?;
    expect(
        output.to_lowercase().contains("fork") && ended.status != ExitStatus::Code(0),
        output,
    )?;
    let (output, _) = run(
        &agent,
        ExecRequest {
            limits: limits(20, 0),
            ..shell(many)
        },
    )?;
    expect(output == "all\n", output)?;

    let busy = "timeout 2 sh -c 'while :; do :; done'";
    let start = Instant::now();
    let (_, ended) = run(
        &agent,
        ExecRequest {
            limits: limits(0, 200),
            ..shell(busy)
        },
    )?;
    let share = (ended.user_time + ended.system_time).as_secs_f64() / start.elapsed().as_secs_f64();
    // A fifth is allowed; the guest's clock ticks are coarse.
    expect(share < 0.5, (share, ended))?;
    // Also what nobody waited for is counted.
    let (_, ended) = run(
        &agent,
        shell("timeout 1 sh -c 'while :; do :; done' & sleep 1.5"),
    )?;
    expect(
        ended.user_time + ended.system_time > Duration::from_millis(500),
        ended,
    )
}

/// How many processes of this command line there are.
fn count(agent: &Agent, command: &str) -> Result<usize, Failed> {
    let counted = ask(agent, &format!("pgrep -xfc '{command}' || true"))?;
    Ok(counted.trim().parse()?)
}

const TREE: &str = "setsid -f sleep 4242; (sleep 4242 &); setsid sh -c 'setsid -f sleep 4242; exec sleep 4242' & sleep 4242";

pub fn timeout() -> Result<(), Failed> {
    let agent = connect()?;
    let start = Instant::now();
    let (_, ended) = run(
        &agent,
        ExecRequest {
            timeout_ms: 1500,
            ..shell(TREE)
        },
    )?;
    expect(
        ended.timed_out && ended.status == ExitStatus::Signal(9),
        ended,
    )?;
    let took = start.elapsed();
    expect(
        took >= Duration::from_millis(1500) && took < Duration::from_secs(10),
        took,
    )?;
    expect(count(&agent, "sleep 4242")? == 0, "a sleep is left")?;
    let (_, ended) = run(
        &agent,
        ExecRequest {
            timeout_ms: 60_000,
            ..shell("true")
        },
    )?;
    expect(!ended.timed_out, ended)
}

pub fn cancel() -> Result<(), Failed> {
    let agent = connect()?;
    let mut running = agent.start(shell(TREE))?;
    running.pid()?;
    let controller = running.controller();
    wait_until(Instant::now(), || Ok(count(&agent, "sleep 4242")? == 5))?;
    controller.cancel()?;
    let ended = running.communicate(Stdio {
        stdin: Stdin::Null,
        stdout: &mut io::sink(),
        stderr: &mut io::sink(),
    })?;
    expect(
        ended.status == ExitStatus::Signal(9) && !ended.timed_out,
        ended,
    )?;
    expect(count(&agent, "sleep 4242")? == 0, "a sleep is left")
}

pub fn vanish() -> Result<(), Failed> {
    let watcher = connect()?;
    let client = connect()?;
    let mut running = client.start(shell(TREE))?;
    running.pid()?;
    wait_until(Instant::now(), || Ok(count(&watcher, "sleep 4242")? == 5))?;
    // The connection goes with its last handle, without a word.
    drop(client);
    let start = Instant::now();
    drop(running);
    std::thread::sleep(Duration::from_millis(900).saturating_sub(start.elapsed()));
    expect(count(&watcher, "sleep 4242")? == 0, "a sleep is left")?;
    // Nothing is left of their control groups either.
    let groups = ask(
        &watcher,
        "ls -d /sys/fs/cgroup/exec-* /sys/fs/cgroup/limited/exec-* 2>/dev/null | wc -l",
    )?;
    // That of the `sleep` that keeps the guest up, and that of the one who asks.
    expect(groups == "2\n", groups)
}

/// Open files and resident pages of the agent.
fn weight(agent: &Agent) -> Result<(u64, u64), Failed> {
    let text = ask(agent, "ls /proc/1/fd | wc -l; cut -d' ' -f2 /proc/1/statm")?;
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(files), Some(pages)) => Ok((files?, pages?)),
        _ => Err(text.into()),
    }
}

pub fn thousand() -> Result<(), Failed> {
    let watcher = connect()?;
    for _ in 0..20 {
        connect()?.ping()?;
    }
    let (files, pages) = weight(&watcher)?;
    for turn in 0..1000 {
        let client = connect()?;
        if turn % 100 == 0 {
            // Dropped with the connection, right after it was asked for.
            let _ = client.start(shell("sleep 4343"))?;
        }
    }
    wait_until(Instant::now(), || {
        // What a program has left, this one's way of asking too, goes when nobody has asked for anything for a second.
        std::thread::sleep(Duration::from_millis(2500));
        Ok(weight(&watcher)?.0 <= files)
    })?;
    expect(count(&watcher, "sleep 4343")? == 0, "a sleep is left")?;
    let (_, after) = weight(&watcher)?;
    expect(
        after < pages + 256,
        format!("{pages} pages before, {after} after"),
    )
}

/// A sink that takes its time.
struct Slow(u64);

impl Write for Slow {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.0 < 1 << 20 {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.0 += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn resident() -> Result<u64, Failed> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).unwrap_or_default().parse()?;
    Ok(pages * 4096)
}

pub fn slow_reader() -> Result<(), Failed> {
    let agent = connect()?;
    let ((_, pages), ours) = (weight(&agent)?, resident()?);
    let mut slow = Slow(0);
    let worker = {
        let agent = agent.clone();
        std::thread::spawn(move || -> Result<(u64, u64), Failed> {
            let (mut worst, mut theirs) = (0, 0);
            for _ in 0..4 {
                std::thread::sleep(Duration::from_millis(100));
                worst = worst.max(resident()?);
                theirs = theirs.max(weight(&agent)?.1);
            }
            Ok((worst, theirs))
        })
    };
    let status = agent.exec(
        shell("yes | head -c 2M"),
        Stdio {
            stdin: Stdin::Null,
            stdout: &mut slow,
            stderr: &mut io::sink(),
        },
    )?;
    let (worst, theirs) = worker.join().map_err(|_| "the worker panicked")??;
    expect(status == ExitStatus::Code(0) && slow.0 == 2 << 20, slow.0)?;
    expect(
        worst < ours + (8 << 20),
        format!("{ours} bytes before, {worst} meanwhile"),
    )?;
    expect(
        theirs < pages + 1024,
        format!("{pages} pages before, {theirs} meanwhile"),
    )
}
