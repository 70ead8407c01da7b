//! A Linux guest with its agent: what a user runs, and what an enemy does to it.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::Failed;
use tests::Needs::Guest;
use tests::{Vmm, test};
use vmm::agent::{AGENT_PORT, Agent, ExecRequest, ExitStatus, Stdin, Stdio};

fn main() -> ExitCode {
    tests::main(vec![
        test(
            "warnings_do_not_stand_in_the_way_of_output",
            Guest,
            warnings,
        ),
        test("several_cpus_run_real_processes", Guest, several_cpus),
        test("python_prints_and_exits_with_its_own_status", Guest, python),
        test("code_comes_from_a_file_or_standard_input", Guest, code),
        test("a_shell_sees_its_cpus_input_and_environment", Guest, shell),
        test("the_image_is_memory_or_a_disk", Guest, image_interfaces),
        test("the_agent_calls_on_the_lane_or_by_vsock", Guest, transports),
        test(
            "what_is_written_to_a_drive_is_there_the_next_time",
            Guest,
            drives,
        ),
        test("what_cannot_be_run_is_told_apart", Guest, not_runnable),
        test("time_that_is_over_ends_the_run", Guest, timeout),
        test("a_panic_is_reported_with_the_console", Guest, panic),
        test("a_guest_that_powers_off_is_noticed", Guest, power_off),
        test("a_host_connects_to_the_agent_by_its_socket", Guest, connect),
        test("a_killed_monitor_leaves_nothing_in_the_way", Guest, killed),
        test("a_closed_output_ends_the_run", Guest, closed_output),
    ])
}

fn run(arguments: &[&str]) -> Vmm {
    Vmm::new([&["run"], arguments].concat())
}

fn python() -> Result<(), Failed> {
    let code = "import sys,platform; print(sum(range(10)), platform.system()); sys.exit(7)";
    let output = run(&["--lang", "python", "-c", code]).run()?;
    output
        .expect_status(7)?
        .expect_stdout("45 Linux\n")?
        .expect_no_stderr()?;
    Ok(())
}

fn code() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let script = directory.path().join("script.sh");
    fs::write(
        &script,
        "read line; echo \"$1 got $line\"; echo oops >&2; exit 3\n",
    )?;
    let output = run(&["--lang", "shell", &script.to_string_lossy(), "first"])
        .stdin("input\n")
        .run()?;
    output
        .expect_status(3)?
        .expect_stdout("first got input\n")?
        .expect_stderr(&["oops\n"])?;
    let output = run(&["--lang", "shell"])
        .stdin("echo from stdin; cat")
        .run()?;
    output.expect_status(0)?.expect_stdout("from stdin\n")?;
    Ok(())
}

/// Several things in one guest, since each boot takes seconds on a software KVM.
fn shell() -> Result<(), Failed> {
    let script = "nproc; read a; echo \"$a\"; cat | wc -c; seq 10000; echo $GREETING; pwd; echo apart >&2; kill -9 $$";
    let mut input = b"first line\n".to_vec();
    input.extend(vec![b'x'; 1 << 20]);
    let arguments = [
        "--cpus",
        "2",
        "--memory",
        "256",
        "-e",
        "GREETING=good day",
        "--cwd",
        "/tmp",
        "--",
        "sh",
        "-c",
        script,
    ];
    let output = run(&arguments).stdin(input).run()?;
    let numbers: String = (1..=10_000).map(|n| format!("{n}\n")).collect();
    let expected = format!("2\nfirst line\n{}\n{numbers}good day\n/tmp\n", 1 << 20);
    output.expect_status(128 + 9)?.expect_stderr(&["apart\n"])?;
    if output.stdout != expected {
        return Err(format!(
            "{} bytes came, {} were expected",
            output.stdout.len(),
            expected.len()
        )
        .into());
    }
    Ok(())
}

/// Much goes both ways at once; and who has no privileges cannot have the lane.
fn transports() -> Result<(), Failed> {
    let script = "(: </dev/lane) || true; exec cat";
    let input: String = ('a'..='z').cycle().take(300_001).collect();
    for (flags, refused) in [
        (&[][..], "Permission denied"),
        (&["--no-lane"], "No such file"),
    ] {
        let words = [flags, &["--memory", "256", "--", "sh", "-c", script]].concat();
        let output = run(&words).stdin(input.clone()).run()?;
        if output.stdout != input {
            let bytes = output.stdout.len();
            return Err(format!("{flags:?}: {bytes} bytes came back").into());
        }
        output.expect_status(0)?.expect_stderr(&[refused])?;
    }
    Ok(())
}

