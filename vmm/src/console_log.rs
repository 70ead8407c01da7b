//! The file of a guest's console: written with a bound, since the guest decides how much it prints, and read
//! back, also while it grows.
//!
//! `console.log` is what was printed last; once it is full it becomes `console.log.1`, and that one goes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where a file is full, in bytes; there are two.
const FILE_MAX: u64 = 4 << 20;

fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Writes a console's file.
pub struct ConsoleLog {
    path: PathBuf,
    file: File,
    len: u64,
    max: u64,
}

impl ConsoleLog {
    /// Starts an empty file.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::with_max(path, FILE_MAX)
    }

    fn with_max(path: &Path, max: u64) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: File::create(path)?,
            len: 0,
            max,
        })
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.len >= self.max {
            fs::rename(&self.path, older(&self.path))?;
            let mut new = OpenOptions::new();
            self.file = new.write(true).create_new(true).open(&self.path)?;
            self.len = 0;
        }
        let count = self.file.write(bytes)?;
        self.len += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a console's files from the oldest byte on, and goes on where they grow.
pub struct ConsoleReader {
    path: PathBuf,
    file: File,
    /// The file is the older one, or has become so: the newer is next.
    inode: u64,
}

impl ConsoleReader {
    /// Begins at the oldest byte that is kept.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(older(path)).or_else(|_| File::open(path))?;
        Ok(Self {
            path: path.to_owned(),
            inode: file.metadata()?.ino(),
            file,
        })
    }

    /// The next bytes; none where there are no more yet.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.file.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            let next = File::open(&self.path)?;
            let inode = next.metadata()?.ino();
            if inode == self.inode {
                return Ok(0);
            }
            // What was written between the read and the opening is still to come from the old one.
            let count = self.file.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            (self.file, self.inode) = (next, inode);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rest(reader: &mut ConsoleReader) -> String {
        let mut text = Vec::new();
        let mut buffer = [0; 3];
        while let count @ 1.. = reader.read(&mut buffer).unwrap() {
            text.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_reader_follows_through_a_change_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::with_max(&path, 8).unwrap();
        let mut reader = ConsoleReader::open(&path).unwrap();
        log.write_all(b"one two ").unwrap();
        assert_eq!(rest(&mut reader), "one two ");
        log.write_all(b"three").unwrap();
        assert_eq!(rest(&mut reader), "three");
        log.write_all(b"four").unwrap();
        assert_eq!(rest(&mut reader), "four");
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::with_max(&path, 100).unwrap();
        for number in 0..1000 {
            writeln!(log, "{number:03}").unwrap();
        }
        let kept = rest(&mut ConsoleReader::open(&path).unwrap());
        assert!(kept.ends_with("998\n999\n") && kept.len() <= 208, "{kept}");
    }
}
