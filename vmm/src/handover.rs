//! What a parent hands to the process of a child: a description and open files, over a Unix socket.
//!
//! On the socket: the description's length as four bytes, least significant first, and the description as JSON. The files come with the
//! first byte, as descriptors: the state, then the layers of memory, the root first, then what disks consist of. Whoever is at the other end runs as the same user, in the same program.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use snapshot_fmt::digest::Digest;
use snapshot_fmt::manifest::{Machine, Programs};

use crate::control::types::ChildView;
use crate::sandbox::budget::Budget;
use crate::sandbox::record::BranchPoint;
use crate::snapshot::shared_disk::DiskParts;
use crate::warm::WarmRuntime;

/// Most files: as many as a message can have (Linux, unix(7), `SCM_MAX_FD`).
pub const FILES_MAX: usize = 253;
/// How long a child may take to say that it is ready. It gives up by itself before.
const PATIENCE: Duration = Duration::from_secs(240);
/// Longest word of a child, in bytes: an error may have the end of the guest's console.
const WORD_MAX: u64 = 64 << 10;
/// Longest description, in bytes.
const DESCRIPTION_MAX: usize = 1 << 20;

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
    /// How many files come with this.
    pub files: usize,
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
        handover.files = files.len();
        send(&self.socket, handover, files)
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

/// Sends a child to be, with its files.
fn send(mut socket: &UnixStream, handover: &Handover, files: &[&File]) -> io::Result<()> {
    let json = serde_json::to_vec(handover)?;
    let length = u32::try_from(json.len()).map_err(io::Error::other)?;
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if fds.len() > FILES_MAX || !rights.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other(format!(
            "{} files are too many",
            fds.len()
        )));
    }
    let head = length.to_le_bytes();
    let sent = sendmsg(
        socket,
        &[IoSlice::new(&head)],
        &mut rights,
        SendFlags::NOSIGNAL,
    )?;
    socket.write_all(head.get(sent..).unwrap_or_default())?;
    socket.write_all(&json)
}

/// Receives a child to be, with its files. `None` where whoever would send it has gone.
pub fn receive(mut socket: &UnixStream) -> io::Result<Option<(Handover, Vec<File>)>> {
    let mut head = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut head)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let files: Vec<File> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .map(File::from)
        .collect();
    socket.read_exact(head.get_mut(received.bytes..).unwrap_or_default())?;
    let length = u32::from_le_bytes(head) as usize;
    if length > DESCRIPTION_MAX {
        return Err(io::Error::other(format!(
            "a description of {length} bytes is too long"
        )));
    }
    let mut json = vec![0; length];
    socket.read_exact(&mut json)?;
    let handover: Handover = serde_json::from_slice(&json)?;
    if files.len() != handover.files {
        // The last are missing where there is no room for more: memory without its newest layer would be another's.
        return Err(io::Error::other(format!(
            "{} of {} files arrived; is the limit on open files (ulimit -n) too low?",
            files.len(),
            handover.files
        )));
    }
    Ok(Some((handover, files)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn handover() -> Handover {
        Handover {
            name: Some("child".to_owned()),
            timeout_ms: None,
            labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            budget: Budget::default(),
            guest_branch: 0,
            ask: None,
            number: 0,
            branch: Some(BranchPoint {
                parent: "1".to_owned(),
                parent_name: "one".to_owned(),
                root: "1".to_owned(),
                depth: 1,
                at: 0,
            }),
            machine: Machine {
                cpus: 1,
                memory: Vec::new(),
                kernel: snapshot_fmt::manifest::KernelFile {
                    path: "vmlinux".to_owned(),
                    digest: None,
                },
                cmdline: String::new(),
                drives: Vec::new(),
                vsock_cid: Some(3),
                lane: false,
            },
            programs: Programs::default(),
            warm: None,
            base: None,
            disks: Vec::new(),
            files: 0,
            since: 1,
            moment: None,
        }
    }

    #[test]
    fn files_arrive_in_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..FILES_MAX)
            .map(|number| {
                let file = tempfile::tempfile().unwrap();
                file.write_all_at(&[u8::try_from(number).unwrap()], 0)
                    .unwrap();
                file
            })
            .collect();
        let handover = || Handover {
            files: FILES_MAX,
            ..handover()
        };
        send(&ours, &handover(), &files.iter().collect::<Vec<_>>()).unwrap();
        let (received, files) = receive(&theirs).unwrap().unwrap();
        assert_eq!(format!("{received:?}"), format!("{:?}", handover()));
        for (number, file) in files.iter().enumerate() {
            let mut byte = [0];
            file.read_exact_at(&mut byte, 0).unwrap();
            assert_eq!(usize::from(byte[0]), number);
        }
        assert_eq!(files.len(), FILES_MAX);
        let too_many: Vec<_> = files.iter().chain(&files[..1]).collect();
        assert!(send(&ours, &handover(), &too_many).is_err());
    }

    #[test]
    fn files_that_are_lost_are_missed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let handover = Handover {
            files: 2,
            ..handover()
        };
        send(&ours, &handover, &[&file]).unwrap();
        let error = receive(&theirs).unwrap_err().to_string();
        assert!(error.contains("1 of 2 files"), "{error}");
    }

    #[test]
    fn nobody_there_is_no_child() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(receive(&theirs).unwrap().is_none());
    }

    #[test]
    fn half_a_description_and_nonsense_are_errors() {
        for bytes in [
            &b"\x04"[..],
            b"\x04\0\0\0nul",
            b"\x04\0\0\0null",
            b"\xff\xff\xff\xff",
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(receive(&theirs).is_err(), "{bytes:?}");
        }
    }
}
