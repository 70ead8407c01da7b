//! An output pipe of a program, or its terminal, with the credit that the client has given. Without a client it is read all
//! the same, so that its program goes on.

use std::os::fd::OwnedFd;

use guest_agent::proto::MAX_DATA;
use rustix::io::{Errno, ioctl_fionread, read};

/// More than a terminal holds, in bytes: what others write to it later is not the program's.
const TERMINAL_HOLDS: u64 = 256 * 1024;

/// An output pipe.
pub struct Source {
    /// `None` once it is drained.
    pipe: Option<OwnedFd>,
    /// How many bytes the client is ready for; `None` if nobody hears of them, and they are thrown away.
    credit: Option<u32>,
    /// How many bytes are left to read, once the process has ended.
    left: Option<u64>,
    is_terminal: bool,
    /// The program has ended, and what its terminal holds is still to be read.
    draining: bool,
}

impl Source {
    /// A pipe whose reader is ready for `credit` bytes. A terminal is non-blocking.
    pub fn new(pipe: Option<OwnedFd>, credit: u32, is_terminal: bool) -> Self {
        Self {
            pipe,
            credit: Some(credit),
            left: None,
            is_terminal,
            draining: false,
        }
    }

    /// The pipe, unless it is drained.
    pub fn pipe(&self) -> Option<&OwnedFd> {
        self.pipe.as_ref()
    }

    /// The pipe, if there is credit to read from it.
    pub fn waiting(&self) -> Option<&OwnedFd> {
        self.pipe.as_ref().filter(|_| self.credit != Some(0))
    }

    /// The client is ready for more.
    pub fn add_credit(&mut self, bytes: u32) {
        self.credit = self.credit.map(|credit| credit.saturating_add(bytes));
    }

    /// From now on nobody hears of it.
    pub fn discard(&mut self) {
        self.credit = None;
    }

    /// Whether it is to be read without waiting for it to become ready.
    pub fn is_draining(&self) -> bool {
        self.draining && self.waiting().is_some()
    }

    /// Reads once, as much as there is credit for. Nothing is sent where nobody hears of it.
    pub fn pump(&mut self, scratch: &mut [u8], send: impl FnOnce(Vec<u8>)) {
        let Some(pipe) = &self.pipe else { return };
        let limit = u64::from(self.credit.unwrap_or(u32::MAX))
            .min(self.left.unwrap_or(u64::MAX))
            .min(MAX_DATA as u64);
        let limit = usize::try_from(limit).unwrap_or(0).min(scratch.len());
        let Some(scratch) = scratch
            .get_mut(..limit)
            .filter(|scratch| !scratch.is_empty())
        else {
            return;
        };
        let data = match read(pipe, &mut *scratch) {
            Ok(count) => scratch.get(..count).unwrap_or_default(),
            // Others may hold the terminal of a program that has ended: what it wrote is sent.
            Err(Errno::AGAIN) if self.draining => &[],
            Err(Errno::INTR | Errno::AGAIN) => return,
            // A terminal that nobody holds any more says EIO.
            Err(_) => &[],
        };
        if data.is_empty() {
            self.pipe = None;
            return;
        }
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(data.len() as u64);
        }
        if let Some(credit) = &mut self.credit {
            // At most MAX_DATA, so neither the subtraction can wrap nor the conversion fail.
            *credit -= u32::try_from(data.len()).unwrap_or(*credit);
            send(data.to_vec());
        }
        self.close_if_drained();
    }

    /// The process has ended: what others write from now on is not ours to send.
    pub fn end(&mut self) {
        if self.is_terminal {
            // What was written to a terminal may be on its way to our end; reading fetches it.
            self.draining = true;
            self.left = Some(TERMINAL_HOLDS);
        } else if let Some(pipe) = &self.pipe {
            self.left = Some(ioctl_fionread(pipe).unwrap_or(0));
            self.close_if_drained();
        }
    }

    fn close_if_drained(&mut self) {
        if self.left == Some(0) {
            self.pipe = None;
        }
    }
}
