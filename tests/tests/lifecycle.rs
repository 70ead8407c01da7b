//! Sandboxes that live on: a day in the life of an orchestrator, and of those who share a host.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use libtest_mimic::Failed;
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;
use tests::Needs::{Guest, Nothing};
use tests::sandboxes::{Host, is_alive, wait_for};
use tests::{test, vmm_command, vmm_path};

fn main() -> ExitCode {
    tests::main(vec![
        test("a_day_of_three_sandboxes", Guest, day),
        test("who_asks_for_what_is_not_there_is_told", Nothing, unknown),
        test("names_are_checked", Nothing, names),
    ])
}

fn day() -> Result<(), Failed> {
    let host = Host::new()?;
    let file = host.path().join("two.toml");
    fs::write(
        &file,
        "name = \"two\"\ncpus = 2\nmemory = \"160M\"\n[labels]\nrole = \"worker\"\n[agent.env]\nGREETING = \"good day\"\n",
    )?;
    host.ok(&["start", "one"])?.expect_stdout("one\n")?;
    host.ok(&["start", "--config", &file.to_string_lossy()])?
        .expect_stdout("two\n")?;
    host.ok(&["start", "three", "--label", "role=spare"])?;
    host.expect_ls(&[("one", "running"), ("two", "running"), ("three", "running")])?;
    host.ok(&["ls", "--quiet"])?
        .expect_stdout("one\ntwo\nthree\n")?;
    let two = host.inspect("two")?;
    if (&two["cpus"], &two["memory_mib"], &two["labels"]["role"])
        != (&2.into(), &160.into(), &"worker".into())
    {
        return Err(format!("not what the file says: {two}").into());
    }

    host.ok(&["exec", "one", "--", "echo", "I am one"])?
        .expect_stdout("I am one\n")?;
    host.ok(&["exec", "two", "--", "sh", "-c", "nproc; echo $GREETING"])?
        .expect_stdout("2\ngood day\n")?;
    let code = ["exec", "three", "--lang", "python", "-c", "print(6 * 7)"];
    host.ok(&code)?.expect_stdout("42\n")?;
    host.run(&["exec", "three", "--", "sh", "-c", "exit 9"])?
        .expect_status(9)?;

    copy(&host)?;
    follow_logs(&host)?;
    pause_and_resume(&host)?;
    host.refused(&["start", "one"], &["\"one\" is running", "--name"])?;
    host.refused(&["rm", "one"], &["one is running", "vmm stop one"])?;

    // The API, as a program would use it.
    let (status, view) = host.curl("one", "GET", "/v1/sandbox")?;
    if status != 200 || view["state"] != "running" {
        return Err(format!("{status}: {view}").into());
    }
    matches_description(&host, "one", &view)?;
    for (method, path, expected) in [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/stop", 405),
        ("POST", "/v1/stop", 200),
    ] {
        let (status, body) = host.curl("one", method, path)?;
        let code = body["error"]["code"].as_str();
        if status != expected || (expected != 200) != code.is_some() {
            return Err(format!("{method} {path}: {status} {body}").into());
        }
    }
    wait_for(|| Ok(host.inspect("one")?["state"] == "ended"))?;
    exec_by_api(&host)?;
    interactive_shell(&host)?;
    let exit = host.inspect("one")?["exit"].clone();
    if (&exit["status"], &exit["reason"]) != (&0.into(), &"stopped".into()) {
        return Err(format!("one ended so: {exit}").into());
    }

    // An enemy.
    let pid = host.pid("three")?;
    Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()?;
    // Its threads hold on to its lock for a moment longer than it is seen.
    wait_for(|| Ok(host.inspect("three")?["state"] == "killed"))?;
    host.expect_ls(&[("one", "ended"), ("two", "running"), ("three", "killed")])?;
    host.refused(
        &["exec", "three", "--", "true"],
        &["three is not running", "vmm start three"],
    )?;
    host.ok(&["start", "three"])?;
    host.ok(&["exec", "three", "--", "echo", "again"])?
        .expect_stdout("again\n")?;
    host.expect_ls(&[("one", "ended"), ("two", "running"), ("three", "running")])?;

    let pids = [host.pid("two")?, host.pid("three")?];
    host.ok(&["stop", "--rm", "two"])?;
    host.ok(&["rm", "--force", "one", "three"])?;
    host.expect_ls(&[])?;
    if let Some(pid) = pids.into_iter().find(|pid| is_alive(*pid)) {
        return Err(format!("process {pid} is still there").into());
    }
    let left: Vec<_> = fs::read_dir(host.path().join("bough"))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    if !left.is_empty() {
        return Err(format!("left behind: {left:?}").into());
    }
    Ok(())
}

