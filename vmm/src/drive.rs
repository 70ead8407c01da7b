//! A disk's file on the host: opened, locked, and looked at.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use thiserror::Error;

use crate::config::DriveConfig;

/// Why a file cannot serve as a disk.
#[derive(Debug, Error)]
pub enum DriveError {
    /// It cannot be opened.
    #[error("cannot open the image {path}{}: {source}{}", if *.read_only { "" } else { " to write to it" }, open_remedy(source, *.read_only))]
    Open {
        /// The file.
        path: PathBuf,
        /// The guest is only to read it.
        read_only: bool,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a pipe, or something else without sectors.
    #[error("the image {path} is neither a regular file nor a block device")]
    NotADisk {
        /// The file.
        path: PathBuf,
    },
    /// Another sandbox has it.
    #[error(
        "the image {path} is in use by another sandbox{}",
        if *.read_only {
            ", which may write to it: stop that one and its branches, or give this one a copy"
        } else {
            ": stop that one and its branches, give this one a copy, or have all only read it (--drive FILE,ro)"
        }
    )]
    Busy {
        /// The file.
        path: PathBuf,
        /// This one only wanted to read it.
        read_only: bool,
    },
}

fn open_remedy(error: &io::Error, read_only: bool) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; name an existing file, or make one (truncate -s 1G FILE)",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => {
            "; get the permission, or only read it (--drive FILE,ro)"
        }
        _ => "",
    }
}

/// An open disk. Its lock (flock: shared for reading, exclusive for writing) lasts as long as `lock` is open, in whichever process.
#[derive(Debug)]
pub struct Drive {
    /// The file.
    pub file: File,
    /// It once more, with the lock, where `file` may be written to: for reading only, unless the file system locks only for those who write.
    pub lock: Option<File>,
    /// The kernel's name of the file system on it, if it is a known one.
    pub file_system: Option<&'static str>,
}

impl Drive {
    /// Opens and locks the disk's file.
    pub fn open(config: &DriveConfig) -> Result<Self, DriveError> {
        let path = || config.path.clone();
        let failed = |source| DriveError::Open {
            path: path(),
            read_only: config.read_only,
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            // Nobody may be at the other end of a pipe. Files and block devices do not mind.
            .custom_flags(libc::O_NONBLOCK)
            .open(&config.path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DriveError::NotADisk { path: path() });
        }
        let lock = |file: &File| {
            let lock = if config.read_only {
                FlockOperation::NonBlockingLockShared
            } else {
                FlockOperation::NonBlockingLockExclusive
            };
            match flock(file, lock) {
                Err(Errno::WOULDBLOCK) => Err(DriveError::Busy {
                    path: path(),
                    read_only: config.read_only,
                }),
                result => Ok(result),
            }
        };
        let locked = lock(&file)?;
        let file_system = file_system(&file);
        if config.read_only {
            return Ok(Self {
                file,
                lock: None,
                file_system,
            });
        }
        // The same file, whatever has its name now.
        let writable = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .map_err(failed)?;
        // NFS locks exclusively only what is open for writing. Where there are no locks at all, there is nothing to hold on to.
        let lock = if locked == Err(Errno::BADF) && lock(&writable)?.is_ok() {
            writable.try_clone().map_err(failed)?
        } else {
            file
        };
        Ok(Self {
            file: writable,
            lock: Some(lock),
            file_system,
        })
    }
}

/// Recognizes a file system by its magic number (offset in bytes, bytes).
fn file_system(file: &File) -> Option<&'static str> {
    const MAGICS: [(u64, &[u8], &str); 5] = [
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "erofs"),
        (0, b"hsqs", "squashfs"),
        (1080, &[0x53, 0xef], "ext4"),
        (0, b"XFSB", "xfs"),
        (0x10040, b"_BHRfS_M", "btrfs"),
    ];
    let has = |&(offset, magic, _): &(u64, &[u8], &str)| {
        let mut bytes = vec![0; magic.len()];
        file.read_exact_at(&mut bytes, offset).is_ok() && bytes == magic
    };
    MAGICS
        .iter()
        .find(|magic| has(magic))
        .map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DriveInterface;

    fn config(path: &std::path::Path, read_only: bool) -> DriveConfig {
        DriveConfig {
            path: path.to_owned(),
            read_only,
            interface: DriveInterface::Block,
        }
    }

    #[test]
    fn the_file_system_is_recognized() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let open = || {
            Drive::open(&config(image.path(), true))
                .unwrap()
                .file_system
        };
        assert_eq!(open(), None);
        image.as_file().write_all_at(&[0x53, 0xef], 1080).unwrap();
        assert_eq!(open(), Some("ext4"));
        image
            .as_file()
            .write_all_at(&[0xe2, 0xe1, 0xf5, 0xe0], 1024)
            .unwrap();
        assert_eq!(open(), Some("erofs"));
    }

    #[test]
    fn readers_share_and_a_writer_does_not() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let first = Drive::open(&config(image.path(), true)).unwrap();
        let _second = Drive::open(&config(image.path(), true)).unwrap();
        let busy = Drive::open(&config(image.path(), false)).unwrap_err();
        assert!(
            matches!(
                busy,
                DriveError::Busy {
                    read_only: false,
                    ..
                }
            ),
            "{busy}"
        );
        drop((first, _second));
        let _writer = Drive::open(&config(image.path(), false)).unwrap();
        let busy = Drive::open(&config(image.path(), true)).unwrap_err();
        assert!(busy.to_string().contains("which may write to it"), "{busy}");
    }

    #[test]
    fn a_reader_of_a_writable_disk_keeps_its_lock() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let drive = Drive::open(&config(image.path(), false)).unwrap();
        drive.file.write_all_at(b"x", 0).unwrap();
        let lock = drive.lock.as_ref().unwrap().try_clone().unwrap();
        lock.write_all_at(b"y", 0).unwrap_err();
        drop(drive);
        for read_only in [true, false] {
            let busy = Drive::open(&config(image.path(), read_only)).unwrap_err();
            assert!(busy.to_string().contains("and its branches"), "{busy}");
        }
        drop(lock);
        Drive::open(&config(image.path(), false)).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let error = Drive::open(&config("/dev/null".as_ref(), true)).unwrap_err();
        assert!(matches!(error, DriveError::NotADisk { .. }), "{error}");
        let error = Drive::open(&config("/nonexistent".as_ref(), true)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("cannot open the image /nonexistent"),
            "{error}"
        );
    }
}
