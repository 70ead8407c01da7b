//! Many guests of one snapshot: each is its own.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libtest_mimic::Failed;
use tests::sandboxes::Host;

use crate::guest::{GOES_ON, SHAPE, python, read, remove, start};

/// What no two guests may have in common, a word each.
const RANDOM: &str = "
import random, uuid
print(os.urandom(16).hex(), random.getrandbits(64), random.SystemRandom().getrandbits(64), uuid.uuid4(), uuid.uuid1())
";

fn unix_time() -> Result<f64, Failed> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// What a guest prints of [`RANDOM`], and after that its time of day and the time since its boot, in seconds.
fn ask(host: &Host, name: &str) -> Result<(String, f64, f64), Failed> {
    let printed = python(
        host,
        name,
        &format!("{RANDOM}print(time.time(), time.monotonic())"),
    )?;
    let (random, times) = printed
        .trim_end()
        .rsplit_once('\n')
        .ok_or("not two lines")?;
    let (time, uptime) = times.split_once(' ').ok_or("not two times")?;
    Ok((random.to_owned(), time.parse()?, uptime.parse()?))
}

/// Random numbers are new, the time of day is the host's, and time since the boot does not go back.
pub fn identity() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let uptime = String::from_utf8(read(&host, "one", "/proc/uptime")?)?;
    let before: f64 = uptime
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .parse()?;
    host.ok(&["snapshot", "one", "s"])?;
    let (mut printed, ..) = ask(&host, "one")?;
    remove(&host, &["one"])?;
    for (name, pages) in [("mapped", "map"), ("faulted", "fault")] {
        // A clock that goes on from the snapshot is wrong by this much and more.
        std::thread::sleep(Duration::from_secs(2));
        host.ok(&["restore", "s", name, "--pages", pages])?;
        let early = unix_time()?;
        let (random, time, uptime) = ask(&host, name)?;
        let late = unix_time()?;
        remove(&host, &[name])?;
        printed = format!("{printed} {random}");
        if time < early - 0.5 || time > late + 0.5 {
            return Err(format!("{name}: it is {time}, not between {early} and {late}").into());
        }
        if uptime < before {
            return Err(format!("{name}: up for {uptime} s, and had been for {before} s").into());
        }
    }
    let mut seen = HashSet::new();
    match printed.split_whitespace().find(|word| !seen.insert(*word)) {
        Some(twice) => Err(format!("{twice} came twice: {printed}").into()),
        None => Ok(()),
    }
}

/// A guest that boots has the right time, also where ticks were lost meanwhile; so nobody who goes on from it need set his clock.
pub fn time_of_a_boot() -> Result<(), Failed> {
    let host = Host::new()?;
    host.ok(&[&["start", "one", "--cold"], &SHAPE[..]].concat())?;
    let early = unix_time()?;
    let time: f64 = python(&host, "one", "print(time.time())")?.trim().parse()?;
    let late = unix_time()?;
    remove(&host, &["one"])?;
    if time < early - 0.1 || time > late + 0.1 {
        return Err(format!("it is {time}, not between {early} and {late}").into());
    }
    Ok(())
}

/// How many at once: a software KVM has the processors of the host for all of them. `BOUGH_TEST_COPIES` is for trying more.
const COPIES: usize = 8;

/// They start at once and work at once.
pub fn many() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    host.ok(&["snapshot", "one", "s"])?;
    remove(&host, &["one"])?;
    let copies = match std::env::var("BOUGH_TEST_COPIES") {
        Ok(count) => count.parse()?,
        Err(_) => COPIES,
    };
    let code = format!("{GOES_ON}{RANDOM}print(sum(range(100_001)))");
    let name = |n: usize| format!("copy{n}");
    let outputs = std::thread::scope(|scope| {
        let work = |n: usize| {
            let (host, code) = (&host, &code);
            move || {
                host.ok(&["restore", "s", &name(n)])
                    .map_err(|error| format!("{error:?}"))?;
                let exec = ["exec", &name(n), "--lang", "python", "-c", code];
                host.ok(&exec).map_err(|error| format!("{error:?}"))
            }
        };
        let threads: Vec<_> = (0..copies).map(|n| scope.spawn(work(n))).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|output| output.map_err(|_| "a thread panicked".to_owned())?)
            .collect::<Result<Vec<_>, String>>()
    })?;
    let mut seen = HashSet::new();
    for output in &outputs {
        let text = &output.stdout;
        let (random, sum) = text.trim_end().rsplit_once('\n').ok_or("not two lines")?;
        if sum != "5000050000" {
            return Err(format!("a wrong answer: {text}").into());
        }
        if let Some(twice) = random.split_whitespace().find(|word| !seen.insert(*word)) {
            return Err(format!("{twice} came twice").into());
        }
    }
    Ok(())
}
