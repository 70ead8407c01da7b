//! The process that keeps shells: makes them, gives them away, and reaps them.
//!
//! One thread, which waits for clients, for shells that are ready or have died, for signals, and for the time to make more. It makes
//! more only when nobody has asked for a moment, so as not to take the processors from those who were just given some.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use snapshot_fmt::manifest::Machine;
use thiserror::Error;

use super::demand::{Bounds, Demand};
use super::{PATIENCE, Wanted, give, kind, new_shell, program, socket_in};
use crate::reaper::Reaper;

/// Most kinds of machines; the one that was not asked for longest goes.
const KINDS_MAX: usize = 8;
/// Longest request, in bytes.
const REQUEST_MAX: u64 = 1 << 20;
/// How long nobody must have asked before more shells are made.
const QUIET: Duration = Duration::from_millis(100);
/// How often to look whether fewer are wanted.
const LOOK: Duration = Duration::from_secs(1);
/// How long a shell may take to be made.
const START: Duration = Duration::from_secs(30);
/// Shells that start at once.
const STARTING_MAX: usize = 2;
/// How long to wait after a client that got nothing: it may be for want of descriptors.
const AFTER_ERROR: Duration = Duration::from_millis(20);
/// How long no shell of a kind is made after one that came to nothing.
const AFTER_FAILURE: Duration = Duration::from_secs(5);

/// Why there is no pool.
#[derive(Debug, Error)]
pub enum PoolError {
    /// There is one already.
    #[error("a pool is running already in {dir}: end that first")]
    Running {
        /// The directory of the sandboxes.
        dir: PathBuf,
    },
    /// Something in the file system refused.
    #[error("cannot keep a pool at {path}: {source}; XDG_RUNTIME_DIR can name another place")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A shell that nobody has.
struct Shell {
    socket: UnixStream,
    /// It has said that it is made.
    ready: bool,
    started: Instant,
}

/// Shells for one kind of machine.
struct Shelf {
    machine: Machine,
    demand: Demand,
    shells: VecDeque<Shell>,
    /// None is made before.
    not_before: Option<Instant>,
}

/// A pool.
pub struct Pool {
    listener: UnixListener,
    socket: PathBuf,
    _lock: File,
    bounds: Bounds,
    shelves: Vec<Shelf>,
    reaper: Reaper,
    asked: Instant,
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Shells end when their sockets close. Without the file clients need not try.
        let _ = fs::remove_file(&self.socket);
    }
}

