//! The agent's only loop: one thread polls clients, pipes and signals, and looks at the lane before it sleeps.
//!
//! Invariant of a turn: pipes first, then children, so that a program whose output
//! has ended is reported in the turn in which it is reaped; then clients; and at the
//! end everything that this has produced is sent, in one write per client.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use guest_agent::proto::{Feature, Hello, MAX_DATA, Shutdown, Stream};
use guest_agent::version::SUPPORTED;
use rustix::event::{PollFlags, Timespec};
use rustix::net::{SocketFlags, accept_with};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::branching::Branching;
use crate::cgroup::{Cgroup, Cgroups};
use crate::connection::{Connection, Context};
use crate::epoll::{Epoll, Wanted, Watched};
use crate::failure::Failure;
use crate::files::Layers;
use crate::lane::Lane;
use crate::machine_id::MachineId;
use crate::program::{Program, STDIN_WINDOW};
use crate::runners::SourceFile;
use crate::signals::Signals;
use crate::warm::{Warm, Which};
use crate::wire::Wire;
use crate::{power, sys};

/// The most clients at once; more wait in the listener's queue.
const MAX_CLIENTS: usize = 256;

/// How often in a row the lane may be served alone: a turn that asks the kernel costs as much as many that do not.
const LANE_TURNS: u32 = 16;

/// How long nothing must happen before what a program has left is removed, which is 35,000 instructions of the kernel: a request right behind the
/// last need not wait for that, and a copy that is made then need not do it as well.
const QUIET: Duration = Duration::from_millis(20);
/// The same while other programs run, which may want the processor.
const QUIET_BESIDE: Duration = Duration::from_secs(1);

/// Of how many programs there may be something left before some of it is removed all the same.
const MAX_REMAINS: usize = 16;

/// Four times what is ever used: an allocation that the fresh heap cannot hold is a mapping of its own,
/// whose pages cost nothing until they are touched; a smaller one is cleared, page by page.
const SCRATCH: usize = 4 * MAX_DATA;

/// What a ready descriptor stands for.
#[derive(Clone, Copy)]
enum Token {
    Signals,
    Listener(usize),
    Client(usize),
    /// Where programs connect that ask for children of the guest.
    Asks,
    /// One of them.
    Asker(u64),
    Pipe(usize, u32, Stream),
    /// A copy of an interpreter, which a program runs in or is on its way into.
    Copy(usize, u32),
    Warm(Which),
}

/// Opens a connection to the host.
pub type Dial = Box<dyn Fn() -> std::io::Result<Wire>>;

/// Everything that the agent serves.
pub struct Server {
    is_init: bool,
    boot_id: [u8; 16],
    signals: Signals,
    listeners: Vec<Watched>,
    epoll: Epoll,
    /// How the host is called.
    dial: Option<Dial>,
    connections: Vec<Connection>,
    scratch: Vec<u8>,
    source_files: u64,
    cgroups: Cgroups,
    warm: Warm,
    /// What the root consists of, if it is a layer above an image.
    layers: Option<Rc<Layers>>,
    branching: Branching,
    /// Control groups that are to be removed, once their last process is gone.
    remains: Vec<Cgroup>,
    /// Sources of programs that are over.
    litter: Vec<SourceFile>,
    /// How many of the control groups, the first ones, were not tried since something has happened.
    untried: usize,
    machine_id: MachineId,
    /// How often in a row only the lane was looked at.
    lane_turns: u32,
    shutdown: Option<Shutdown>,
}

impl Server {
    /// A server without clients, in a guest whose root consists of `layers`. Signals are blocked from here on.
    ///
    /// # Errors
    /// A failure that names the system call.
    pub fn new(is_init: bool, layers: Option<Layers>) -> Result<Self, Failure> {
        let mut boot_id = [0; 16];
        // It tells boots apart and keeps no secret, so there is no waiting for entropy.
        getrandom(&mut boot_id, GetRandomFlags::INSECURE)
            .map_err(|errno| Failure::internal("getrandom", errno))?;
        Ok(Self {
            is_init,
            boot_id,
            signals: Signals::new(is_init)?,
            listeners: Vec::new(),
            epoll: Epoll::new().map_err(|errno| Failure::internal("epoll_create", errno))?,
            dial: None,
            connections: Vec::new(),
            scratch: vec![0; SCRATCH],
            source_files: 0,
            cgroups: Cgroups::new(is_init),
            warm: Warm::default(),
            machine_id: MachineId::default(),
            layers: layers.map(Rc::new),
            branching: Branching::default(),
            remains: Vec::new(),
            litter: Vec::new(),
            untried: 0,
            lane_turns: 0,
            shutdown: None,
        })
    }

