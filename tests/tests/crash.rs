//! What a snapshot leaves behind that is cut short at any of its calls to the system: a full disk, a broken one, a kill.
//!
//! Whatever happens, all earlier snapshots verify, there is no half of a new one, the sandbox lives on or is gone, and the next
//! snapshot works and leaves no draft. Calls of one kind are sampled; with `BOUGH_CRASH=all` each is hit, with each fault, and a table is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use libtest_mimic::Failed;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use tests::Needs::TracedGuest;
use tests::sandboxes::{Host, is_alive, process_state, signal, wait_for};
use tests::strace::{Fault, Tracer, What};
use tests::{Output, test};

/// The calls that change or make something, or wait for it.
const CALLS: [&str; 17] = [
    "clone",
    "flock",
    "fsync",
    "ftruncate",
    "lseek",
    "mkdir",
    "openat",
    "pidfd_open",
    "pipe2",
    "pread64",
    "pwrite64",
    "read",
    "rename",
    "sendto",
    "unlink",
    "waitid",
    "write",
];
/// The first call that the process that writes the memory makes and the monitor does not.
const WRITERS_OWN: &str = "close_range";
/// What may happen to each.
const WHATS: [What; 3] = [What::Full, What::Io, What::Kill];
/// Differences that are saved of one sandbox before another takes its place: chains have a limit.
const DEPTH: usize = 24;

fn main() -> ExitCode {
    let stage = Arc::new(Mutex::new(None));
    let on_stage = |name: &str, run: fn(&mut Stage) -> Result<(), Failed>| {
        let stage = Arc::clone(&stage);
        test(name, TracedGuest, move || {
            let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
            let stage = match &mut *stage {
                Some(stage) => stage,
                none => none.insert(Stage::new()?),
            };
            run(stage)
        })
    };
    let tests = vec![
        on_stage("a_writer_that_hangs_holds_up_nobody", hang),
        on_stage("faults_while_a_booted_sandbox_is_saved", |stage| {
            stage.matrix(Kind::Booted)
        }),
        on_stage("faults_while_a_restored_sandbox_is_saved", |stage| {
            stage.matrix(Kind::Restored)
        }),
    ];
    drop(stage);
    tests::main(tests)
}

/// What is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// All of a machine.
    Booted,
    /// What differs from the snapshot that it was restored from.
    Restored,
}

/// Whose call is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    /// The monitor's thread that serves the request.
    Monitor,
    /// The process that writes the memory.
    Writer,
}

/// A guest that was booted once, with a disk that it can write to, and its snapshot `base`.
struct Stage {
    host: Host,
    /// The monitor of the booted sandbox.
    booted: u64,
    /// The id of `base`.
    base: String,
    /// Sandboxes that were restored.
    restored: usize,
}

/// The sandbox that is saved.
struct Victim {
    name: String,
    pid: u64,
    kind: Kind,
    taken: usize,
}

impl Stage {
    fn new() -> Result<Self, Failed> {
        let host = Host::new()?;
        let disk = host.path().join("disk");
        File::create(&disk)?.set_len(1 << 20)?;
        host.ok(&["start", "--drive", &disk.to_string_lossy(), "booted"])?;
        let write = "echo of the first day | dd of=/dev/vda conv=fsync";
        host.ok(&["exec", "booted", "--user", "root", "--", "sh", "-c", write])?;
        let write = "echo from the first day > /tmp/note";
        host.ok(&["exec", "booted", "--", "sh", "-c", write])?;
        let base = host.ok(&["snapshot", "booted", "base"])?.stdout;
        Ok(Self {
            booted: host.pid("booted")?,
            base: base.trim().to_owned(),
            host,
            restored: 0,
        })
    }

    /// The booted sandbox as long as it lives, then one that was restored, of which all is saved too.
    fn victim(&mut self, kind: Kind) -> Result<Victim, Failed> {
        let name = if kind == Kind::Booted && is_alive(self.booted) {
            "booted".to_owned()
        } else {
            self.restored += 1;
            let name = format!("restored-{}", self.restored);
            self.host.ok(&["restore", "base", &name])?;
            name
        };
        let pid = self.host.pid(&name)?;
        Ok(Victim {
            name,
            pid,
            kind,
            taken: 0,
        })
    }

