//! Interpreters that stand ready, where users, limits and control groups are real. That programs come out as in a
//! fresh interpreter is shown for many more in the agent's own tests, which need no guest.

use std::time::Instant;

use libtest_mimic::Failed;
use vmm::agent::{
    Agent, Ended, ExitStatus, Language, Limits, RunCodeRequest, Stdin, Stdio, WarmRequest,
};

use crate::guest::{ask, connect, expect, is_slow, renew_patience, wait_until};

/// Output, errors, and how it ended.
type Outcome = (String, String, Ended);

fn code(source: &str) -> RunCodeRequest {
    RunCodeRequest {
        language: Language::Python.into(),
        source: source.as_bytes().to_vec(),
        ..RunCodeRequest::default()
    }
}

fn run(agent: &Agent, code: RunCodeRequest, stdin: &[u8]) -> Result<Outcome, Failed> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let stdin = match stdin {
        b"" => Stdin::Null,
        bytes => Stdin::Bytes(bytes),
    };
    let request = RunCodeRequest {
        stdin: !matches!(stdin, Stdin::Null),
        ..code
    };
    renew_patience(agent);
    let ended = agent.start_code(request)?.communicate(Stdio {
        stdin,
        stdout: &mut stdout,
        stderr: &mut stderr,
    })?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((text(stdout), text(stderr), ended))
}

/// An agent with an interpreter that stands ready for `user`.
fn warm(user: &str) -> Result<Agent, Failed> {
    let agent = connect()?;
    agent.warm(WarmRequest {
        language: Language::Python.into(),
        modules: vec!["json".into(), "random".into()],
        user: user.into(),
        ..WarmRequest::default()
    })?;
    Ok(agent)
}

/// Without the number of the source's directory.
fn plain(text: &str) -> String {
    let mut parts = text.split("/run/code/code-1-");
    let first = parts.next().unwrap_or_default().to_owned();
    let digits = |c: char| c.is_ascii_digit();
    parts.fold(first, |text, part| text + part.trim_start_matches(digits))
}

pub fn outcomes() -> Result<(), Failed> {
    let agent = warm("")?;
    for source in [
        "def f():\n    return {}['key']\n\nprint('before')\nf()",
        "import os, sys; print(sys.stdin.read(), sys.argv[1:], dict(os.environ), os.getcwd(), sys.path[1:], os.getresuid(), \
         os.getgroups(), os.getpgrp() == os.getpid(), os.getsid(0)); sys.exit('words')",
        "import threading, subprocess\nt = threading.Thread(target=print, args=['thread'])\nt.start(); t.join()\n\
         print(subprocess.run('echo $GIVEN; exit 4', shell=True).returncode)\nopen('/dev/stdout', 'w').write('again\\n')",
        "import os; os.kill(os.getpid(), 9)",
    ] {
        let warm = RunCodeRequest {
            args: vec![b"one".to_vec()],
            env: vec![vmm::agent::EnvVar {
                name: "GIVEN".into(),
                value: b"value".to_vec(),
            }],
            cwd: b"/tmp".to_vec(),
            ..code(source)
        };
        let cold = RunCodeRequest {
            cold: true,
            ..warm.clone()
        };
        let [cold, warm] = [cold, warm].map(|code| run(&agent, code, b"input"));
        let (cold, warm) = (cold?, warm?);
        expect(warm.2.warm && !cold.2.warm, (source, &warm, &cold))?;
        let seen = |(stdout, stderr, ended): &Outcome| (plain(stdout), plain(stderr), ended.status);
        expect(seen(&warm) == seen(&cold), (source, &warm, &cold))?;
    }
    Ok(())
}

pub fn apart() -> Result<(), Failed> {
    let agent = warm("")?;
    let draw = "import random, json; print(random.random(), hasattr(json, 'left')); json.left = 1";
    let (first, _, ended) = run(&agent, code(draw), b"")?;
    let (second, ..) = run(&agent, code(draw), b"")?;
    expect(
        ended.warm && first.ends_with("False\n") && second.ends_with("False\n"),
        &second,
    )?;
    expect(first != second, &first)?;
    // The interpreter and its next copy cannot be looked into, nor the agent.
    let look = r"import os
for p in filter(str.isdigit, os.listdir('/proc')):
    try:
        name = open(f'/proc/{p}/comm').read().strip()
    except OSError:
        continue
    if name == 'python3' and int(p) != os.getpid():
        try:
            open(f'/proc/{p}/mem', 'rb')
            print('open', p)
        except PermissionError:
            print('closed')";
    let (output, ..) = run(&agent, code(look), b"")?;
    expect(
        output.starts_with("closed\n") && !output.contains("open"),
        &output,
    )?;
    // Nobody else's code runs in it.
    let root = RunCodeRequest {
        user: "root".into(),
        ..code("import os; print(os.getuid())")
    };
    let (output, _, ended) = run(&agent, root, b"")?;
    expect(output == "0\n" && !ended.warm, &output)
}

