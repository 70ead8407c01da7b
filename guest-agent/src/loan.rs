//! Bytes for a helper's pipe, lent instead of copied: the pipe refers to the pages that they lie in.
//!
//! Invariant: what was lent is not written to while the pipe may hold it. A pipe holds at most
//! [`PIPE_SIZE`] bytes, and at most [`WINDOW`] wait for it; the ring has room for both, so that what
//! is overwritten has left the pipe.

use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::sys;

/// What a helper's pipe holds, in bytes: with room for this much, there is something to do on
/// both sides of it.
pub const PIPE_SIZE: usize = 128 * 1024;

/// The most bytes that may wait for the pipe.
pub const WINDOW: usize = 128 * 1024;

const RING: usize = PIPE_SIZE + WINDOW;

/// The bytes that wait for a pipe, and those that it may still hold.
#[derive(Default)]
pub struct Loan {
    /// Empty until there is something to hold: pages that are not touched cost nothing.
    ring: Vec<u8>,
    /// Where the first byte lies that was not lent yet.
    start: usize,
    waiting: usize,
}

impl Loan {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.waiting
    }

    /// Adds bytes: no more than what [`WINDOW`] leaves room for.
    pub fn push(&mut self, mut data: &[u8]) {
        debug_assert!(self.waiting + data.len() <= WINDOW);
        if self.ring.is_empty() {
            self.ring = vec![0; RING];
        }
        while !data.is_empty() {
            let end = (self.start + self.waiting) % RING;
            let room = self.ring.get_mut(end..).unwrap_or_default();
            let count = room.len().min(data.len());
            let (now, later) = data.split_at(count);
            room.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
            self.waiting += count;
            data = later;
        }
    }

    /// Lends the pipe what it takes; says how much that was.
    ///
    /// # Errors
    /// Those of vmsplice(2): `AGAIN` where the pipe is full.
    pub fn lend(&mut self, pipe: impl AsFd) -> Result<usize, Errno> {
        let mut lent = 0;
        while self.waiting > 0 {
            let end = (self.start + self.waiting).min(RING);
            let bytes = self.ring.get(self.start..end).unwrap_or_default();
            match sys::lend(pipe.as_fd(), bytes) {
                Ok(count) => {
                    lent += count;
                    self.waiting -= count;
                    self.start = (self.start + count) % RING;
                }
                Err(_) if lent > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(lent)
    }

    /// Forgets what waits; says how much that was.
    pub fn clear(&mut self) -> usize {
        // What was lent stays where it is.
        self.start = (self.start + self.waiting) % RING;
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is lent comes out of the pipe as it was pushed, although the ring is written to meanwhile.
    #[test]
    fn what_is_lent_arrives_as_it_was() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, PIPE_SIZE).unwrap();
        let mut loan = Loan::default();
        let (mut pushed, mut read) = (0_usize, 0_usize);
        let byte = |at: usize| u8::try_from(at % 251).unwrap();
        let mut buffer = vec![0; 50_000];
        // Sizes that meet pages and the ring's end in every way.
        for size in (0..400_usize).map(|step| 1 + step * 7_919 % 30_000) {
            let size = size.min(WINDOW - loan.len());
            let data: Vec<u8> = (pushed..pushed + size).map(byte).collect();
            loan.push(&data);
            pushed += size;
            match loan.lend(&writer) {
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(errno) => panic!("{errno}"),
            }
            // The reader is behind: the pipe is mostly full.
            if pushed - read > PIPE_SIZE {
                let count = rustix::io::read(&reader, &mut buffer).unwrap();
                for (at, found) in buffer[..count].iter().enumerate() {
                    assert_eq!(*found, byte(read + at));
                }
                read += count;
            }
        }
        assert!(read > 4 * RING);
    }
}
