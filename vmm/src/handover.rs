//! What a parent hands to the process of a child ([`crate::message`]): a description and open files. They are the state, then the layers of memory, the root first, then
//! what disks consist of. The newest layer of memory may come behind that, in a message of its own, when it is written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::manifest::{Machine, Programs};

use crate::control::types::ChildView;
use crate::message;
use crate::sandbox::budget::Budget;
use crate::sandbox::record::BranchPoint;
use crate::snapshot::shared_disk::DiskParts;
use crate::warm::WarmRuntime;

/// How long a child may take to say that it is ready. It gives up by itself before.
const PATIENCE: Duration = Duration::from_secs(240);
/// Longest word of a child, in bytes: an error may have the end of the guest's console.
const WORD_MAX: u64 = 64 << 10;

/// A child to be.
#[derive(Debug, Serialize, Deserialize)]
pub struct Handover {
    /// What to call it, if not its id.
    pub name: Option<String>,
    /// How long it may live, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// The user's own labels.
    pub labels: BTreeMap<String, String>,
    /// What its tree may have together.
    pub budget: Budget,
    /// How many children its guest may have made that are alive.
    pub guest_branch: u32,
    /// What its parent's guest has asked, if that wanted it.
    pub ask: Option<u64>,
    /// Which of the children of a call it is, from 1.
    pub number: u32,
    /// Where it branches off; nothing for one that goes on from a snapshot.
    pub branch: Option<BranchPoint>,
    /// Its machine, which is its parent's.
    pub machine: Machine,
    /// How programs are run in it.
    pub programs: Programs,
    /// The interpreter that stands ready in it.
    pub warm: Option<WarmRuntime>,
    /// The snapshot that its memory begins with, if it does with one of the user's: the store, and its id there.
    pub base: Option<(PathBuf, Digest)>,
    /// Its disks, but for those that are as that snapshot has them.
    pub disks: Vec<DiskParts>,
    /// Whether the newest layer of its memory comes in a message of its own.
    pub is_late: bool,
    /// Whether it stands still from when it is ready until it is released, or has something to run.
    pub stands_still: bool,
    /// When its parent was asked for it: [`crate::timings::monotonic_ns`].
    pub since: u64,
    /// When its parent stood still for it, likewise; nothing for one that goes on from a snapshot.
    pub moment: Option<u64>,
}

/// What a child says when it is made.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// Its agent has answered.
    Ready(ChildView),
    /// It has come to nothing, and why.
    Failed(String),
}

/// The process of a child that has not been told to live on. It ends when it finds out that it never will be.
pub struct Unborn {
    name: Option<String>,
    number: u32,
    socket: UnixStream,
}

impl Unborn {
    /// The shell at the other end of `socket`, for the child `number` of a call, that is to be called `name`.
    pub fn new(name: Option<String>, number: u32, socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            name,
            number,
            socket,
        })
    }

    /// Sends it what it is to be, under its name.
    pub fn send(&self, handover: &mut Handover, files: &[&File]) -> io::Result<()> {
        handover.name.clone_from(&self.name);
        handover.number = self.number;
        message::send(&self.socket, handover, files)
    }

    /// Sends it the newest layer of its memory.
    pub fn send_layer(&self, layer: &File) -> io::Result<()> {
        message::send(&self.socket, &(), &[layer])
    }

    /// Goes on with another shell, since the one that it had is gone.
    pub fn replace(&mut self, socket: UnixStream) -> io::Result<()> {
        let name = self.name.take();
        *self = Self::new(name, self.number, socket)?;
        Ok(())
    }

    /// Whether its process has ended.
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let now = Timespec::default();
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// What to say of one that is gone.
    pub fn why_gone(&self) -> String {
        format!("{} ended before its siblings were ready", self.who())
    }

    fn who(&self) -> &str {
        self.name.as_deref().unwrap_or("a child")
    }

    /// Waits until it is ready. Where it fails, it has said why.
    pub fn ready(&self) -> Result<ChildView, String> {
        let mut line = String::new();
        let read = BufReader::new((&self.socket).take(WORD_MAX)).read_line(&mut line);
        let who = self.who();
        match read.map(|_| serde_json::from_str(&line)) {
            Ok(Ok(Word::Ready(view))) => Ok(view),
            Ok(Ok(Word::Failed(why))) => Err(format!("{who}: {why}")),
            Ok(Err(_)) => Err(format!("{who} did not come to be: its process ended")),
            Err(error) => Err(format!("{who} did not come to be: {error}")),
        }
    }

    /// Lets it live on. It may not be listed as such before [`Self::settle`] is through.
    pub fn release(&self) -> io::Result<()> {
        (&self.socket).write_all(b"\n")
    }

    /// Waits until one that was released is listed as a sandbox of its own. One that ends at once is none, as at any later time.
    pub fn settle(&self) {
        let _ = (&self.socket).read(&mut [0]);
    }
}
