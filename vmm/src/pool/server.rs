//! The process that keeps shells: makes them, gives them away, and reaps them.
//!
//! One thread, which waits for clients, for shells that are ready or have died, for signals, and for the time to make more. It makes
//! more only when nobody is at work with some, so as not to take the processors from those.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use snapshot_fmt::manifest::Machine;
use thiserror::Error;

use super::demand::{Bounds, Demand};
use super::{PATIENCE, Wanted, give, kind, new_shell_for, program, socket_in};
use crate::message;
use crate::pager::are_one;
use crate::reaper::Reaper;

/// Most kinds of machines; the one that was not asked for longest goes.
const KINDS_MAX: usize = 8;
/// How long layers are kept that nobody asks for: they may be memory, or files that have been removed.
const ORIGIN_KEPT: Duration = Duration::from_secs(60);
/// How long a client may be at work with what it got, for which more shells wait.
const BUSY_MAX: Duration = Duration::from_secs(2);
/// How many clients are waited for; beyond that the first are not.
const CLIENTS_MAX: usize = 64;
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
    /// What lies over its memory.
    origin: Origin,
}

/// Layers that memory begins with.
type Origin = Rc<[File]>;

/// Shells for one kind of machine.
struct Shelf {
    machine: Machine,
    demand: Demand,
    /// What it was last asked for.
    origin: Origin,
    shells: VecDeque<Shell>,
    /// None is made before.
    not_before: Option<Instant>,
}

impl Shelf {
    /// Where the best shell is that is ready: one that has what was asked for over its memory, if there is one.
    fn best(&self) -> Option<usize> {
        let ready = (0..self.shells.len()).filter(|&at| self.shells[at].ready);
        ready.min_by_key(|&at| !Rc::ptr_eq(&self.shells[at].origin, &self.origin))
    }
}

/// Whether these are the same files.
fn are_the_same(origin: &[File], layers: &[File]) -> bool {
    let mut pairs = origin.iter().zip(layers);
    origin.len() == layers.len() && pairs.all(|(a, b)| are_one(a, b).unwrap_or(false))
}

/// A pool.
pub struct Pool {
    listener: UnixListener,
    socket: PathBuf,
    _lock: File,
    bounds: Bounds,
    shelves: Vec<Shelf>,
    reaper: Reaper,
    /// Clients that got something, since when.
    busy: Vec<(UnixStream, Instant)>,
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
            busy: Vec::new(),
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
            self.busy
                .retain(|(_, since)| now.duration_since(*since) < BUSY_MAX);
            if self.busy.is_empty() {
                self.tend(now);
            }
            let timeout = Timespec::try_from(LOOK).ok();
            let mut fds = vec![
                PollFd::from_borrowed_fd(until, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            let gone = PollFlags::RDHUP;
            fds.extend(
                self.busy
                    .iter()
                    .map(|(client, _)| PollFd::new(client, gone)),
            );
            let shells = self.shelves.iter().flat_map(|shelf| &shelf.shells);
            fds.extend(shells.map(|shell| PollFd::new(&shell.socket, PollFlags::IN)));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
            let (over, client) = (is_ready(&fds[0]), is_ready(&fds[1]));
            let (gone, spoke) = fds[2..].split_at(self.busy.len());
            let gone: Vec<bool> = gone.iter().map(is_ready).collect();
            let spoke: Vec<bool> = spoke.iter().map(is_ready).collect();
            drop(fds);
            if over {
                return Ok(());
            }
            let mut gone = gone.into_iter();
            self.busy.retain(|_| gone.next() != Some(true));
            self.hear(&spoke);
            if client {
                let answered = self
                    .listener
                    .accept()
                    .and_then(|(client, _)| self.answer(client));
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
                shelf.origin = Origin::default();
                shelf.not_before = Some(Instant::now() + AFTER_FAILURE);
            }
        }
    }

    /// Gives a client what it wants, as far as it is there.
    fn answer(&mut self, client: UnixStream) -> io::Result<()> {
        client.set_read_timeout(Some(PATIENCE))?;
        let Some((wanted, layers)) = message::receive::<Wanted>(&client)? else {
            return Ok(());
        };
        if wanted.program != program()? {
            let what = "it is another build of this program; start the pool again";
            return Err(io::Error::other(what));
        }
        let count = usize::try_from(wanted.count).unwrap_or(usize::MAX);
        let now = Instant::now();
        let shelf = self.shelf(&wanted.machine, now);
        shelf.demand.note(now, count);
        if !are_the_same(&shelf.origin, &layers) {
            shelf.origin = layers.into();
        }
        let mut given = 0;
        while given < count
            && let Some(at) = shelf.best()
            && let Some(shell) = shelf.shells.remove(at)
        {
            give(&client, Some(shell.socket.as_fd()))?;
            given += 1;
        }
        give(&client, None)?;
        if given > 0 {
            self.busy.truncate(CLIENTS_MAX - 1);
            self.busy.insert(0, (client, now));
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
                origin: Origin::default(),
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
            if now.duration_since(shelf.demand.last()) > ORIGIN_KEPT {
                shelf.origin = Origin::default();
            }
            // One that has others over its memory does as well, and is not kept for long.
            let origin = Rc::clone(&shelf.origin);
            let fits = |shell: &Shell| Rc::ptr_eq(&shell.origin, &origin);
            let is_young = |shell: &Shell| now.duration_since(shell.started) < ORIGIN_KEPT;
            shelf
                .shells
                .retain(|shell| shell.origin.is_empty() || fits(shell) || is_young(shell));
            let target = shelf.demand.target(now, self.bounds);
            shelf.shells.truncate(target);
            let hangs = |shell: &Shell| !shell.ready && now.duration_since(shell.started) > START;
            shelf.shells.retain(|shell| !hangs(shell));
            let may = shelf.not_before.is_none_or(|moment| now >= moment);
            while may && shelf.shells.len() < target && starting < STARTING_MAX {
                match new_shell_for(&shelf.machine, &shelf.origin, &self.reaper) {
                    Ok(socket) => shelf.shells.push_back(Shell {
                        socket,
                        ready: false,
                        started: now,
                        origin: Rc::clone(&shelf.origin),
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