/// A tree and a file go in and come back as they were.
fn copy(host: &Host) -> Result<(), Failed> {
    let at = |name: &str| host.path().join(name).to_string_lossy().into_owned();
    fs::create_dir_all(at("tree/inner/empty"))?;
    fs::write(at("tree/inner/script"), "echo from the tree\n")?;
    fs::set_permissions(at("tree/inner/script"), fs::Permissions::from_mode(0o750))?;
    std::os::unix::fs::symlink("inner/script", at("tree/link"))?;
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(at("tree/data"), &bytes)?;

    host.ok(&["cp", &at("tree"), "one:"])?;
    host.ok(&[
        "exec",
        "one",
        "--",
        "sh",
        "-c",
        "sh tree/link && sh tree/inner/script | head -c 9",
    ])?
    .expect_stdout("from the tree\nfrom the ")?;
    host.ok(&["cp", "one:tree", &at("back")])?;
    let same = Command::new("diff")
        .args(["--recursive", "--no-dereference", &at("tree"), &at("back")])
        .status()?;
    let mode = fs::metadata(at("back/inner/script"))?.permissions().mode();
    if !same.success() || mode & 0o777 != 0o750 {
        return Err(format!("the tree came back different (mode {mode:o})").into());
    }
    host.ok(&["cp", "one:tree/data", &at("data")])?;
    if fs::read(at("data"))? != bytes {
        return Err("the file came back different".into());
    }
    host.refused(
        &["cp", "one:nothing", &at("x")],
        &["one: ", "nothing", "No such file"],
    )?;
    host.refused(
        &["cp", &at("nothing"), "one:"],
        &["nothing", "No such file"],
    )?;
    host.refused(
        &["cp", &at("data"), "one:/root/data"],
        &["one: /root", "Permission denied"],
    )
}

/// A reader of the console sees a line that the guest prints after the reader came.
fn follow_logs(host: &Host) -> Result<(), Failed> {
    let mut reader = vmm_command()
        .args(["logs", "--follow", "two"])
        .env("XDG_RUNTIME_DIR", host.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(reader.stdout.take().ok_or("no standard output")?).lines();
    let found = std::thread::spawn(move || {
        let mut lines = lines.map_while(Result::ok);
        lines.any(|line| line.contains("a line for the log"))
    });
    let script = "echo a line for the log > /dev/console";
    host.ok(&["exec", "two", "-u", "root", "--", "sh", "-c", script])?;
    wait_for(|| Ok(found.is_finished()))?;
    reader.kill()?;
    reader.wait()?;
    match found.join() {
        Ok(true) => Ok(()),
        _ => Err("the line was not among the log's".into()),
    }
}

fn pause_and_resume(host: &Host) -> Result<(), Failed> {
    host.ok(&["pause", "three"])?;
    host.ok(&["pause", "three"])?;
    host.expect_ls(&[("one", "running"), ("two", "running"), ("three", "paused")])?;
    let exec = ["exec", "three", "--", "echo", "awake"];
    host.refused(&exec, &["three is paused", "vmm resume three"])?;
    host.ok(&["resume", "three"])?;
    host.ok(&exec)?.expect_stdout("awake\n")?;
    host.expect_ls(&[("one", "running"), ("two", "running"), ("three", "running")])
}

/// A program's output comes in lines of JSON, and a client that goes away takes its program with it.
fn exec_by_api(host: &Host) -> Result<(), Failed> {
    let socket = host.dir("two")?.join("api.sock");
    let curl = |seconds: &str, body: &str| {
        Command::new("curl")
            .args([
                "--silent",
                "--max-time",
                seconds,
                "--data",
                body,
                "--unix-socket",
            ])
            .arg(&socket)
            .arg("http://sandbox/v1/exec")
            .output()
    };
    let output = curl(
        "60",
        r#"{"argv": ["sh", "-c", "cat; exit 3"], "stdin": "hello"}"#,
    )?;
    let text = String::from_utf8(output.stdout)?;
    let events: Vec<Value> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let [first, last] = &events[..] else {
        return Err(format!("not two lines: {text}").into());
    };
    if first["stdout"] != "aGVsbG8=" || last["ended"]["status"] != 3 {
        return Err(format!("not what was asked for: {text}").into());
    }
    let refused: Value =
        serde_json::from_slice(&curl("60", r#"{"argv": ["true"], "who": "me"}"#)?.stdout)?;
    if refused["error"]["code"] != "bad_body" {
        return Err(format!("an unknown key was answered with {refused}").into());
    }
    let gone = curl("2", r#"{"argv": ["sleep", "12345"]}"#)?;
    if gone.status.code() != Some(28) {
        return Err(format!("curl did not give up: {gone:?}").into());
    }
    wait_for(|| {
        let left = host.run(&["exec", "two", "--", "pgrep", "-f", "sleep 12345"])?;
        Ok(left.status == Some(1))
    })
}

/// A terminal of ours, with what it has shown.
struct Terminal {
    ours: fs::File,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    /// A new one, and the end that a program is given.
    fn open() -> Result<(Self, fs::File), Failed> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let theirs = ptsname(&ours, Vec::new())?;
        let theirs = fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(i32::try_from(OFlags::NOCTTY.bits())?)
            .open(theirs.to_str()?)?;
        let ours = fs::File::from(ours);
        let shown = Arc::<Mutex<String>>::default();
        let (mut reader, text) = (ours.try_clone()?, Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let piece = String::from_utf8_lossy(&buffer[..count]);
                text.lock().unwrap().push_str(&piece);
            }
        });
        Ok((Self { ours, shown }, theirs))
    }

    fn resize(&self, ws_row: u16, ws_col: u16) -> Result<(), Failed> {
        let size = Winsize {
            ws_row,
            ws_col,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(&self.ours, size)?)
    }

    fn expect(&self, text: &str) -> Result<(), Failed> {
        wait_for(|| Ok(self.shown.lock().unwrap().contains(text))).map_err(|_| {
            let shown = self.shown.lock().unwrap();
            format!("{text:?} is not in {shown:?}").into()
        })
    }

    fn type_in(&mut self, keys: &str) -> Result<(), Failed> {
        Ok(self.ours.write_all(keys.as_bytes())?)
    }
}

/// A shell on a terminal: it knows the terminal's size, also when that changes, and its keys.
fn interactive_shell(host: &Host) -> Result<(), Failed> {
    let (mut terminal, theirs) = Terminal::open()?;
    terminal.resize(33, 101)?;
    let mut shell = Command::new("setsid")
        .args(["--ctty", "--wait"])
        .arg(vmm_path())
        .args(["exec", "-it", "two", "--", "sh"])
        .env("XDG_RUNTIME_DIR", host.path())
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs)
        .spawn()?;
    terminal.type_in("stty size\n")?;
    terminal.expect("33 101")?;
    terminal.resize(44, 99)?;
    // The change and the keys take different ways.
    wait_for(|| {
        let mut keys = &terminal.ours;
        keys.write_all(b"stty size\n")?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(terminal.shown.lock().unwrap().contains("44 99"))
    })?;
    // Ctrl-C ends what runs, and not the shell.
    terminal.type_in("echo begun; sleep 1000; echo over\n")?;
    terminal.expect("begun\r\n")?;
    // A key that comes before the program is in the foreground is the shell's own.
    wait_for(|| {
        let mut keys = &terminal.ours;
        keys.write_all(b"\x03")?;
        std::thread::sleep(Duration::from_secs(1));
        keys.write_all(b"echo still $((40 + 2)) here\n")?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(terminal.shown.lock().unwrap().contains("still 42 here"))
    })?;
    terminal.type_in("exit 7\n")?;
    wait_for(|| Ok(terminal.shown.lock().unwrap().contains("exit 7")))?;
    let status = shell.wait()?;
    match status.code() {
        Some(7) => Ok(()),
        _ => Err(format!("the shell ended with {status}").into()),
    }
}

