//! A guest that goes on from a snapshot becomes itself: its own random numbers, the time that it is, its own names.
//!
//! Everything is checked before anything is done. It comes before any work of the restored guest, so each system call
//! here is time that its user waits; what can be done ahead, while the guest boots, is.

use guest_agent::proto::{ErrorCode, Restored};
use rustix::fs::{Mode, OFlags, open};
use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_settime};
use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::failure::Failure;
use crate::machine_id::{MachineId, is_id};
use crate::sys;

/// How many random bytes a guest starts anew from: at least what the kernel's key has, at most what is sensible.
const ENTROPY: std::ops::RangeInclusive<usize> = 32..=512;

/// How far from the time that a request tells the clock may be and stay, in nanoseconds. To set it is 3,000 instructions of the kernel, and makes it late by what the
/// request took to come. The host lets the clock of a child go on from its parent's, which may have been set so; and where many are told at once, each request takes longer.
const TOLERANCE: std::ops::RangeInclusive<i64> = -100_000_000..=500_000_000;

/// The longest host name that the kernel takes, in bytes.
const MAX_HOSTNAME: usize = 64;

/// Does what the request says, but for random numbers where the kernel `is_seeded` with others already.
///
/// # Errors
/// A field that cannot be, by name, or a system call that failed. The guest is not to be used then.
pub fn restored(
    request: &Restored,
    is_seeded: bool,
    machine_id: &mut MachineId,
) -> Result<(), Failure> {
    let time = check(request).map_err(|what| Failure::new(ErrorCode::InvalidArgument, what))?;

    if !is_seeded {
        open(
            "/dev/urandom",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|device| sys::reseed(device.as_fd(), &request.entropy))
        .map_err(|errno| Failure::internal("add entropy to /dev/urandom", errno))?;
    }
    if !is_right(now(), time) {
        clock_settime(ClockId::Realtime, time)
            .map_err(|errno| Failure::internal("clock_settime", errno))?;
    }
    if !request.machine_id.is_empty() {
        machine_id
            .set(&request.machine_id)
            .map_err(|errno| Failure::internal("the machine id", errno))?;
    }
    if !request.hostname.is_empty() {
        sethostname(request.hostname.as_bytes())
            .map_err(|errno| Failure::internal("sethostname", errno))?;
    }
    Ok(())
}

/// What the clock shows. Of two ways to it, this one has been used before: the first use of the other is 10,000 instructions of the kernel.
fn now() -> Timespec {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.unwrap_or_default();
    Timespec {
        tv_sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: since.subsec_nanos().into(),
    }
}

/// Whether a clock that shows `now` is as right as setting it to `time` could make it, which was the time when the request was sent.
fn is_right(now: Timespec, time: Timespec) -> bool {
    let seconds = now.tv_sec.saturating_sub(time.tv_sec);
    let nanos = seconds.saturating_mul(1_000_000_000);
    let late = nanos.saturating_add(now.tv_nsec.saturating_sub(time.tv_nsec));
    TOLERANCE.contains(&late)
}

fn is_word(name: &str) -> bool {
    (1..=MAX_HOSTNAME).contains(&name.len()) && !name.contains(|c: char| c.is_control() || c == ' ')
}

/// The time, if all fields can be.
fn check(request: &Restored) -> Result<Timespec, String> {
    let entropy = request.entropy.len();
    if !ENTROPY.contains(&entropy) {
        return Err(format!(
            "entropy has {entropy} bytes, and must have {} to {}",
            ENTROPY.start(),
            ENTROPY.end()
        ));
    }
    let id = &request.machine_id;
    if !id.is_empty() && !is_id(id.as_bytes()) {
        return Err("machine_id is not 32 hexadecimal digits in lower case".to_owned());
    }
    let name = &request.hostname;
    if !name.is_empty() && !is_word(name) {
        return Err(format!(
            "hostname is no name of at most {MAX_HOSTNAME} bytes"
        ));
    }
    let child = request.child.as_ref();
    if child.is_some_and(|child| !is_word(&child.name)) {
        return Err(format!(
            "child.name is no word of at most {MAX_HOSTNAME} bytes"
        ));
    }
    let nanos = i64::try_from(request.realtime_ns)
        .ok()
        .filter(|&nanos| nanos > 0);
    let nanos = nanos.ok_or("realtime_ns is no time of day")?;
    Ok(Timespec {
        tv_sec: nanos / 1_000_000_000,
        tv_nsec: nanos % 1_000_000_000,
    })
}

#[cfg(test)]
mod tests {
    use guest_agent::proto::Child;

    use super::*;

    #[test]
    fn a_clock_is_set_where_it_is_off() {
        let at = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        let time = at(1_700_000_000, 5_000_000);
        assert!(is_right(time, time));
        assert!(is_right(at(1_700_000_000, 504_000_000), time));
        assert!(is_right(at(1_699_999_999, 906_000_000), time));
        for off in [
            at(1_700_000_000, 506_000_000),
            at(1_700_000_001, 5_000_000),
            at(1_699_999_999, 904_000_000),
            at(i64::MIN, 0),
            at(i64::MAX, 999_999_999),
        ] {
            assert!(!is_right(off, time), "{off:?}");
        }
    }

    fn good() -> Restored {
        Restored {
            entropy: vec![1; 64],
            realtime_ns: 1_700_000_000_123_456_789,
            machine_id: "0123456789abcdef".repeat(2),
            hostname: "copy-1".into(),
            child: Some(Child {
                ask: 1,
                index: 1,
                name: "copy-1".into(),
            }),
        }
    }

    #[test]
    fn fields_that_can_be_are_taken() {
        let time = check(&good()).unwrap();
        assert_eq!((time.tv_sec, time.tv_nsec), (1_700_000_000, 123_456_789));
        let unnamed = Restored {
            machine_id: String::new(),
            hostname: String::new(),
            ..good()
        };
        assert!(check(&unnamed).is_ok());
    }

    #[test]
    fn fields_that_cannot_be_are_named() {
        let with = |change: fn(&mut Restored)| {
            let mut request = good();
            change(&mut request);
            check(&request).unwrap_err()
        };
        assert!(with(|r| r.entropy.truncate(31)).contains("entropy"));
        assert!(with(|r| r.entropy.resize(513, 0)).contains("entropy"));
        assert!(with(|r| r.realtime_ns = 0).contains("realtime_ns"));
        assert!(with(|r| r.realtime_ns = u64::MAX).contains("realtime_ns"));
        assert!(with(|r| r.machine_id.push('0')).contains("machine_id"));
        assert!(with(|r| r.machine_id = "A".repeat(32)).contains("machine_id"));
        assert!(with(|r| r.machine_id = "../".repeat(8)).contains("machine_id"));
        assert!(with(|r| r.hostname = "x".repeat(65)).contains("hostname"));
        assert!(with(|r| r.hostname = "a\nb".into()).contains("hostname"));
        for name in ["", "a b", "a\nchild"] {
            let mut request = good();
            request.child = request.child.map(|child| Child {
                name: name.into(),
                ..child
            });
            assert!(check(&request).unwrap_err().contains("child.name"));
        }
    }
}