impl Pool {
    /// Begins to listen in `dir`, the directory of the sandboxes. It keeps shells for the `machines`, and for those that are asked for.
    pub fn new(dir: &Path, bounds: Bounds, machines: Vec<Machine>) -> Result<Self, PoolError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| PoolError::Io { path, source }
        };
        let lock_path = dir.join("pool.lock");
        let lock = File::create(&lock_path).map_err(io(&lock_path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => PoolError::Running {
                dir: dir.to_owned(),
            },
            errno => io(&lock_path)(errno.into()),
        })?;
        let socket = socket_in(dir);
        // What is there is a killed pool's: nobody else has the lock.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(io(&socket))?;
        let now = Instant::now();
        let mut pool = Self {
            listener,
            socket,
            _lock: lock,
            bounds,
            shelves: Vec::new(),
            reaper: Reaper::default(),
            asked: now,
        };
        for machine in machines {
            pool.shelf(&kind(&machine), now);
        }
        Ok(pool)
    }

    /// Serves until `until` is readable.
    pub fn serve(&mut self, until: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            let now = Instant::now();
            let quiet = now.duration_since(self.asked);
            if quiet >= QUIET {
                self.tend(now);
            }
            let timeout = QUIET.checked_sub(quiet).unwrap_or(LOOK);
            let timeout = Timespec::try_from(timeout).ok();
            let mut fds = vec![
                PollFd::from_borrowed_fd(until, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            let shells = self.shelves.iter().flat_map(|shelf| &shelf.shells);
            fds.extend(shells.map(|shell| PollFd::new(&shell.socket, PollFlags::IN)));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
            let (over, client) = (is_ready(&fds[0]), is_ready(&fds[1]));
            let spoke: Vec<bool> = fds[2..].iter().map(is_ready).collect();
            drop(fds);
            if over {
                return Ok(());
            }
            self.hear(&spoke);
            if client {
                let answered = self
                    .listener
                    .accept()
                    .and_then(|(client, _)| self.answer(&client));
                // A client that breaks off, or sends nonsense, gets nothing.
                if let Err(error) = answered {
                    log::warn!("a client of the pool got nothing: {error}");
                    std::thread::sleep(AFTER_ERROR);
                }
            }
        }
    }

    /// Notes which shells are ready, and lets go of those that have died. `spoke` is in the order of all shells.
    fn hear(&mut self, spoke: &[bool]) {
        let mut spoke = spoke.iter();
        for shelf in &mut self.shelves {
            let mut failed = false;
            shelf.shells.retain_mut(|shell| {
                if spoke.next() != Some(&true) {
                    return true;
                }
                let mut word = [0];
                let said = (&shell.socket).read(&mut word);
                // Anything else is the beginning of why not.
                let made = !shell.ready && said.is_ok_and(|count| count == 1) && word == *b"\n";
                failed |= !made && !shell.ready;
                shell.ready |= made;
                made
            });
            if failed {
                shelf.not_before = Some(Instant::now() + AFTER_FAILURE);
            }
        }
    }

    /// Gives a client what it wants, as far as it is there.
    fn answer(&mut self, client: &UnixStream) -> io::Result<()> {
        client.set_read_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new(client.take(REQUEST_MAX)).read_line(&mut line)?;
        let wanted: Wanted = serde_json::from_str(&line)?;
        if wanted.program != program()? {
            let what = "it is another build of this program; start the pool again";
            return Err(io::Error::other(what));
        }
        let count = usize::try_from(wanted.count).unwrap_or(usize::MAX);
        let now = Instant::now();
        self.asked = now;
        let shelf = self.shelf(&wanted.machine, now);
        shelf.demand.note(now, count);
        let mut given = 0;
        while given < count
            && let Some(at) = shelf.shells.iter().position(|shell| shell.ready)
            && let Some(shell) = shelf.shells.remove(at)
        {
            give(client, shell.socket.as_fd())?;
            given += 1;
        }
        Ok(())
    }

    /// The shelf for a kind of machine.
    fn shelf(&mut self, machine: &Machine, now: Instant) -> &mut Shelf {
        let at = self
            .shelves
            .iter()
            .position(|shelf| shelf.machine == *machine);
        let at = at.unwrap_or_else(|| {
            if self.shelves.len() >= KINDS_MAX {
                let last = |shelf: &Shelf| shelf.demand.last();
                let idlest = (0..self.shelves.len()).min_by_key(|&at| last(&self.shelves[at]));
                self.shelves.remove(idlest.unwrap_or(0));
            }
            self.shelves.push(Shelf {
                machine: machine.clone(),
                demand: Demand::new(now),
                shells: VecDeque::new(),
                not_before: None,
            });
            self.shelves.len() - 1
        });
        &mut self.shelves[at]
    }

    /// Makes and ends shells until there are as many as are wanted.
    fn tend(&mut self, now: Instant) {
        self.shelves.retain(|shelf| !shelf.demand.is_over(now));
        let is_starting = |shell: &&Shell| !shell.ready;
        let all = self.shelves.iter().flat_map(|shelf| &shelf.shells);
        let mut starting = all.filter(is_starting).count();
        for shelf in &mut self.shelves {
            let target = shelf.demand.target(now, self.bounds);
            shelf.shells.truncate(target);
            let hangs = |shell: &Shell| !shell.ready && now.duration_since(shell.started) > START;
            shelf.shells.retain(|shell| !hangs(shell));
            let may = shelf.not_before.is_none_or(|moment| now >= moment);
            while may && shelf.shells.len() < target && starting < STARTING_MAX {
                match new_shell(Some(&shelf.machine), &self.reaper) {
                    Ok(socket) => shelf.shells.push_back(Shell {
                        socket,
                        ready: false,
                        started: now,
                    }),
                    Err(error) => {
                        log::warn!("cannot start a shell: {error}");
                        shelf.not_before = Some(now + AFTER_FAILURE);
                        break;
                    }
                }
                starting += 1;
            }
        }
    }
}
