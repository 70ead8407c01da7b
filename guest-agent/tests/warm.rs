//! Code runs in copies of an interpreter that stands ready as it would in a fresh one.

mod common;

use std::time::Duration;

use common::{Client, Outcome, TestAgent, variable, wait_for};
use guest_agent::proto::{
    Cancel, ErrorCode, Language, Pty, RunCode, Signal, StdinData, Warm, exited::Status,
    from_agent::Kind, to_agent::Kind as Ask,
};

fn warm<const N: usize>(modules: [&str; N]) -> Warm {
    Warm {
        language: Language::Python.into(),
        modules: modules.map(String::from).to_vec(),
        ..Warm::default()
    }
}

fn code(source: &str) -> RunCode {
    RunCode {
        language: Language::Python.into(),
        source: source.as_bytes().to_vec(),
        ..RunCode::default()
    }
}

fn make_warm(client: &mut Client, request: Warm) {
    client.send(900, Ask::Warm(request));
    let answer = client.receive().unwrap();
    assert!(matches!(answer.kind, Some(Kind::Done(_))), "{answer:?}");
}

fn run(client: &mut Client, code: RunCode) -> Outcome {
    client.send(1, Ask::RunCode(code));
    client.follow(1)
}

#[test]
fn code_has_the_same_outcome_warm_and_cold() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    make_warm(&mut client, warm(["json"]));
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("near.py"), "name = __name__").unwrap();
    let written = directory.path().join("written");
    let path = directory.path().to_str().unwrap();
    for source in PROGRAMS {
        let code = RunCode {
            args: vec![b"one".to_vec(), b"t\xffo".to_vec()],
            env: vec![variable("GIVEN", "value")],
            cwd: path.into(),
            filename: "given.py".into(),
            ..code(source)
        };
        let mut outcome = |code| {
            let outcome = run(&mut client, code);
            let texts = [&outcome.stdout, &outcome.stderr].map(|bytes| plain(bytes));
            let written = std::fs::read(&written).ok();
            (texts, outcome.status, written, outcome.warm)
        };
        let fresh = RunCode {
            cold: true,
            ..code.clone()
        };
        let cold = outcome(fresh);
        let warm = outcome(code);
        assert!(warm.3 && !cold.3, "{source}");
        assert_eq!(
            (warm.0, warm.1, warm.2),
            (cold.0, cold.1, cold.2),
            "{source}"
        );
    }
}

#[test]
fn one_program_leaves_nothing_to_the_next() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    make_warm(&mut client, warm(["json", "random", "uuid"]));
    let first = "import sys, os, json, builtins\nglobal_name = 1\njson.dumps = None\nsys.modules['fake'] = json\n\
        builtins.print_ = print\nos.environ['LEFT'] = 'x'\nos.chdir('/')\nos.umask(0)\nsys.path.append('/left')\n\
        sys.setrecursionlimit(77)\nprint('done')";
    let second = "import sys, os, json, builtins\nprint('global_name' in globals(), json.dumps([1]), 'fake' in sys.modules, \
        hasattr(builtins, 'print_'), 'LEFT' in os.environ, os.getcwd() == '/', os.umask(0) == 0, '/left' in sys.path, \
        sys.getrecursionlimit())";
    let outcome = run(&mut client, code(first));
    assert_eq!(
        (outcome.stdout(), outcome.warm),
        ("done\n", true),
        "{}",
        outcome.stderr()
    );
    let outcome = run(&mut client, code(second));
    assert_eq!(
        (outcome.stdout(), outcome.warm),
        ("False [1] False False False False False False 1000\n", true),
        "{}",
        outcome.stderr()
    );
    let draw = "import random, uuid, os\nprint(random.random(), random.getrandbits(64), uuid.uuid4(), os.urandom(4))";
    let draws = [(); 2].map(|()| {
        let outcome = run(&mut client, code(draw));
        assert!(outcome.warm);
        outcome.stdout
    });
    assert_ne!(draws[0], draws[1]);
}

