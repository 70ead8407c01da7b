//! A guest that goes on from a snapshot becomes itself: its own random numbers, the time that it is, its own names.
//!
//! Everything is checked before anything is done. It comes before any work of the restored guest, so each system call
//! here is time that its user waits; what can be done ahead, while the guest boots, is.

use guest_agent::proto::{ErrorCode, Restored};
use rustix::fs::{Mode, OFlags, open};
use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_settime};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::failure::Failure;
use crate::sys;

/// How many random bytes a guest starts anew from: at least what the kernel's key has, at most what is sensible.
const ENTROPY: std::ops::RangeInclusive<usize> = 32..=512;

/// The longest host name that the kernel takes, in bytes.
const MAX_HOSTNAME: usize = 64;

const MACHINE_ID: &str = "/etc/machine-id";

/// The kernel's random numbers. It is never closed: that would cost a grace period of RCU, each time.
#[derive(Default)]
pub struct Random(Option<OwnedFd>);

impl Random {
    /// Opens it if it is not open.
    ///
    /// # Errors
    /// A failure that names the file.
    pub fn open(&mut self) -> Result<BorrowedFd<'_>, Failure> {
        let device = match self.0.take() {
            Some(device) => device,
            None => open(
                "/dev/urandom",
                OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(|errno| Failure::internal("open /dev/urandom", errno))?,
        };
        let device: &OwnedFd = self.0.insert(device);
        Ok(device.as_fd())
    }
}

/// Does what the request says.
///
/// # Errors
/// A field that cannot be, by name, or a system call that failed. The guest is not to be used then.
pub fn restored(request: &Restored, random: &mut Random) -> Result<(), Failure> {
    let time = check(request).map_err(|what| Failure::new(ErrorCode::InvalidArgument, what))?;

    sys::reseed(random.open()?, &request.entropy)
        .map_err(|errno| Failure::internal("add entropy to /dev/urandom", errno))?;
    clock_settime(ClockId::Realtime, time)
        .map_err(|errno| Failure::internal("clock_settime", errno))?;
    if !request.machine_id.is_empty() {
        std::fs::write(MACHINE_ID, format!("{}\n", request.machine_id))
            .map_err(|error| Failure::internal(MACHINE_ID, error))?;
    }
    if !request.hostname.is_empty() {
        sethostname(request.hostname.as_bytes())
            .map_err(|errno| Failure::internal("sethostname", errno))?;
    }
    Ok(())
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
    let is_hexadecimal = id
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !id.is_empty() && (id.len() != 32 || !is_hexadecimal) {
        return Err("machine_id is not 32 hexadecimal digits in lower case".to_owned());
    }
    let name = &request.hostname;
    if name.len() > MAX_HOSTNAME || name.contains(|c: char| c.is_control() || c == ' ') {
        return Err(format!(
            "hostname is no name of at most {MAX_HOSTNAME} bytes"
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
    use super::*;

    fn good() -> Restored {
        Restored {
            entropy: vec![1; 64],
            realtime_ns: 1_700_000_000_123_456_789,
            machine_id: "0123456789abcdef".repeat(2),
            hostname: "copy-1".into(),
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
    }
}