    /// Begins a snapshot.
    fn begin(&self, victim: &Victim) -> JoinHandle<Result<Output, String>> {
        let mut words = vec!["snapshot", &victim.name];
        if victim.kind == Kind::Booted {
            words.push("--full");
        }
        let vmm = self.host.vmm(&words);
        std::thread::spawn(move || vmm.run().map_err(|error| format!("{error:?}")))
    }

    /// Takes a snapshot that nothing happens to. Returns its id.
    fn snapshot(&self, victim: &mut Victim) -> Result<String, Failed> {
        let output = finish(self.begin(victim))?;
        output.expect_status(0)?;
        victim.taken += 1;
        Ok(output.stdout.trim().to_owned())
    }

    /// Removes what nobody needs any more: full snapshots take their time to verify.
    fn tidy(&self, newest: &str) -> Result<(), Failed> {
        for name in self.store()? {
            if name != newest && name != self.base {
                self.host.ok(&["snap", "rm", &name])?;
            }
        }
        Ok(())
    }

    /// What lies in the store, besides its lock.
    fn store(&self) -> Result<BTreeSet<String>, Failed> {
        let entries = fs::read_dir(self.host.data().join("snapshots"))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: BTreeSet<String> = names.collect::<Result<_, Failed>>()?;
        Ok(names.into_iter().filter(|name| name != "lock").collect())
    }

    /// Begins a snapshot and returns when its writer has stopped, before it has done anything.
    fn begin_with_stopped_writer(
        &self,
        victim: &Victim,
    ) -> Result<(JoinHandle<Result<Output, String>>, u64), Failed> {
        let stop = Fault {
            call: WRITERS_OWN,
            nth: 1,
            what: What::Stop,
        };
        let tracer = Tracer::attach(victim.pid, &[], &[stop])?;
        let snapshot = self.begin(victim);
        let stopped = |log: &str| {
            let line = log
                .lines()
                .find(|line| line.contains("stopped by SIGSTOP"))?;
            line.split(' ').next()?.parse::<u64>().ok()
        };
        wait_for(|| Ok(stopped(&tracer.log()?).is_some() || snapshot.is_finished()))?;
        let writer = stopped(&tracer.detach()?).ok_or("the writer was not stopped")?;
        wait_for(|| Ok(process_state(writer) == Some('T')))?;
        Ok((snapshot, writer))
    }

    /// How often each call is made, by whom.
    fn count(&self, victim: &mut Victim) -> Result<BTreeMap<(Who, &'static str), usize>, Failed> {
        // The second of a restored sandbox is as small as any later one.
        self.snapshot(victim)?;
        let mut calls = CALLS.to_vec();
        calls.push(WRITERS_OWN);
        let tracer = Tracer::attach(victim.pid, &calls, &[])?;
        self.snapshot(victim)?;
        let log = tracer.detach()?;
        let lines: Vec<(&str, &str)> = log
            .lines()
            .filter_map(|line| {
                let (thread, rest) = line.split_once(' ')?;
                Some((thread, rest.trim_start().split_once('(')?.0))
            })
            .collect();
        let thread_that = |call| Some(lines.iter().find(|line| line.1 == call)?.0);
        let monitor = thread_that("rename").ok_or("nobody renames anything")?;
        let writer = thread_that(WRITERS_OWN).ok_or("there is no writer")?;
        let mut counts = BTreeMap::new();
        for (thread, call) in lines {
            let who = match thread {
                _ if thread == monitor => Who::Monitor,
                _ if thread == writer => Who::Writer,
                _ => continue,
            };
            // The C library's allocator reads a setting now and then.
            if (who, call) == (Who::Writer, "read") {
                continue;
            }
            if let Some(call) = CALLS.into_iter().find(|known| *known == call) {
                *counts.entry((who, call)).or_default() += 1;
            }
        }
        Ok(counts)
    }