#[test]
fn input_comes_and_time_ends() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    make_warm(&mut client, warm([]));
    client.send(
        1,
        Ask::RunCode(RunCode {
            stdin: true,
            ..code("print(input()[::-1])")
        }),
    );
    // Before it can have begun.
    client.send(
        1,
        Ask::StdinData(StdinData {
            data: b"abc\n".to_vec(),
        }),
    );
    let outcome = client.follow(1);
    assert_eq!((outcome.stdout(), outcome.warm), ("cba\n", true));
    let endless = RunCode {
        timeout_ms: 300,
        ..code("print('on', flush=True)\nwhile True: pass")
    };
    let outcome = run(&mut client, endless);
    assert_eq!((outcome.stdout(), outcome.warm), ("on\n", true));
    assert_eq!(outcome.status, Some(Status::Signal(9)));
    client.send(1, Ask::RunCode(code("import time; time.sleep(100)")));
    client.send(1, Ask::Cancel(Cancel {}));
    assert_eq!(client.follow(1).status, Some(Status::Signal(9)));
    assert!(run(&mut client, code("")).warm);
    let long = "#".repeat(200_000) + "\nprint(__file__[-7:])";
    let outcome = run(&mut client, code(&long));
    assert_eq!((outcome.stdout(), outcome.warm), ("main.py\n", true));
}

#[test]
fn signals_meet_the_program_however_early() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    make_warm(&mut client, warm([]));
    let wait = "import time; time.sleep(100)";
    let another = "import os; os.execvp('sleep', ['sleep', '100'])";
    let no_code = "x = (";
    let slow = format!("{wait}\n{}", "x = {}\n".repeat(100_000));
    for (source, signo, expected) in [
        (wait, 15, Status::Signal(15)),
        (wait, 2, Status::Signal(2)),
        (&slow, 2, Status::Signal(2)),
        (another, 15, Status::Signal(15)),
        (another, 2, Status::Signal(2)),
        (no_code, 9, Status::Signal(9)),
    ] {
        for pause in [0, 20, 250] {
            client.send(1, Ask::RunCode(code(source)));
            std::thread::sleep(Duration::from_millis(pause));
            client.send(1, Ask::Signal(Signal { signo }));
            let outcome = client.follow(1);
            // It may have come to its own end, by its own fault.
            if source != no_code || outcome.status != Some(Status::Code(1)) {
                let what = format!("{source:.40} {signo} {pause}: {:?}", outcome.stderr());
                assert_eq!(outcome.status, Some(expected), "{what}");
            }
            assert!(
                !outcome.stderr().contains("<string>"),
                "{:?}",
                outcome.stderr()
            );
        }
    }
    // Both come.
    let both = "import signal, time\nsignal.signal(10, lambda *_: print('first', flush=True))\ntime.sleep(100)";
    client.send(1, Ask::RunCode(code(both)));
    for signo in [10, 15] {
        client.send(1, Ask::Signal(Signal { signo }));
    }
    // The first ends it where it cannot take it yet.
    let status = client.follow(1).status;
    assert!(
        matches!(status, Some(Status::Signal(10 | 15))),
        "{status:?}"
    );
}

#[test]
fn several_run_at_once() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    make_warm(&mut client, warm([]));
    let sleep = "import time, os; time.sleep(0.5); print(os.getpid())";
    (1..=5).for_each(|id| client.send(id, Ask::RunCode(code(sleep))));
    let (mut warm, mut ended) = (0, 0);
    while ended < 5 {
        if let Some(Kind::Exited(exited)) = client.receive().unwrap().kind {
            assert_eq!(exited.status, Some(Status::Code(0)));
            warm += u32::from(exited.warm);
            ended += 1;
        }
    }
    assert_eq!(warm, 5);
}

#[test]
fn what_needs_another_interpreter_gets_a_fresh_one() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    assert!(!run(&mut client, code("")).warm);
    let settings = Warm {
        env: vec![variable("PYTHONUNBUFFERED", "1")],
        ..warm([])
    };
    make_warm(&mut client, settings);
    let with = |name, value| RunCode {
        env: vec![variable(name, value)],
        ..code("")
    };
    assert!(run(&mut client, with("PYTHONUNBUFFERED", "1")).warm);
    for code in [
        code(""),
        with("PYTHONUNBUFFERED", "2"),
        RunCode {
            clear_env: true,
            ..with("PYTHONUNBUFFERED", "1")
        },
        RunCode {
            cold: true,
            ..with("PYTHONUNBUFFERED", "1")
        },
        RunCode {
            pty: Some(Pty::default()),
            ..with("PYTHONUNBUFFERED", "1")
        },
        RunCode {
            source: b"print('a')\0".to_vec(),
            ..with("PYTHONUNBUFFERED", "1")
        },
    ] {
        assert!(!run(&mut client, code.clone()).warm, "{code:?}");
    }
    // One takes the place of the other.
    make_warm(&mut client, warm([]));
    assert!(run(&mut client, code("")).warm);
    assert!(!run(&mut client, with("PYTHONUNBUFFERED", "1")).warm);
    let nowhere = RunCode {
        cwd: b"/nowhere".to_vec(),
        ..code("")
    };
    let error = run(&mut client, nowhere).error.unwrap();
    assert_eq!(error.code(), ErrorCode::BadWorkingDirectory);
}

