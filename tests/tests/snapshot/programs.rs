//! Programs of clients, in copies that have no such client: they run on, and nobody hears of them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libtest_mimic::Failed;
use tests::sandboxes::{Host, wait_for};
use vmm::agent::{AGENT_PORT, Agent, RestoredRequest};

use crate::guest::{GOES_ON, SHAPE, remove, start, wait_for_growth, words};

/// Counts in a file, and on its standard output, with so much besides that it would soon wait for somebody who reads.
const COUNTER: &str = "
n = words('/tmp/count', 1)
while True:
    n[0] += 1
    look()
    print(n[0], '.' * 20_000, flush=True)
    time.sleep(.1)
";

/// What takes a counter further than its client's credit and its pipe go, which is 16 steps.
const FAR: u64 = 30;

/// A counter that a client runs, and the last number that this client was told.
struct Counter {
    client: Child,
    told: Arc<AtomicU64>,
}

impl Counter {
    /// Runs it in the sandbox `name`; `look` is what it does at each step.
    fn start(host: &Host, name: &str, look: &str) -> Result<Self, Failed> {
        let code = format!("{GOES_ON}{look}{COUNTER}");
        let client = host.vmm(&["exec", name, "--lang", "python", "-c", &code]);
        let mut client = client.spawn()?;
        let stdout = client.stdout.take().ok_or("no standard output")?;
        let told = Arc::new(AtomicU64::new(0));
        let last = told.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let number = line.split(' ').next().and_then(|word| word.parse().ok());
                last.store(number.unwrap_or(0), Ordering::Relaxed);
            }
        });
        let counter = Self { client, told };
        counter.wait_for_client()?;
        Ok(counter)
    }

    /// Waits until its client is told more.
    fn wait_for_client(&self) -> Result<(), Failed> {
        let told = || self.told.load(Ordering::Relaxed);
        let before = told();
        wait_for(|| Ok(told() >= before + 3))
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// A program runs on in a copy, and in a copy of that, while the one that was saved goes on for its client, and ends with it.
pub fn run_on() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let counter = Counter::start(&host, "one", "look = int\n")?;
    host.ok(&["snapshot", "one", "s"])?;
    counter.wait_for_client()?;
    host.ok(&["restore", "s", "copy"])?;
    wait_for_growth(&host, "copy", "/tmp/count", FAR)?;
    host.ok(&["snapshot", "copy", "t"])?;
    host.ok(&["restore", "t", "second", "--pages", "fault"])?;
    wait_for_growth(&host, "second", "/tmp/count", FAR)?;
    counter.wait_for_client()?;

    drop(counter);
    wait_for(|| {
        let before = words(&host, "one", "/tmp/count")?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(words(&host, "one", "/tmp/count")? == before)
    })?;
    wait_for_growth(&host, "copy", "/tmp/count", 3)?;
    // It keeps no guest from ending.
    host.ok(&["stop", "copy"])?;
    remove(&host, &["one", "copy", "second"])
}

/// So it does where the agent's own connection, by vsock, could not be kept, as the guest has a second one to that port: then all are gone at once.
pub fn all_lost() -> Result<(), Failed> {
    let host = Host::new()?;
    host.ok(&[&["start", "one", "--no-lane"], &SHAPE[..]].concat())?;
    // The monitor has listened there until the agent called.
    let socket = host.dir("one")?.join("vsock.sock_1024");
    fs::remove_file(&socket)?;
    let _listener = UnixListener::bind(socket)?;
    // What becomes of the connection: the error of reading, or 1 for its end.
    let look = "
import _socket
s = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
s.connect((2, 1024))
s.setblocking(False)
def look():
    try:
        if not n[1]: n[1] = len(s.recv(1)) + 1
    except BlockingIOError: pass
    except OSError as error: n[1] = error.errno
";
    let counter = Counter::start(&host, "one", look)?;
    host.ok(&["snapshot", "one", "s"])?;
    counter.wait_for_client()?;
    host.ok(&["restore", "s", "copy"])?;
    wait_for_growth(&host, "copy", "/tmp/count", FAR)?;
    let [_, lost] = words(&host, "copy", "/tmp/count")?;
    let [_, kept] = words(&host, "one", "/tmp/count")?;
    // ENOTCONN: no end, and none that the original knows of.
    if (lost, kept) != (107, 0) {
        return Err(
            format!("the connection ended by {lost}, that of the original by {kept}").into(),
        );
    }
    drop(counter);
    remove(&host, &["one", "copy"])
}

/// An agent whose lane is in use as it is saved is told in the copy that it has lost it, and calls on it again. Here its host is this test, which the
/// monitor knows nothing of.
pub fn lane_lost() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let dir = host.dir("one")?;
    fs::remove_file(dir.join("vsock.sock_1024"))?;
    let listener = UnixListener::bind(dir.join("vsock.sock_1024"))?;
    let agent = Agent::connect(&dir.join("vsock.sock"), AGENT_PORT, None)?;
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    agent.restored(RestoredRequest {
        entropy: vec![7; 64],
        realtime_ns: u64::try_from(since_1970)?,
        ..RestoredRequest::default()
    })?;
    let (mut stream, _) = listener.accept()?;
    let link = Agent::from_stream(stream.try_clone()?, None)?;
    // The agent has taken its greeting: only then does it call again.
    link.ping()?;
    // Half of a frame.
    stream.write_all(&[5])?;
    host.ok(&["snapshot", "one", "s"])?;
    host.ok(&["restore", "s", "copy"])?;
    let interrupts = host.ok(&["exec", "copy", "--", "cat", "/proc/interrupts"])?;
    let counts = |line: &str| {
        line.split_whitespace()
            .skip(1)
            .any(|word| word.parse::<u64>().is_ok_and(|count| count > 0))
    };
    let told = |line: &str| line.ends_with("lane") && counts(line);
    if !interrupts.stdout.lines().any(told) {
        return Err(format!("the lane was not used: {}", interrupts.stdout).into());
    }
    // The one that was saved has it still: this ends the frame, and the next is answered.
    stream.write_all(&[0, 0, 0, 8, 0x89, 0, 0x1a, 0])?;
    link.ping()?;
    remove(&host, &["one", "copy"])
}