    /// Takes clients from a listener, which is non-blocking.
    pub fn listen(&mut self, listener: OwnedFd) {
        self.listeners.push(listener.into());
    }

    /// Calls the host, and greets it at once. From then on, a connection to the host that is lost is made anew, once: a
    /// guest that goes on from a snapshot is found again by that.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn dial(&mut self, dial: Dial) -> Result<(), Failure> {
        let result = self.call(&dial);
        self.dial = Some(dial);
        result
    }

    /// Does ahead what a restored guest would have to wait for.
    ///
    /// Where that fails, it fails again when it is wanted.
    pub fn prepare_restored(&mut self) {
        let _ = self.machine_id.mount();
    }

    /// Lets programs of the guest ask for children of it.
    ///
    /// # Errors
    /// A failure that names the socket.
    pub fn take_asks(&mut self) -> Result<(), Failure> {
        let opened = self.branching.open();
        opened.map_err(|errno| Failure::internal("the socket of bough", errno))
    }

    fn call(&mut self, dial: &Dial) -> Result<(), Failure> {
        let wire = dial().map_err(|error| Failure::internal("nobody on the host's port", error))?;
        let mut connection = Connection::link(wire, self.hello());
        connection.flush();
        self.connections.push(connection);
        Ok(())
    }

    fn hello(&self) -> Hello {
        let mut features = vec![
            Feature::Exec.into(),
            Feature::Python.into(),
            Feature::Shell.into(),
            Feature::Pty.into(),
            Feature::Files.into(),
            Feature::Warm.into(),
        ];
        if self.is_init {
            features.push(Feature::User.into());
            features.push(Feature::Shutdown.into());
            features.push(Feature::Restored.into());
            features.push(Feature::GuestBranch.into());
        }
        if self.cgroups.are_available() {
            features.push(Feature::Limits.into());
        }
        if self.layers.is_some() {
            features.push(Feature::Upper.into());
        }
        Hello {
            min_version: SUPPORTED.min,
            max_version: SUPPORTED.max,
            software: concat!("bough-agent ", env!("CARGO_PKG_VERSION")).into(),
            features,
            boot_id: self.boot_id.to_vec(),
            stdin_window: STDIN_WINDOW,
            output_window: 0,
        }
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// There is no memory to wait with.
    pub fn run(mut self) -> Result<Infallible, Failure> {
        let mut ready = Vec::new();
        loop {
            self.wait(&mut ready)?;
            self.turn(&ready);
            if let Some(shutdown) = self.shutdown.take() {
                self.connections.iter_mut().for_each(Connection::flush);
                power::end(&shutdown);
            }
        }
    }

    /// The client on the lane, what it waits for, and the lane.
    fn lane(&self) -> Option<(usize, PollFlags, &Lane)> {
        let mut connections = self.connections.iter().enumerate();
        connections.find_map(|(index, connection)| {
            let lane = connection.wire()?.lane()?;
            Some((index, connection.wants(), lane))
        })
    }

    /// Waits until something is ready, and lists it.
    ///
    /// The lane is looked at first, without the kernel, and for a while after something has come on it; unless a program runs, which may be what
    /// the processor is for. Others have their turn after some of the lane's.
    fn wait(&mut self, ready: &mut Vec<(Token, PollFlags)>) -> Result<(), Failure> {
        ready.clear();
        let turns = std::mem::take(&mut self.lane_turns);
        let Some((index, wants, lane)) = self.lane() else {
            return self.poll(ready);
        };
        let mut now = PollFlags::empty();
        if turns < LANE_TURNS {
            now = lane.ready(wants);
            let is_quiet = self.connections.iter().all(|c| c.programs().is_empty());
            if now.is_empty() && turns > 0 && is_quiet {
                now = lane.spin(wants);
            }
        }
        if now.is_empty() {
            now = lane.sleep(wants);
            if now.is_empty() || turns >= LANE_TURNS {
                let result = self.poll(ready);
                if let Some((_, _, lane)) = self.lane() {
                    lane.awake();
                }
                // What it was that came decides whether there is more to look for.
                let is_lanes = |(token, _): &(Token, PollFlags)| matches!(token, Token::Client(client) if *client == index);
                self.lane_turns = ready.iter().any(is_lanes).into();
                return result;
            }
            lane.awake();
        }
        ready.push((Token::Client(index), now));
        self.lane_turns = turns + 1;
        Ok(())
    }

    /// Sleeps until something is ready, and lists it: pipes, signals, clients, listeners.
    fn poll(&mut self, ready: &mut Vec<(Token, PollFlags)>) -> Result<(), Failure> {
        let mut tokens = Vec::new();
        let mut wanted = Vec::new();
        let mut want = |token, one| {
            tokens.push(token);
            wanted.push(one);
        };
        let input = PollFlags::IN;
        let input_if = |is_wanted| if is_wanted { input } else { PollFlags::empty() };
        for (index, connection) in self.connections.iter().enumerate() {
            for program in connection.programs() {
                if let Some(socket) = program.copy() {
                    want(Token::Copy(index, program.request_id), socket.wanted(input));
                }
                for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
                    let flags = match stream {
                        Stream::Stdin => PollFlags::OUT,
                        // Started comes before any output.
                        _ if connection.wants_output() && program.start.is_none() => input,
                        _ => continue,
                    };
                    if let Some(pipe) = program.waits_for(stream) {
                        let token = Token::Pipe(index, program.request_id, stream);
                        want(token, Wanted::once(pipe.as_fd(), flags));
                    }
                }
            }
        }
        for (which, socket) in self.warm.sockets() {
            want(Token::Warm(which), socket.wanted(input));
        }
        want(Token::Signals, self.signals.fd().wanted(input));
        if let Some((listener, has_room)) = self.branching.listener() {
            want(Token::Asks, listener.wanted(input_if(has_room)));
        }
        for (ask, socket) in self.branching.clients() {
            want(Token::Asker(ask), socket.wanted(input));
        }
        let mut clients = 0;
        for (index, connection) in self.connections.iter().enumerate() {
            if let Some(wire) = connection.wire() {
                clients += 1;
                want(Token::Client(index), wire.wanted(connection.wants()));
            }
        }
        for (index, listener) in self.listeners.iter().enumerate() {
            let has_room = clients < MAX_CLIENTS;
            want(Token::Listener(index), listener.wanted(input_if(has_room)));
        }

        let deadline = self.connections.iter().filter_map(Connection::deadline);
        let is_quiet = self.connections.iter().all(|c| c.programs().is_empty());
        let rest = if is_quiet { QUIET } else { QUIET_BESIDE };
        let quiet = self.is_untidy().then(|| Instant::now() + rest);
        let timeout = deadline.chain(quiet).min().map(time_until);
        let flags = self.epoll.wait(&wanted, timeout.as_ref());
        let flags = flags.map_err(|errno| Failure::internal("epoll_wait", errno))?;
        let all = tokens.into_iter().zip(flags);
        ready.extend(all.filter(|(_, flags)| !flags.is_empty()));
        if ready.is_empty() {
            self.tidy();
        }
        Ok(())
    }

    fn turn(&mut self, ready: &[(Token, PollFlags)]) {
        let mut is_restored = false;
        for &(token, flags) in ready {
            match token {
                Token::Pipe(index, request_id, stream) => {
                    if let Some(connection) = self.connections.get_mut(index) {
                        connection.move_data(request_id, stream, &mut self.scratch);
                    }
                }
                Token::Copy(index, request_id) => {
                    if let Some(connection) = self.connections.get_mut(index) {
                        connection.hear_copy(request_id);
                    }
                }
                Token::Warm(which) => self.warm.hear(which, &mut self.cgroups),
                Token::Signals => self.take_signals(),
                Token::Client(index) => is_restored |= self.serve(index, flags),
                Token::Asks => self.branching.accept(),
                Token::Asker(ask) => self.branching.hear(ask),
                // Who waits there since before the snapshot is lost like the others.
                Token::Listener(index) if is_restored => while self.accept(index).is_some() {},
                Token::Listener(index) => {
                    // One per turn; the rest makes the listener ready again.
                    if let Some(socket) = self.accept(index) {
                        let connection = Connection::new(Wire::Socket(socket.into()), self.hello());
                        self.connections.push(connection);
                    }
                }
            }
        }
        self.ask_host();
        let now = self.has_deadlines().then(Instant::now);
        for connection in &mut self.connections {
            if let Some(now) = now {
                connection.check_deadlines(now);
            }
            connection.settle();
            connection.report(&mut self.scratch);
            if connection.wants_to_send() {
                connection.flush();
                if connection.wire().is_some_and(|wire| wire.lane().is_some()) {
                    // Who is told something often has something to say next.
                    self.lane_turns = self.lane_turns.max(1);
                }
            }
            let (cgroups, sources) = connection.take_remains();
            self.remains.extend(cgroups);
            self.litter.extend(sources);
        }
        let is_idle = !self.connections.iter().any(|connection| {
            // Nobody waits for the programs of one that was lost, and they may run for ever.
            let mut programs = connection.programs().iter();
            connection.wire().is_some() && programs.any(Program::is_warm)
        });
        self.warm.tend(is_idle);
        self.remains.extend(self.warm.take_remains());
        if !ready.is_empty() {
            self.untried = self.remains.len();
        }
        if self.remains.len().max(self.litter.len()) > MAX_REMAINS {
            self.tidy();
        }
        let mut connections = self.connections.iter_mut();
        let is_lost = connections.any(Connection::take_lost_link);
        self.connections.retain(|connection| !connection.is_over());
        if let Some(dial) = self.dial.take_if(|_| is_lost) {
            // Where nobody listens any more, the agent carries on without.
            if self.dial(dial).is_err() {
                self.branching.refuse();
            }
        }
    }

    /// Whether something may be removed that is left of programs.
    fn is_untidy(&self) -> bool {
        self.untried > 0 || !self.litter.is_empty()
    }

    /// Removes something of that: sources, and one control group, which takes longest. One that still has a process stays.
    fn tidy(&mut self) {
        self.litter.clear();
        if let Some(last) = self.untried.checked_sub(1) {
            self.untried = last;
            if self.remains.get(last).is_some_and(Cgroup::remove) {
                self.remains.swap_remove(last);
            }
        }
    }

    /// Asks the host what programs want to ask it.
    fn ask_host(&mut self) {
        if let Some(wanted) = self.branching.next() {
            let mut connections = self.connections.iter_mut();
            if !connections.any(|connection| connection.ask(wanted)) {
                self.branching.refuse();
            }
        }
    }

    fn has_deadlines(&self) -> bool {
        self.connections
            .iter()
            .any(|connection| connection.deadline().is_some())
    }

    fn take_signals(&mut self) {
        let tidings = self.signals.take();
        if tidings.child {
            self.reap();
        }
        if tidings.end {
            self.shutdown.get_or_insert_default();
        }
    }

    /// Reaps every child that has ended: programs, and orphans that nobody else waits for.
    fn reap(&mut self) {
        while let Some(ended) = sys::reap() {
            let mut connections = self.connections.iter_mut();
            if !connections.any(|connection| connection.reaped(&ended)) {
                self.warm.reaped(&ended, &mut self.cgroups);
            }
        }
    }

    /// Serves a client; says whether it was told that the guest goes on from a snapshot. Then only that client is left.
    fn serve(&mut self, index: usize, flags: PollFlags) -> bool {
        let mut is_restored = false;
        let Some(connection) = self.connections.get_mut(index) else {
            return false;
        };
        if flags.contains(PollFlags::IN) && connection.wants_requests() {
            connection.receive(&mut Context {
                scratch: &mut self.scratch,
                source_files: &mut self.source_files,
                is_init: self.is_init,
                shutdown: &mut self.shutdown,
                is_restored: &mut is_restored,
                cgroups: &mut self.cgroups,
                machine_id: &mut self.machine_id,
                warm: &mut self.warm,
                layers: self.layers.clone(),
                branching: &mut self.branching,
            });
        } else if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            connection.broken(None);
        }
        if is_restored {
            for (other, connection) in self.connections.iter_mut().enumerate() {
                if other != index {
                    connection.lose();
                }
            }
        }
        is_restored
    }

    /// A client that waits at a listener. One that left while it waited is no loss.
    fn accept(&self, index: usize) -> Option<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        accept_with(self.listeners.get(index)?, flags).ok()
    }
}

/// How long until a moment. A moment that has passed is now.
fn time_until(moment: Instant) -> Timespec {
    let left = moment.saturating_duration_since(Instant::now());
    Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    }
}