pub fn limits() -> Result<(), Failed> {
    let agent = warm("")?;
    let limited = |source, limits| RunCodeRequest {
        limits: Some(limits),
        ..code(source)
    };
    let memory = Limits {
        memory_bytes: 32 << 20,
        ..Limits::default()
    };
    let (output, _, ended) = run(
        &agent,
        limited(
            "print('on', flush=True)\nb = bytearray(100 << 20)\nprint('off')",
            memory,
        ),
        b"",
    )?;
    let killed = ended.status == ExitStatus::Signal(9) && ended.oom_killed && ended.warm;
    expect(killed && output == "on\n", &(output, ended))?;
    let processes = Limits {
        processes: 2,
        ..Limits::default()
    };
    // Its children end with it.
    let forks = r"import os
ours, theirs = os.pipe()
for n in range(4):
    if os.fork() == 0:
        os.close(theirs)
        os._exit(len(os.read(ours, 1)))
    print(n, flush=True)";
    let (output, errors, ended) = run(&agent, limited(forks, processes), b"")?;
    expect(
        output == "0\n" && errors.contains("BlockingIOError"),
        &(output, errors),
    )?;
    expect(ended.warm, ended)?;
    // Time is over for all of its processes.
    let tree = RunCodeRequest {
        // Making a copy comes first.
        timeout_ms: if is_slow() { 40_000 } else { 4_000 },
        ..code(
            "import os, subprocess\nsubprocess.Popen(['sleep', '4321'], start_new_session=True)\nwhile True: pass",
        )
    };
    let (_, _, ended) = run(&agent, tree, b"")?;
    expect(ended.timed_out && ended.warm, ended)?;
    let (_, _, short) = run(&agent, code(""), b"")?;
    expect(
        short.warm && short.peak_memory > 1 << 20 && short.peak_memory < 100 << 20,
        short,
    )?;
    let count = "pgrep -fx 'sleep 4321' | wc -l";
    wait_until(Instant::now(), || {
        renew_patience(&agent);
        Ok(ask(&agent, count)? == "0\n")
    })?;
    Ok(())
}

pub fn killed() -> Result<(), Failed> {
    // The guest's own program is the default user's.
    let user = "4711";
    let agent = warm(user)?;
    let code = |source| RunCodeRequest {
        user: user.into(),
        ..code(source)
    };
    // The interpreter, its next copy, and whatever else is the user's.
    let (output, _, ended) = run(
        &agent,
        code(
            "import os, signal\nprint('now', flush=True)\nos.kill(-1, signal.SIGKILL)\nprint('alone')",
        ),
        b"",
    )?;
    expect(output == "now\nalone\n" && ended.warm, &output)?;
    let (output, ..) = run(&agent, code("print('cold or warm')"), b"")?;
    expect(output == "cold or warm\n", &output)?;
    wait_until(Instant::now(), || Ok(run(&agent, code(""), b"")?.2.warm))?;
    let nothing_left =
        "ls -d /sys/fs/cgroup/exec-* /sys/fs/cgroup/limited/exec-* 2>/dev/null | wc -l";
    // Two interpreters', their next copies', the sleep of this guest, and the one that asks.
    wait_until(Instant::now(), || {
        renew_patience(&agent);
        Ok(ask(&agent, nothing_left)?.trim().parse::<u32>()? <= 6)
    })?;
    Ok(())
}

pub fn refused() -> Result<(), Failed> {
    let agent = connect()?;
    let request = WarmRequest {
        language: Language::Python.into(),
        modules: vec!["json".into(), "no_such.module".into()],
        user: "1000:100".into(),
        ..WarmRequest::default()
    };
    match agent.warm(request) {
        Err(error) => {
            let text = error.to_string();
            expect(
                text == "no_such.module: ModuleNotFoundError: No module named 'no_such'",
                text,
            )
        }
        Ok(()) => Err("imported what is not there".into()),
    }
}