    fn matrix(&mut self, kind: Kind) -> Result<(), Failed> {
        let all = std::env::var("BOUGH_CRASH").is_ok_and(|value| value == "all");
        let mut victim = self.victim(kind)?;
        let mut counts = self.count(&mut victim)?;
        let mut cases = Vec::new();
        for (&(who, call), &count) in &counts {
            for nth in sample(count, if all { 24 } else { 2 }) {
                let whats = match &WHATS {
                    // The answer: it is taken then, and only who asked does not know.
                    _ if call == "sendto" => &[What::Kill][..],
                    whats if all => whats,
                    // One in turn, another for the other kind.
                    whats => whats[(cases.len() + kind as usize) % 3..].split_at(1).0,
                };
                cases.extend(whats.iter().map(|&what| (who, Fault { call, nth, what })));
            }
        }
        // Those that the booted sandbox survives come first.
        cases.sort_by_key(|(who, fault)| (*who, fault.what) == (Who::Monitor, What::Kill));
        for (who, fault) in cases {
            if kind == Kind::Restored && victim.taken >= DEPTH {
                self.host.ok(&["rm", "--force", &victim.name])?;
                victim = self.victim(kind)?;
            }
            let outcome = self
                .case(&mut victim, who, fault)
                .map_err(|error| format!("{kind:?}, {who:?}, {fault}: {error:?}"))?;
            if outcome.is_some() {
                counts.remove(&(who, fault.call));
            }
            if all {
                let outcome = outcome.as_deref().unwrap_or("not met");
                println!("{kind:?}\t{who:?}\t{fault}\t{outcome}");
            }
        }
        if !counts.is_empty() {
            return Err(format!("no fault of these was met: {counts:?}").into());
        }
        self.still_right(&victim)
    }

    /// One snapshot that meets `fault`, and the next. Returns what became of the first; nothing where there was less to read or write this time, and
    /// it did not come to that call, or the writer came to it in place of the monitor.
    fn case(
        &mut self,
        victim: &mut Victim,
        who: Who,
        fault: Fault,
    ) -> Result<Option<String>, Failed> {
        let before = self.store()?;
        let (output, log) = match who {
            Who::Monitor => {
                let tracer = Tracer::attach(victim.pid, &[], &[fault])?;
                (finish(self.begin(victim))?, tracer.detach()?)
            }
            Who::Writer => {
                let (snapshot, writer) = self.begin_with_stopped_writer(victim)?;
                let tracer = Tracer::attach(writer, &[], &[fault])?;
                signal(writer, Signal::CONT)?;
                (finish(snapshot)?, tracer.detach()?)
            }
        };
        let hit = log.contains(match fault.what {
            What::Kill => "killed by SIGKILL",
            _ => "(INJECTED)",
        });
        if !hit && output.status == Some(0) {
            victim.taken += 1;
            return Ok(None);
        }
        if !hit {
            return Err(format!("the fault was not met: {output:?}\n{log}").into());
        }
        let left: BTreeSet<_> = self.store()?.difference(&before).cloned().collect();
        let aimed_at_monitor = (who, fault.what) == (Who::Monitor, What::Kill);
        // Calls are counted for each thread: the writer may have come to that number first.
        let monitor = victim.pid.to_string();
        let died = |line: &str| {
            line.split_once(' ').is_some_and(|(process, rest)| {
                process == monitor && rest.trim_start().starts_with("+++ killed by SIGKILL")
            })
        };
        let killed = aimed_at_monitor && log.lines().any(died);
        let (drafts, whole): (Vec<_>, Vec<_>) =
            left.iter().partition(|name| name.starts_with("tmp-"));
        if output.status == Some(0) {
            output.expect_no_stderr()?;
            victim.taken += 1;
            if !drafts.is_empty() || whole.len() != 1 {
                return Err(format!("it was taken, and there are {left:?}").into());
            }
        } else {
            output.expect_one_line()?;
            if !killed && !left.is_empty() || left.len() > 1 {
                return Err(format!("{output:?} left {left:?}").into());
            }
        }
        self.host.ok(&["snap", "verify", "--all"])?;
        if killed {
            wait_for(|| Ok(!is_alive(victim.pid)))?;
            wait_for(|| Ok(self.host.run(&["rm", &victim.name])?.status == Some(0)))?;
            wait_for(|| self.is_unlocked())?;
            *victim = self.victim(victim.kind)?;
            if fault.nth.is_multiple_of(2) {
                self.host.ok(&["snap", "gc"])?;
                self.expect_no_draft()?;
            }
        } else if self.host.inspect(&victim.name)?["state"] != "running" {
            return Err("the sandbox does not run".into());
        }
        let newest = self.snapshot(victim)?;
        self.expect_no_draft()?;
        self.host.ok(&["snap", "verify", "--all"])?;
        if victim.kind == Kind::Booted {
            self.tidy(&newest)?;
        }
        let fate = match (output.status, &whole[..]) {
            (Some(0), _) => "taken all the same".to_owned(),
            (_, []) => output.stderr.trim().to_owned(),
            _ => format!("{} (it is whole)", output.stderr.trim()),
        };
        Ok((killed || !aimed_at_monitor).then_some(fate))
    }