/// What the server sends has what its own description requires.
fn matches_description(host: &Host, name: &str, view: &Value) -> Result<(), Failed> {
    let (_, description) = host.curl(name, "GET", "/v1/openapi.json")?;
    let schema = &description["components"]["schemas"]["Sandbox"];
    let properties = schema["properties"].as_object().ok_or("no properties")?;
    let sent = view.as_object().ok_or("no object")?;
    for name in schema["required"].as_array().into_iter().flatten() {
        let name = name.as_str().unwrap_or_default();
        let Some(value) = sent.get(name) else {
            return Err(format!("{name} is described and not sent").into());
        };
        let kind = match value {
            Value::String(_) => "string",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "integer",
            Value::Object(_) => "object",
            Value::Array(_) => "array",
            Value::Null => "null",
        };
        let described = &properties[name]["type"];
        let matches = match described {
            Value::Array(kinds) => kinds.iter().any(|one| one == kind),
            one => one == kind,
        };
        if !matches {
            return Err(format!("{name} is {described} in the description, {kind} as sent").into());
        }
    }
    match sent.keys().find(|name| !properties.contains_key(*name)) {
        Some(name) => Err(format!("{name} is sent and not described").into()),
        None => Ok(()),
    }
}

fn unknown() -> Result<(), Failed> {
    let host = Host::new()?;
    host.expect_ls(&[])?;
    for command in ["inspect", "pause", "resume", "stop", "rm", "logs"] {
        host.refused(
            &[command, "nobody"],
            &["no sandbox is called \"nobody\"", "vmm ls"],
        )?;
    }
    host.refused(&["exec", "nobody", "--", "true"], &["nobody"])?;
    // Of many, each is told, in the order of the command.
    let names: Vec<_> = (0..40).map(|number| format!("nobody-{number}")).collect();
    let mut stop = vec!["stop"];
    stop.extend(names.iter().map(String::as_str));
    let output = host.run(&stop)?;
    output.expect_status(2)?;
    let told = output
        .stderr
        .lines()
        .filter_map(|line| line.split('"').nth(1));
    if told.ne(names.iter().map(String::as_str)) {
        return Err(output.stderr.into());
    }
    Ok(())
}

fn names() -> Result<(), Failed> {
    let host = Host::new()?;
    // Something that exists for what is looked at first.
    let file = host.path().join("file");
    fs::write(&file, "x")?;
    let file = file.to_string_lossy();
    for name in ["a/b", "..", "", &"x".repeat(64)] {
        let start = ["start", "--kernel", &file, "--image", &file, "--", name];
        host.refused(&start, &["cannot be a sandbox's name"])?;
    }
    Ok(())
}