fn image_interfaces() -> Result<(), Failed> {
    let script = "ls /sys/block; cat /etc/debian_version";
    for (interface, disk) in [("pmem", "pmem0"), ("block", "vda")] {
        run(&["--image-as", interface, "--", "sh", "-c", script])
            .run()?
            .expect_status(0)?
            .expect_stdout(&format!("{disk}\n12.15\n"))?;
    }
    Ok(())
}

/// A file describes the sandbox; its writable drive has a file system, into which nobody syncs.
fn drives() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name);
    fs::write(path("notes"), b"from the host".repeat(512))?;
    fs::File::create(path("disk"))?.set_len(16 << 20)?;
    let made = std::process::Command::new("/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-F"])
        .arg(path("disk"))
        .status()?;
    if !made.success() {
        return Err(format!("mke2fs: {made}").into());
    }
    fs::write(
        path("vm.toml"),
        "drives = [{ path = 'disk' }, { path = 'notes', read_only = true }]\n\
         agent = { env = { WHO = 'the file', GREETING = 'hello' }, cwd = '/tmp' }\n",
    )?;
    let config = path("vm.toml").to_string_lossy().into_owned();
    let write = "pwd; echo $GREETING from $WHO; head -c 13 /dev/vdb; echo; (echo x > /dev/vdb) 2>/dev/null || echo refused; \
        grep -o 'root=[^ ]*' /proc/cmdline; mkdir disk; mount -t ext4 /dev/vda disk; echo kept > disk/file; exit 3";
    run(&[
        "--config",
        &config,
        "-e",
        "WHO=a flag",
        "--user",
        "root",
        "--",
        "sh",
        "-c",
        write,
    ])
    .run()?
    .expect_status(3)?
    .expect_no_stderr()?
    .expect_stdout("/tmp\nhello from a flag\nfrom the host\nrefused\nroot=/dev/pmem0\n")?;
    // After the image, where that is a disk. Read-only, by the flag over the file: so only a clean file system is mounted.
    let disk = format!("{},ro", path("disk").display());
    let read = "mkdir disk; mount -t ext4 -o ro /dev/vdb disk; cat disk/file; grep -o 'root=[^ ]*' /proc/cmdline";
    let block = ["--image-as", "block", "--config", &config, "--drive", &disk];
    run(&[&block[..], &["--user", "root", "--", "sh", "-c", read]].concat())
        .run()?
        .expect_status(0)?
        .expect_stdout("kept\nroot=/dev/vda\n")?;
    Ok(())
}

fn not_runnable() -> Result<(), Failed> {
    run(&["--", "/no/such/program"])
        .run()?
        .expect_status(127)?
        .expect_stderr(&["/no/such/program"])?
        .expect_one_line()?;
    run(&["--", "/etc/passwd"])
        .run()?
        .expect_status(126)?
        .expect_stderr(&["/etc/passwd"])?
        .expect_one_line()?;
    run(&[])
        .run()?
        .expect_status(2)?
        .expect_stderr(&["nothing to run"])?
        .expect_one_line()?;
    Ok(())
}

fn timeout() -> Result<(), Failed> {
    let output = run(&["--timeout", "1", "--", "sleep", "1000"]).run()?;
    output
        .expect_status(124)?
        .expect_stderr(&["timed out after"])?
        .expect_one_line()?;
    Ok(())
}

fn panic() -> Result<(), Failed> {
    let output = run(&["--cmdline", "init=/no/such/init", "--", "true"]).run()?;
    output.expect_status(123)?.expect_stderr(&[
        "the guest reset",
        "Kernel panic",
        "/no/such/init",
    ])?;
    Ok(())
}

fn power_off() -> Result<(), Failed> {
    // RB_AUTOBOOT, as any root in the guest can have it.
    let code = "import ctypes, time; ctypes.CDLL(None).reboot(0x01234567); time.sleep(1000)";
    let output = run(&["--user", "root", "--lang", "python", "-c", code]).run()?;
    output
        .expect_status(123)?
        .expect_stderr(&["the guest reset or powered itself off"])?;
    Ok(())
}

