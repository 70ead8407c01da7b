//! What the agent sleeps on.
//!
//! Descriptors that stay are watched by epoll(7): to sleep, and to be woken by one of them, costs the same however many there are. A program's
//! pipes are there for a few sleeps only, and are polled beside it: to begin and end to watch one costs as much as polling it ten times.

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// A descriptor that is watched as long as it is open. Its number may be another's before and after it, so it has one of its own as well.
pub struct Watched<F = OwnedFd> {
    fd: F,
    id: u64,
}

impl<F: AsFd> From<F> for Watched<F> {
    fn from(fd: F) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed);
        Self { fd, id }
    }
}

impl<F: AsFd> AsFd for Watched<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<F> Deref for Watched<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.fd
    }
}

impl<F: AsFd> Watched<F> {
    /// To be waited for until `flags` are there. It must be named in every wait as long as it is open, be it without flags.
    pub fn wanted(&self, flags: PollFlags) -> Wanted<'_> {
        Wanted {
            fd: self.fd.as_fd(),
            id: Some(self.id),
            flags,
        }
    }
}

/// What is waited for.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    fd: BorrowedFd<'a>,
    /// The number of its own of one that is watched.
    id: Option<u64>,
    flags: PollFlags,
}

impl<'a> Wanted<'a> {
    /// A descriptor that does not stay.
    pub fn once(fd: BorrowedFd<'a>, flags: PollFlags) -> Self {
        Self {
            fd,
            id: None,
            flags,
        }
    }
}

/// What watches.
pub struct Epoll {
    epoll: OwnedFd,
    watched: Vec<(u64, PollFlags)>,
}

impl Epoll {
    /// Nothing is watched yet.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub fn new() -> Result<Self, Errno> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            watched: Vec::new(),
        })
    }

    /// Waits until something is ready, and says of each what it is ready for. Those to be watched that are not named are closed.
    ///
    /// # Errors
    /// There is too little memory.
    pub fn wait(
        &mut self,
        wanted: &[Wanted<'_>],
        timeout: Option<&Timespec>,
    ) -> Result<Vec<PollFlags>, Errno> {
        self.watch(wanted);
        let watched = &self.watched;
        let is_polled = |one: &Wanted<'_>| !watched.iter().any(|&(id, _)| one.id == Some(id));
        let polled = wanted.iter().filter(|one| is_polled(one));
        let mut polled: Vec<_> = polled
            .map(|one| PollFd::from_borrowed_fd(one.fd, one.flags))
            .collect();
        let mut events: Vec<Event> = Vec::with_capacity(wanted.len() + 1);
        let woken = if polled.is_empty() {
            epoll::wait(&self.epoll, spare_capacity(&mut events), timeout)
        } else {
            polled.push(PollFd::new(&self.epoll, PollFlags::IN));
            poll(&mut polled, timeout).and_then(|_| match polled.pop() {
                Some(epoll) if !epoll.revents().is_empty() => {
                    let now = Timespec::default();
                    epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&now))
                }
                _ => Ok(0),
            })
        };
        match woken {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(vec![PollFlags::empty(); wanted.len()]),
            Err(errno) => return Err(errno),
        }
        let mut polled = polled.iter().map(PollFd::revents);
        let ready = wanted.iter().map(|one| {
            if is_polled(one) {
                return polled.next().unwrap_or(PollFlags::empty());
            }
            let mut events = events.iter();
            let event = events.find(|event| Some(event.data.u64()) == one.id);
            event.map_or(PollFlags::empty(), |event| flags_of(event.flags))
        });
        let ready = ready.collect();
        let is_known = |event: &Event| watched.iter().any(|&(id, _)| id == event.data.u64());
        if !events.iter().all(is_known) {
            // It was closed here, is open in another process, and so is watched still.
            self.forget();
        }
        Ok(ready)
    }

    /// Watches those that are to be. One that cannot be, because programs of this user watch as many as the kernel lets one user, is polled.
    fn watch(&mut self, wanted: &[Wanted<'_>]) {
        self.watched
            .retain(|&(id, _)| wanted.iter().any(|one| one.id == Some(id)));
        for one in wanted {
            let Some(id) = one.id else { continue };
            let data = EventData::new_u64(id);
            let events = EventFlags::from_bits_retain(one.flags.bits().into());
            match self.watched.iter_mut().find(|(watched, _)| *watched == id) {
                Some((_, flags)) if *flags == one.flags => {}
                Some((_, flags)) => {
                    // It is watched, so this takes no memory, and cannot fail.
                    let _ = epoll::modify(&self.epoll, one.fd, data, events);
                    *flags = one.flags;
                }
                None => {
                    if epoll::add(&self.epoll, one.fd, data, events).is_ok() {
                        self.watched.push((id, one.flags));
                    }
                }
            }
        }
    }

    /// Begins anew. Without a descriptor for that, it is tried again.
    fn forget(&mut self) {
        if let Ok(new) = Self::new() {
            *self = new;
        }
    }
}