#[test]
fn what_cannot_be_made_warm_is_told() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    for (name, text) in [
        ("broken", "1 / 0"),
        ("leaves", "import os; os._exit(3)"),
        ("waits", "import time; time.sleep(100)"),
        (
            "lonely",
            "import os\nos.register_at_fork(after_in_child=lambda: os._exit(1))",
        ),
    ] {
        std::fs::write(directory.path().join(name).with_extension("py"), text).unwrap();
    }
    for (module, expected) in [
        (
            "no_such",
            "no_such: ModuleNotFoundError: No module named 'no_such'",
        ),
        ("broken", "broken: ZeroDivisionError: division by zero"),
        ("leaves", "the interpreter ended: Code(3)"),
        ("lonely", "no copies"),
        ("", "no module's name"),
        ("a,b", "no module's name"),
    ] {
        let request = Warm {
            env: vec![variable("PYTHONPATH", path)],
            ..warm(["json", module])
        };
        client.send(5, Ask::Warm(request));
        let Some(Kind::Error(error)) = client.receive().unwrap().kind else {
            panic!("{module}");
        };
        assert!(error.message.contains(expected), "{module}: {error:?}");
        assert!(!run(&mut client, code("")).warm, "{module}");
    }
    let request = Warm {
        env: vec![variable("PYTHONPATH", path)],
        ..warm(["waits"])
    };
    client.send(5, Ask::Warm(request));
    client.send(5, Ask::Cancel(Cancel {}));
    let Some(Kind::Error(error)) = client.receive().unwrap().kind else {
        panic!("not cancelled");
    };
    assert_eq!(error.code(), ErrorCode::Cancelled);
    wait_for("the interpreter's end", || agent.children().is_empty());
}

#[test]
fn an_interpreter_that_is_killed_comes_back() {
    let agent = TestAgent::start();
    let mut client = agent.connect();
    make_warm(&mut client, warm([]));
    let kill = r"import os, signal
for p in filter(str.isdigit, os.listdir('/proc')):
    try:
        # Bytes: another test's process may have an argument that is no text.
        text, stat = open(f'/proc/{p}/cmdline', 'rb').read(), open(f'/proc/{p}/stat', 'rb').read()
        if b'posix.read' in text and int(p) != os.getpid() and int(stat.split()[3]) == os.getppid():
            os.kill(int(p), signal.SIGKILL)
    except OSError:
        pass
print('killed')";
    let outcome = run(&mut client, code(kill));
    assert_eq!(
        (outcome.stdout(), outcome.warm),
        ("killed\n", true),
        "{}",
        outcome.stderr()
    );
    let outcome = run(&mut client, code("print(1)"));
    assert_eq!(outcome.stdout(), "1\n");
    wait_for("the interpreter", || run(&mut client, code("")).warm);
    // A running program does without it.
    client.send(
        1,
        Ask::RunCode(code(
            &(kill.to_owned() + "\nimport time; time.sleep(0.5); raise SystemExit(6)"),
        )),
    );
    assert_eq!(client.follow(1).status, Some(Status::Code(6)));
    drop(client);
    // A client that goes leaves it to others.
    let mut client = agent.connect();
    wait_for("the interpreter", || run(&mut client, code("")).warm);
}

/// Output without what differs from one process to the next: the number of the source's directory, and addresses.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    ["/code-", " 0x"].iter().fold(text, |text, mark| {
        let digits = |c: char| c.is_ascii_hexdigit() || c == '-';
        let rest = |part: &str| part.trim_start_matches(digits).to_owned();
        let mut parts = text.split(mark);
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |text, part| text + mark + &rest(part))
    })
}

