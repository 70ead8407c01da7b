//! `vmm explore`.

use std::io::{BufRead, BufReader};
use std::thread::sleep;
use std::time::Duration;

use libtest_mimic::Failed;
use rustix::process::Signal;
use tests::sandboxes::{Host, processor_time, signal, wait_for};

use crate::guest::{python, read, start, write};

/// A program that never rests for long.
const RESTLESS: &str = "
def turn():
    while True: time.sleep(.02)
go_on(turn)
";

/// What still runs is given up where one has won, and only that lives on.
pub fn first_success() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    write(&host, "one", "/tmp/file", b"21")?;
    // The first has ended by then.
    let double = "import time; time.sleep(1); n = int(open('/tmp/file').read()); open('/tmp/double', 'w').write(str(2 * n)); print(2 * n)";
    let arguments = [
        "explore",
        "one",
        "--name",
        "try",
        "--keep",
        "first-success",
        "-j",
        "3",
    ];
    let code = [
        "--lang",
        "python",
        "--",
        "raise SystemExit(3)",
        "--",
        double,
        "--",
        "while True: pass",
    ];
    let output = host.ok(&[&arguments[..], &code[..]].concat())?;
    for part in [
        "== 1 of 3: status 3,",
        "== 2 of 3: status 0,",
        "\n42\n",
        "== 3 of 3: given up",
        "== kept: try-2\n",
    ] {
        if !output.stdout.contains(part) {
            return Err(format!("{part:?} is not in {}", output.stdout).into());
        }
    }
    wait_for(|| Ok(host.ok(&["ls", "--quiet"])?.stdout == "one\ntry-2\n"))?;
    if read(&host, "try-2", "/tmp/double")? != b"42" {
        return Err("the child has lost its file".into());
    }
    host.run(&["cp", "one:/tmp/double", "/dev/null"])?
        .expect_status(2)?;
    Ok(())
}

/// The greatest number wins, a program that fails never; without a winner nothing lives on, and the status says so.
pub fn score() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let score = [
        "explore", "one", "--keep", "score", "--lang", "python", "--json", "--",
    ];
    let codes = [
        "print(1)",
        "--",
        "print('so'); print(2.5)",
        "--",
        "print(9); raise SystemExit(1)",
    ];
    let output = host.ok(&[&score[..], &codes[..]].concat())?;
    let events = output
        .stdout
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<serde_json::Value>, _>>()?;
    let [branched, results @ .., kept] = &events[..] else {
        return Err("no events".into());
    };
    let second = &branched["branched"]["children"][1]["name"];
    if results.len() != 3 || kept["kept"] != serde_json::json!([second]) {
        return Err(format!("another was kept: {}", output.stdout).into());
    }
    let kept = second.as_str().ok_or("no name")?.to_owned();
    wait_for(|| Ok(host.ok(&["ls", "--quiet"])?.stdout == format!("one\n{kept}\n")))?;
    host.ok(&["rm", "--force", &kept])?;
    let output = host.run(&[
        "explore",
        "one",
        "--keep",
        "first-success",
        "--",
        "false",
        "--",
        "no-such-program",
    ])?;
    output.expect_status(1)?;
    wait_for(|| Ok(host.ok(&["ls", "--quiet"])?.stdout == "one\n"))?;
    host.refused(
        &["explore", "one", "--", "true", "--", "--", "true"],
        &["nothing is between two --"],
    )
}

/// Where there are more than begin at once, those that wait for their turn leave the host's processors to others.
pub fn turns() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    python(&host, "one", RESTLESS)?;
    let processors = std::thread::available_parallelism()?.get();
    let mut explore = vec!["explore", "one", "-j", "1", "--json", "--", "sleep", "3"];
    for _ in 0..2 * processors {
        explore.extend(["--", "true"]);
    }
    let mut client = host.vmm(&explore).spawn()?;
    let mut lines = BufReader::new(client.stdout.take().ok_or("no standard output")?).lines();
    let mut next = || -> Result<serde_json::Value, Failed> {
        let line = lines.next().ok_or("too few events")??;
        Ok(serde_json::from_str(&line)?)
    };
    let branched = next()?;
    let children = branched["branched"]["children"].as_array();
    let last = children.and_then(|children| children.last());
    let name = last.and_then(|last| last["name"].as_str());
    let pid = host.pid(name.ok_or("no children")?)?;
    // Its monitor may have something to do still.
    sleep(Duration::from_millis(500));
    let before = processor_time(pid)?;
    sleep(Duration::from_secs(1));
    let used = processor_time(pid)? - before;
    if used > 0 {
        return Err(format!("it has used {used} ticks of a processor").into());
    }
    for _ in 0..=2 * processors {
        let result = next()?;
        if result["result"]["ended"]["status"] != 0 {
            return Err(format!("it did not run: {result}").into());
        }
    }
    client.wait()?;
    Ok(())
}

/// Whoever is killed, the client or the parent: the children go, too.
pub fn cut_short() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let explore = [
        "explore", "one", "--json", "--", "sleep", "1000", "--", "sleep", "1000",
    ];
    for kill_parent in [false, true] {
        let mut client = host.vmm(&explore).spawn()?;
        let mut line = String::new();
        BufReader::new(client.stdout.take().ok_or("no standard output")?).read_line(&mut line)?;
        if host.ok(&["ls", "--quiet"])?.stdout.lines().count() != 3 {
            return Err("the children are not listed".into());
        }
        if kill_parent {
            signal(host.pid("one")?, Signal::KILL)?;
        } else {
            client.kill()?;
        }
        client.wait()?;
        wait_for(|| Ok(host.ok(&["ls", "--quiet"])?.stdout == "one\n"))?;
        if !kill_parent {
            python(&host, "one", "print('alive')")?;
        }
    }
    Ok(())
}