    /// Whether nobody holds a draft any more: a killed process is seen dead a moment before its files are closed.
    fn is_unlocked(&self) -> Result<bool, Failed> {
        for name in self.store()? {
            let lock = self.host.data().join("snapshots").join(&name).join("lock");
            if name.starts_with("tmp-")
                && let Ok(lock) = File::open(lock)
                && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn expect_no_draft(&self) -> Result<(), Failed> {
        match self.store()?.iter().find(|name| name.len() != 64) {
            None => Ok(()),
            Some(name) => Err(format!("{name} is still there").into()),
        }
    }

    /// The sandbox, and what is restored from its last snapshot, have what the guest wrote, and work.
    fn still_right(&mut self, victim: &Victim) -> Result<(), Failed> {
        let read = |name: &str| {
            self.host
                .ok(&["exec", name, "--", "cat", "/tmp/note"])?
                .expect_stdout("from the first day\n")?;
            Ok::<_, Failed>(())
        };
        read(&victim.name)?;
        self.host.ok(&["snapshot", &victim.name, "last"])?;
        self.host.ok(&["restore", "last", "again"])?;
        read("again")?;
        self.host.ok(&["rm", "--force", "again"])?;
        Ok(())
    }
}

/// At most `most` of 1 to `count`: the first, the last, and some between.
fn sample(count: usize, most: usize) -> BTreeSet<usize> {
    let steps = count.min(most);
    (0..steps)
        .map(|step| 1 + step * (count - 1) / (steps - 1).max(1))
        .collect()
}

fn finish(snapshot: JoinHandle<Result<Output, String>>) -> Result<Output, Failed> {
    Ok(snapshot.join().map_err(|_| "the caller panicked")??)
}

/// The snapshot waits for its writer; everything else goes on, and so does the snapshot when the writer does.
fn hang(stage: &mut Stage) -> Result<(), Failed> {
    let victim = stage.victim(Kind::Restored)?;
    let (snapshot, writer) = stage.begin_with_stopped_writer(&victim)?;
    let host = &stage.host;
    host.ok(&["pause", &victim.name])?;
    host.ok(&["resume", &victim.name])?;
    host.ok(&["exec", &victim.name, "--", "true"])?;
    host.ok(&["snap", "verify", "--all"])?;
    // Its draft is not taken for one that was left behind.
    host.ok(&["snap", "gc"])?;
    if snapshot.is_finished() {
        return Err("the snapshot did not wait".into());
    }
    signal(writer, Signal::CONT)?;
    finish(snapshot)?.expect_status(0)?;
    let (snapshot, writer) = stage.begin_with_stopped_writer(&victim)?;
    stage.host.ok(&["stop", &victim.name])?;
    let output = finish(snapshot)?;
    output.expect_one_line()?;
    wait_for(|| Ok(!is_alive(writer)))?;
    wait_for(|| stage.is_unlocked())?;
    stage.host.ok(&["snap", "gc"])?;
    stage.expect_no_draft()
}