/// Another process speaks to the agent while a program runs.
fn connect() -> Result<(), Failed> {
    let runtime = tempfile::tempdir()?;
    let mut child = tests::vmm_command()
        .args(["run", "--", "sleep", "1000"])
        .env("XDG_RUNTIME_DIR", runtime.path())
        .spawn()?;
    let result = (|| -> Result<(), Failed> {
        let socket = wait_for_socket(runtime.path())?;
        let agent = connect_in_time(&socket)?;
        agent.ping()?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let request = ExecRequest {
            argv: vec![b"echo".to_vec(), b"other".to_vec()],
            ..Default::default()
        };
        let stdio = Stdio {
            stdin: Stdin::Null,
            stdout: &mut stdout,
            stderr: &mut stderr,
        };
        let status = agent.exec(request, stdio)?;
        if (status, stdout.as_slice()) != (ExitStatus::Code(0), b"other\n") {
            return Err(format!("{status:?} {stdout:?} {stderr:?}").into());
        }
        if Agent::connect(&socket, 4242, None).is_ok() {
            return Err("a port that nobody listens on was accepted".into());
        }
        Ok(())
    })();
    std::process::Command::new("kill")
        .arg(child.id().to_string())
        .status()?;
    let status = child.wait()?;
    result?;
    if status.code() != Some(128 + 15) {
        return Err(format!("after SIGTERM: {status}").into());
    }
    expect_nothing_in(runtime.path())
}

fn connect_in_time(socket: &std::path::Path) -> Result<Agent, Failed> {
    for _ in 0..1200 {
        if let Ok(agent) = Agent::connect(socket, AGENT_PORT, None) {
            return Ok(agent);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err("the agent does not answer on the socket".into())
}

fn wait_for_socket(runtime: &std::path::Path) -> Result<std::path::PathBuf, Failed> {
    for _ in 0..100 {
        let sandboxes = fs::read_dir(runtime.join("bough"))
            .into_iter()
            .flatten()
            .flatten();
        let socket = sandboxes
            .map(|entry| entry.path().join("vsock.sock"))
            .find(|path| path.exists());
        if let Some(socket) = socket {
            return Ok(socket);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err("no sandbox appeared".into())
}

fn expect_nothing_in(runtime: &std::path::Path) -> Result<(), Failed> {
    let left: Vec<_> = fs::read_dir(runtime.join("bough"))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("left behind: {left:?}").into())
    }
}

fn killed() -> Result<(), Failed> {
    let runtime = tempfile::tempdir()?;
    let mut child = tests::vmm_command()
        .args(["run", "--", "true"])
        .env("XDG_RUNTIME_DIR", runtime.path())
        .spawn()?;
    wait_for_socket(runtime.path())?;
    child.kill()?;
    child.wait()?;
    run(&["--", "/no/such/program"])
        .env("XDG_RUNTIME_DIR", runtime.path())
        .run()?
        .expect_status(127)?;
    expect_nothing_in(runtime.path())
}

fn closed_output() -> Result<(), Failed> {
    let vmm = tests::vmm_path();
    let script = format!("{} run -- yes | head -n 1", vmm.display());
    let output = std::process::Command::new("bash")
        .args(["-c", &format!("set -o pipefail; {script}")])
        .env("XDG_CACHE_HOME", tests::cache_home())
        .output()?;
    if output.status.code() != Some(141) || output.stdout != b"y\n" {
        return Err(format!("{output:?}").into());
    }
    Ok(())
}

/// The monitor prints, from another thread, while it streams the program's output.
fn warnings() -> Result<(), Failed> {
    let code = "import socket\ns = socket.socket(socket.AF_VSOCK)\ntry: s.connect((2, 9999))\nexcept OSError as e: print(e)\n\
        open('/dev/console', 'w').write('to the console')";
    let output = run(&[
        "--console",
        "-",
        "--user",
        "root",
        "--lang",
        "python",
        "-c",
        code,
    ])
    .run()?;
    output
        .expect_status(0)?
        .expect_stderr(&["port 9999", "to the console"])?;
    if output.stdout.is_empty() {
        return Err(format!("nobody was connected to: {output:#?}").into());
    }
    Ok(())
}

fn several_cpus() -> Result<(), Failed> {
    let script = "nproc; for i in 1 2 3; do (seq 1000 | md5sum) & done; wait";
    let output = run(&["--cpus", "3", "--", "sh", "-c", script]).run()?;
    let sum = "53d025127ae99ab79e8502aae2d9bea6  -\n";
    output
        .expect_status(0)?
        .expect_stdout(&format!("3\n{sum}{sum}{sum}"))?;
    Ok(())
}
