//! Programs of the guest that ask for children of the whole guest: they wait at a Unix socket here, the host decides.
//!
//! A program that waits is in each child as well, being memory: the parent's agent answers it there with the children's names, a child's agent
//! with which child it is. So whoever asked goes on in all of them, and knows where. Any program may ask; each is told no by the host
//! unless its user allows it. One is asked for at a time, few may wait, and what one says is bounded.
//!
//! Said to the agent: a line, `branch COUNT`. The answer: a line that begins with `parent`, `child` or `error`, and the end.

use guest_agent::proto::{BranchWanted, Branched, Child};
use rustix::io::{Errno, read, write};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};

use crate::epoll::Watched;

/// The name of the socket, in the abstract namespace (unix(7)): every program may connect, and none needs a directory for it.
pub const SOCKET: &[u8] = b"bough/branch";

/// The most programs that may wait; more wait in the socket's queue.
const MAX_CLIENTS: usize = 16;

/// How many may wait to be accepted.
const BACKLOG: i32 = 16;

/// The longest line of a program, in bytes: "branch 4294967295".
const MAX_LINE: usize = 17;

/// What a program that asks has come to.
enum State {
    /// It is saying what it wants.
    Speaking(Vec<u8>),
    /// It wants so many children, and the host was not asked.
    Waiting(u32),
    /// The host was asked.
    Asked,
}

struct Client {
    /// Its number, and that of what it asks.
    ask: u64,
    socket: Watched,
    state: State,
}

/// Those who ask.
#[derive(Default)]
pub struct Branching {
    listener: Option<Watched>,
    clients: Vec<Client>,
    last: u64,
    /// What the host is being asked, whether or not anybody waits for it still.
    asked: Option<u64>,
}

impl Branching {
    /// Lets programs ask from now on.
    ///
    /// # Errors
    /// Those of socket(2), bind(2) and listen(2).
    pub fn open(&mut self) -> Result<(), Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        bind(&socket, &SocketAddrUnix::new_abstract_name(SOCKET)?)?;
        listen(&socket, BACKLOG)?;
        self.listener = Some(socket.into());
        Ok(())
    }

    /// Where programs connect, and whether there is room for more.
    pub fn listener(&self) -> Option<(&Watched, bool)> {
        let has_room = self.clients.len() < MAX_CLIENTS;
        self.listener.as_ref().map(|listener| (listener, has_room))
    }

    /// Those who ask, with their numbers; each has something to say, or is gone, when it can be read from.
    pub fn clients(&self) -> impl Iterator<Item = (u64, &Watched)> {
        let clients = self.clients.iter();
        clients.map(|client| (client.ask, &client.socket))
    }

    /// Takes one that has connected.
    pub fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = self
            .listener()
            .and_then(|(socket, _)| accept_with(socket, flags).ok());
        if let Some(socket) = accepted {
            self.last += 1;
            self.clients.push(Client {
                ask: self.last,
                socket: socket.into(),
                state: State::Speaking(Vec::new()),
            });
        }
    }

    /// Hears what one says. Who is gone, or says something else than it may, is forgotten; what it has asked for happens all the same.
    pub fn hear(&mut self, ask: u64) {
        let Some(index) = self.clients.iter().position(|client| client.ask == ask) else {
            return;
        };
        let mut bytes = [0; MAX_LINE + 2];
        let stays = self.clients.get_mut(index).is_some_and(|client| {
            match read(&client.socket, &mut bytes) {
                Ok(count @ 1..) => client.say(bytes.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => true,
                Ok(0) | Err(_) => false,
            }
        });
        if !stays {
            self.clients.remove(index);
        }
    }

    /// What the host is to be asked next, if it is not being asked.
    pub fn next(&mut self) -> Option<BranchWanted> {
        if self.asked.is_some() {
            return None;
        }
        let wanted = self.clients.iter_mut().find_map(|client| {
            let State::Waiting(count) = client.state else {
                return None;
            };
            client.state = State::Asked;
            let ask = client.ask;
            Some(BranchWanted { ask, count })
        })?;
        self.asked = Some(wanted.ask);
        Some(wanted)
    }

    /// The host has answered.
    pub fn answered(&mut self, answer: &Branched) {
        self.asked.take_if(|asked| *asked == answer.ask);
        let line = match &*answer.refused {
            "" => format!("parent {}", answer.names.join(" ")),
            why => format!("error {why}"),
        };
        self.end(|client| (client.ask == answer.ask).then(|| line.clone()));
    }

    /// The guest goes on from a snapshot: as `child`, if it does because a program has asked. Others that wait would ask once more in each copy of
    /// the guest, if they were let.
    pub fn restored(&mut self, child: Option<&Child>) {
        self.asked = None;
        self.end(|client| match (&client.state, child) {
            (State::Speaking(_), _) => None,
            (State::Asked, Some(child)) if child.ask == client.ask => {
                Some(format!("child {} {}", child.index, child.name))
            }
            _ => Some("error this VM goes on from another moment: ask again".to_owned()),
        });
    }

    /// Nobody is there who could be asked.
    pub fn refuse(&mut self) {
        self.asked = None;
        self.end(|client| match client.state {
            State::Speaking(_) => None,
            _ => Some("error nobody on the host takes such requests".to_owned()),
        });
    }

    /// Answers those for whom there is an answer.
    fn end(&mut self, answer: impl Fn(&Client) -> Option<String>) {
        self.clients.retain(|client| {
            let Some(line) = answer(client) else {
                return true;
            };
            // It is short, and the first that is written to the socket: there is room, or nobody there.
            let _ = write(&client.socket, format!("{line}\n").as_bytes());
            false
        });
    }
}

