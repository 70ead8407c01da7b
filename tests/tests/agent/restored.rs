//! What the agent does for a guest that goes on from a snapshot. Here it is a guest of its own, which loses its connections by that.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use libtest_mimic::Failed;
use tests::sandboxes::Host;
use vmm::agent::{AGENT_PORT, Agent, AgentError, ExecRequest, RestoredRequest};

use crate::guest::{ask, expect, renew_patience, shell, wait_until};

fn since_1970(time: SystemTime) -> Result<u64, Failed> {
    let nanos = time.duration_since(UNIX_EPOCH)?.as_nanos();
    Ok(u64::try_from(nanos)?)
}

pub fn identity() -> Result<(), Failed> {
    let host = Host::new()?;
    host.ok(&["start", "one"])?;
    let socket = host.dir("one")?.join("vsock.sock");
    let agent = Agent::connect(&socket, AGENT_PORT, None)?;
    renew_patience(&agent);

    // Another client's program, which goes on when it is told to.
    let other = Agent::connect(&socket, AGENT_PORT, None)?;
    renew_patience(&other);
    ask(&agent, "mkfifo /run/go")?;
    let mut program = other.start(ExecRequest {
        user: "root".into(),
        ..shell("read line </run/go; echo heard; echo $line >/run/heard")
    })?;
    let pid = program.pid()?;

    let later = SystemTime::now() + Duration::from_secs(1_000_000);
    let request = RestoredRequest {
        child: None,
        entropy: (0..64).collect(),
        realtime_ns: since_1970(later)?,
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        hostname: "copy-7".into(),
    };
    agent.restored(request.clone())?;
    let lost = other.ping();
    expect(matches!(lost, Err(AgentError::Disconnected)), lost)?;
    ask(&agent, &format!("kill -0 {pid}; echo word >/run/go"))?;
    wait_until(Instant::now(), || {
        Ok(ask(&agent, "cat /run/heard || true")? == "word\n")
    })?;
    // Nothing is left of it but what it did; the other group is that of the one who asks.
    let look = format!("ls -d /sys/fs/cgroup/exec-* | wc -l; [ -d /proc/{pid} ] || echo reaped");
    wait_until(Instant::now(), || {
        // It is removed while nothing happens.
        sleep(Duration::from_millis(300));
        Ok(ask(&agent, &look)? == "1\nreaped\n")
    })?;

    let told = ask(&agent, "cat /etc/machine-id; hostname; date +%s")?;
    let mut lines = told.lines();
    expect(lines.next() == Some(&request.machine_id), &told)?;
    expect(lines.next() == Some("copy-7"), &told)?;
    let date: u64 = lines.next().unwrap_or_default().parse()?;
    let set = request.realtime_ns / 1_000_000_000;
    expect((set..set + 300).contains(&date), (set, date))?;
    // The agent counts on its length.
    let changes =
        "exec 2>/dev/null; true >/etc/machine-id || echo kept; rm -f /etc/machine-id || echo kept";
    let told = ask(&agent, changes)?;
    expect(told == "kept\nkept\n", told)?;

    // What cannot be changes nothing, and the connection is none the worse for it.
    let wrong = RestoredRequest {
        hostname: "no name".into(),
        realtime_ns: 1,
        ..request.clone()
    };
    match agent.restored(wrong) {
        Err(AgentError::Refused { message, .. }) => expect(message.contains("hostname"), message)?,
        other => expect(false, other)?,
    }
    let told = ask(&agent, "hostname; date +%s")?;
    let mut lines = told.lines();
    expect(lines.next() == Some("copy-7"), &told)?;
    let date: u64 = lines.next().unwrap_or_default().parse()?;
    expect((set..set + 300).contains(&date), (set, date))?;

    // The names stay as they are where none is given; the other cases want the time that it is.
    let back = RestoredRequest {
        realtime_ns: since_1970(SystemTime::now())?,
        machine_id: String::new(),
        hostname: "bough".into(),
        ..request
    };
    agent.restored(back)?;
    let told = ask(&agent, "cat /etc/machine-id; hostname")?;
    expect(told == "0123456789abcdef0123456789abcdef\nbough\n", told)
}