const PROGRAMS: &[&str] = &[
    "print('hello')",
    "import sys; sys.exit(7)",
    "import sys; sys.exit('words')",
    "import sys; sys.exit()",
    "import sys; sys.exit(2**70)",
    "import sys; sys.exit(-1)",
    "raise SystemExit((1, 2))",
    "exit(3)",
    "def f():\n    return 1 / 0\n\nf()\n",
    "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('x') from e",
    "x = (\n",
    "def f(:\n    pass",
    "print('a')\n  print('b')",
    "b = '\\xff'; print(ascii(b)); print(b)",
    "import no_such_module",
    "import near; print(near.name, near.__file__.endswith('/near.py'))",
    "import sys; print(sys.argv[1:], sys.orig_argv[0], sys.orig_argv[2:], sys.path[2:], sys.flags)",
    "import os; print(dict(os.environ)); print(os.getcwd()); print(os.getpgrp() == os.getpid())",
    "import os; os.system('echo $GIVEN $HOME; pwd; ls -l /proc/self/fd | wc -l')",
    "print(__name__, __doc__, sorted(globals()), __annotations__, __builtins__, __spec__, __cached__, type(__loader__))",
    "import sys; print(sys.modules['__main__'].__dict__ is globals())",
    "import inspect\ndef f():\n    'doc'\nprint(inspect.getsource(f), end='')",
    "import threading, time\nt = threading.Thread(target=lambda: (time.sleep(0.2), print('thread')))\nt.start()\nprint(threading.main_thread() is threading.current_thread(), threading.active_count())",
    "import threading, time\nthreading.Thread(target=time.sleep, args=[100], daemon=True).start()\nprint('out')",
    "import threading\nt = threading.Thread(target=lambda: 1 / 0, name='T')\nt.start(); t.join()",
    "import atexit\natexit.register(print, 'last')\natexit.register(lambda: 1 / 0)\nprint('first')",
    "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(5); raise SystemExit(4)'], capture_output=True))",
    "import multiprocessing as m\nif __name__ == '__main__':\n    with m.Pool(2) as p: print(p.map(abs, [-1, -2]))",
    "import multiprocessing as m\ndef f(q): q.put(__name__)\nif __name__ == '__main__':\n    c = m.get_context('spawn'); q = c.Queue(); p = c.Process(target=f, args=[q]); p.start(); print(q.get()); p.join()",
    "import os\nprint('flushed', flush=True)\nprint('lost')\nos._exit(9)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "import os; os.abort()",
    "import os, signal\nprint('out')\nos.kill(os.getpid(), signal.SIGINT)\nimport time; time.sleep(10)",
    "raise KeyboardInterrupt",
    "import signal; print([signal.getsignal(n) for n in (2, 13, 15, 17)])",
    "import os\nif os.fork() == 0:\n    print('child'); raise SystemExit(3)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))",
    "import sys\nprint(repr(sys.stdin.read()), sys.stdin, sys.stdout, sys.stderr, sys.stdout.buffer.raw, sys.stdout.line_buffering)",
    "import sys\nprint('err', file=sys.stderr)\nprint(sys.stdout.isatty(), sys.stdout.seekable(), sys.stdin.readable())",
    "import sys\nsys.stdout.close()",
    "f = open('written', 'w')\nf.write('abc')\nprint('not closed')",
    "class C:\n    def __del__(self): print('gone', C, __name__)\nc = C()\nd = [c]; d.append(d)",
    "import sys\ndef hook(*a): print('hook', a[0]); raise ValueError('in hook')\nsys.excepthook = hook\n1 / 0",
    "import sys\ndef hook(*a): raise SystemExit(5)\nsys.excepthook = hook\n1 / 0",
    "import sys\ndel sys.excepthook\n1 / 0",
    "def f(n): return f(n + 1)\ntry:\n    f(0)\nexcept RecursionError as e: print(e)",
    "import warnings\nwarnings.warn('careful')",
    "x = 1 is 1",
    "import json, sys\nprint(json.dumps({'a': 1}), json.__name__)",
    "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    print('async')\nasyncio.run(main())",
    "import ctypes\nctypes.CDLL(None).puts(b'from c')",
    "import pickle\nclass P: pass\nprint(pickle.loads(pickle.dumps(P())).__class__)",
    "import sys\nprint(sys.getrecursionlimit(), sys.getswitchinterval(), __import__('gc').isenabled(), __import__('gc').get_threshold())",
    "import os\nos.umask(0o077)\nprint(oct(os.umask(0)))\nos.chdir('/')",
    "import sys\nsys.stdout.write('no newline')",
    "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
    "# -*- coding: latin-1 -*-\nprint('caf\u{e9}')",
    "#!/usr/bin/python3\n\nif True:\n\tprint('tabs')\n        print('spaces')",
    "import traceback\ntry:\n    [][1]\nexcept IndexError: traceback.print_exc()",
    "import logging\nlogging.warning('logged')",
    "from __future__ import annotations\ndef f(a: b): pass\nprint(f.__annotations__)",
    "import sys\nsys.path.insert(0, '/nowhere')\nimport random, uuid, tempfile\nprint(tempfile.gettempdir())",
    "assert 1 == 2, 'message'",
    "import os; print(os.listdir('/proc/self/fd') and os.access('/proc/self/maps', os.R_OK), open('/proc/self/comm').read())",
    "",
    "lambda: (yield)",
    "return 1",
];