impl Client {
    /// Takes in what it says; false where it may not say that.
    fn say(&mut self, bytes: &[u8]) -> bool {
        let State::Speaking(line) = &mut self.state else {
            return false;
        };
        line.extend_from_slice(bytes);
        let Some(line) = line.strip_suffix(b"\n") else {
            return line.len() <= MAX_LINE;
        };
        let count = std::str::from_utf8(line)
            .ok()
            .and_then(|line| line.strip_prefix("branch ")?.parse().ok());
        match count {
            Some(count @ 1..) => {
                self.state = State::Waiting(count);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn asking(branching: &mut Branching, line: &str) -> (UnixStream, u64) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        branching.last += 1;
        let ask = branching.last;
        branching.clients.push(Client {
            ask,
            socket: std::os::fd::OwnedFd::from(ours).into(),
            state: State::Speaking(Vec::new()),
        });
        theirs.write_all(line.as_bytes()).unwrap();
        branching.hear(ask);
        (theirs, ask)
    }

    fn answer(mut socket: UnixStream) -> String {
        let mut text = String::new();
        // It is reset where something was not read.
        let _ = socket.read_to_string(&mut text);
        text
    }

    #[test]
    fn one_is_asked_for_at_a_time() {
        let mut branching = Branching::default();
        let (first, one) = asking(&mut branching, "branch 2\n");
        let (second, two) = asking(&mut branching, "branch 1\n");
        let wanted = branching.next().unwrap();
        assert_eq!((wanted.ask, wanted.count), (one, 2));
        assert!(branching.next().is_none());
        branching.answered(&Branched {
            ask: one,
            names: vec!["a".into(), "b".into()],
            refused: String::new(),
        });
        assert_eq!(answer(first), "parent a b\n");
        assert_eq!(branching.next().unwrap().ask, two);
        branching.answered(&Branched {
            ask: two,
            names: Vec::new(),
            refused: "no room".into(),
        });
        assert_eq!(answer(second), "error no room\n");
    }

    #[test]
    fn the_host_is_not_asked_more_because_somebody_leaves() {
        let mut branching = Branching::default();
        let (first, one) = asking(&mut branching, "branch 1\n");
        assert_eq!(branching.next().unwrap().ask, one);
        drop(first);
        branching.hear(one);
        let (_second, two) = asking(&mut branching, "branch 1\n");
        assert!(branching.next().is_none());
        branching.answered(&Branched {
            ask: one,
            ..Branched::default()
        });
        assert_eq!(branching.next().unwrap().ask, two);
    }

    #[test]
    fn a_child_is_told_which_it_is_and_nobody_asks_twice() {
        let mut branching = Branching::default();
        let (first, ask) = asking(&mut branching, "branch 2\n");
        let (second, _) = asking(&mut branching, "branch 1\n");
        let (_third, _) = asking(&mut branching, "bran");
        branching.next();
        branching.restored(Some(&Child {
            ask,
            index: 2,
            name: "kid".into(),
        }));
        assert_eq!(answer(first), "child 2 kid\n");
        assert!(answer(second).starts_with("error "));
        assert!(branching.next().is_none());
        assert_eq!(branching.clients().count(), 1);
    }

    #[test]
    fn who_says_something_else_is_forgotten() {
        for line in [
            "branch 0\n",
            "branch -1\n",
            "branch 4294967296\n",
            "branch 1\nbranch 1\n",
            "\n",
            "branch 11111111111111111",
        ] {
            let mut branching = Branching::default();
            let (socket, _) = asking(&mut branching, line);
            assert!(branching.next().is_none(), "{line:?}");
            assert_eq!(answer(socket), "", "{line:?}");
        }
        let mut branching = Branching::default();
        let (mut socket, ask) = asking(&mut branching, "branch 1\n");
        socket.write_all(b"branch 1\n").unwrap();
        branching.hear(ask);
        assert_eq!(branching.clients().count(), 0);
    }
}
