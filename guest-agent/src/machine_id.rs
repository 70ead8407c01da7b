//! The guest's machine id (machine-id(5)), which is another one in each copy of the guest.
//!
//! Its file is the agent's, mapped, and mounted over the one in /etc: so to change it is a store to memory, where to write a file is 2,000 instructions of
//! the kernel that whoever asked for the copy waits for. The mount is read-only, as systemd's is for an id that is not to stay, and no other name leads to the
//! file: only root, who can mount it anew, can cut it short under the mapping, and so ends this guest as by a reboot.
#![allow(unsafe_code)]

use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags, ftruncate, open, unlink};
use rustix::io::{Errno, read};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use rustix::rand::{GetRandomFlags, getrandom};

const PATH: &str = "/etc/machine-id";

/// The agent's file, until it is mounted.
const OWN: &str = "/run/bough/machine-id";

/// Hexadecimal digits of an id, which is them and the end of the line.
const DIGITS: usize = 32;
const LINE: usize = DIGITS + 1;

/// The machine id, once it is mounted.
#[derive(Default)]
pub struct MachineId {
    mapped: Option<Mapping>,
}

impl MachineId {
    /// Mounts the agent's file where the id is looked for, with the id that the image has there; the guest gets one where it has none. One that has no place
    /// for an id stays without.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn mount(&mut self) -> Result<(), Errno> {
        if self.mapped.is_some() {
            return Ok(());
        }
        let mode = Mode::from_raw_mode(0o444);
        let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::CLOEXEC;
        let image = match open(PATH, flags, mode) {
            Err(Errno::ROFS | Errno::NOENT) => return Ok(()),
            image => image?,
        };
        let mut line = [0; LINE + 1];
        let length = read(&image, &mut line)?;
        let id = match line.get(..length) {
            Some([digits @ .., b'\n']) if is_id(digits) => digits.to_vec(),
            _ => random_id()?,
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let own = open(OWN, flags, mode)?;
        ftruncate(&own, LINE as u64)?;
        rustix::io::pwrite(&own, b"\n", DIGITS as u64)?;
        let mapping = Mapping::new(&own)?;
        mapping.store(&id);
        mount_bind(OWN, PATH)?;
        let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let closed = mount_remount(PATH, MountFlags::BIND | MountFlags::RDONLY | safe, "");
        if let Err(errno) = closed.and_then(|()| unlink(OWN)) {
            let _ = unmount(PATH, UnmountFlags::DETACH);
            return Err(errno);
        }
        self.mapped = Some(mapping);
        Ok(())
    }

    /// Makes it `id`, which [`is_id`], where the guest has a place for one.
    ///
    /// # Errors
    /// Those of [`mount`](Self::mount), if it is not.
    pub fn set(&mut self, id: &str) -> Result<(), Errno> {
        self.mount()?;
        if let Some(mapping) = &self.mapped {
            mapping.store(id.as_bytes());
        }
        Ok(())
    }
}

/// Whether these are the digits of an id.
pub fn is_id(digits: &[u8]) -> bool {
    let is_digit = |digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    digits.len() == DIGITS && digits.iter().copied().all(is_digit)
}

fn random_id() -> Result<Vec<u8>, Errno> {
    let mut id = [0; DIGITS / 2];
    // It keeps no secret, so there is no waiting for entropy.
    getrandom(&mut id, GetRandomFlags::INSECURE)?;
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(id.into_bytes())
}

/// The digits in the file.
struct Mapping {
    digits: NonNull<[AtomicU64; DIGITS / 8]>,
}

impl Mapping {
    /// Maps a file that has a line at least.
    fn new(file: &rustix::fd::OwnedFd) -> Result<Self, Errno> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, at an address that the kernel chooses: it takes nobody's memory.
        let start = unsafe { mmap(null_mut(), LINE, prot, flags, file, 0)? };
        let digits = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { digits })
    }

    fn store(&self, digits: &[u8]) {
        // SAFETY: it is the mapping's beginning, which is aligned to a page and lives as long as `self`; the file is longer, and stays so, since nobody else can open it for
        // writing. Others change it by no way but this one.
        let words = unsafe { self.digits.as_ref() };
        for (word, digits) in words.iter().zip(digits.as_chunks().0) {
            word.store(u64::from_ne_bytes(*digits), Ordering::Relaxed);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this type's, whose references into it do not outlive it.
        // It fails for no mapping that exists.
        let _ = unsafe { munmap(self.digits.as_ptr().cast(), LINE) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn an_id_is_digits_alone() {
        assert!(is_id(b"0123456789abcdef0123456789abcdef"));
        assert!(!is_id(b"0123456789abcdef0123456789abcde"));
        assert!(!is_id(b"0123456789abcdef0123456789abcdeF"));
        assert!(!is_id(b""));
        assert!(is_id(&random_id().unwrap()));
        assert_ne!(random_id().unwrap(), random_id().unwrap());
    }

    #[test]
    fn what_is_stored_is_in_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("{}\n", "?".repeat(DIGITS))).unwrap();
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mapping = Mapping::new(&open(file.path(), flags, Mode::empty()).unwrap()).unwrap();
        for id in [
            "0123456789abcdef0123456789abcdef",
            "00112233445566778899aabbccddeeff",
        ] {
            mapping.store(id.as_bytes());
            assert_eq!(fs::read_to_string(file.path()).unwrap(), format!("{id}\n"));
        }
    }
}