/// The bits are the same (Linux, include/uapi/linux/eventpoll.h and asm-generic/poll.h).
fn flags_of(events: EventFlags) -> PollFlags {
    let bits = u16::try_from(events.bits() & u32::from(u16::MAX));
    PollFlags::from_bits_retain(bits.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::io::dup2;

    use super::*;

    fn pair() -> (Watched<UnixStream>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours.into(), theirs)
    }

    const NOW: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };

    #[test]
    fn each_is_said_to_be_ready_for_what_it_is() {
        let mut epoll = Epoll::new().unwrap();
        let (first, mut one) = pair();
        let (second, _two) = pair();
        let (passing, mut three) = UnixStream::pair().unwrap();
        let (none, input) = (PollFlags::empty(), PollFlags::IN);
        let wanted = |flags| {
            [
                first.wanted(input),
                Wanted::once(passing.as_fd(), input),
                second.wanted(flags),
            ]
        };
        let ready = epoll.wait(&wanted(input), Some(&NOW)).unwrap();
        assert_eq!(ready, [none, none, none]);
        one.write_all(b"1").unwrap();
        let ready = epoll.wait(&wanted(input), None).unwrap();
        assert_eq!(ready, [input, none, none]);
        three.write_all(b"3").unwrap();
        let ready = epoll.wait(&wanted(PollFlags::OUT), None).unwrap();
        assert_eq!(ready, [input, input, PollFlags::OUT]);
        let ready = epoll.wait(&wanted(none), None).unwrap();
        assert_eq!(ready, [input, input, none]);
        let only = [first.wanted(input), second.wanted(none)];
        assert_eq!(epoll.wait(&only, None).unwrap(), [input, none]);
        (&*first).read_exact(&mut [0]).unwrap();
        assert_eq!(epoll.wait(&only, Some(&NOW)).unwrap(), [none, none]);
    }

    #[test]
    fn a_number_that_is_used_again_is_another() {
        let mut epoll = Epoll::new().unwrap();
        let (old, _one) = pair();
        let wait = |epoll: &mut Epoll, one: &Watched<UnixStream>| {
            let wanted = [one.wanted(PollFlags::IN)];
            epoll.wait(&wanted, Some(&NOW)).unwrap()
        };
        assert_eq!(wait(&mut epoll, &old), [PollFlags::empty()]);
        // Put over it, not opened behind its end: tests beside this one open descriptors as well.
        let mut number = OwnedFd::from(old.fd);
        let (new, mut two) = UnixStream::pair().unwrap();
        dup2(new, &mut number).unwrap();
        let new = UnixStream::from(number).into();
        two.write_all(b"2").unwrap();
        assert_eq!(wait(&mut epoll, &new), [PollFlags::IN]);
    }

    #[test]
    fn one_that_is_closed_here_and_open_elsewhere_wakes_nobody_for_long() {
        let mut epoll = Epoll::new().unwrap();
        let (old, mut one) = pair();
        let (new, _two) = pair();
        let wanted = [old.wanted(PollFlags::IN), new.wanted(PollFlags::IN)];
        epoll.wait(&wanted, Some(&NOW)).unwrap();
        let _copy = old.try_clone().unwrap();
        drop(old);
        one.write_all(b"1").unwrap();
        let wanted = [new.wanted(PollFlags::IN)];
        let none = [PollFlags::empty()];
        assert_eq!(epoll.wait(&wanted, None).unwrap(), none);
        let watched = [PollFd::new(&epoll.epoll, PollFlags::IN)];
        assert_eq!(poll(&mut { watched }, Some(&NOW)).unwrap(), 0);
        assert_eq!(epoll.wait(&wanted, Some(&NOW)).unwrap(), none);
    }
}
