//! A client's connection: the handshake, its requests, and the programs that it runs.
//!
//! Invariants: nothing is served before the client's Hello; a connection that breaks
//! the protocol gets one Error and no more requests are read from it; a connection that
//! has failed, or whose client is gone, has killed all its programs. One that was lost, as the guest
//! goes on from a snapshot without it, has no socket any more and stays until its programs are over.

mod code;
mod end;

use std::rc::Rc;
use std::time::{Duration, Instant};

use guest_agent::frame::{FrameBuffer, FrameError};
use guest_agent::proto::{
    BranchWanted, DEFAULT_OUTPUT_WINDOW, Done, ErrorCode, Exec, Feature, Hello, MAX_DATA, Pong,
    Restored, Shutdown, ShuttingDown, Started, Stream, ToAgent, from_agent::Kind, to_agent,
};
use guest_agent::version::{SUPPORTED, VersionRange};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::branching::Branching;
use crate::cgroup::{Cgroup, Cgroups};
use crate::failure::Failure;
use crate::files::{self, Layers, Task};
use crate::identity::Identity;
use crate::lane::Lane;
use crate::machine_id::MachineId;
use crate::output::Output;
use crate::program::Program;
use crate::restored;
use crate::runners::SourceFile;
use crate::spawn;
use crate::sys::Ended;
use crate::warm::{Outcome, Warm};
use crate::wire::Wire;

/// The most programs that may run at once for one connection.
const MAX_PROGRAMS: usize = 256;

/// What connections need from the server.
pub struct Context<'a> {
    /// Room for `MAX_DATA` bytes, for whoever reads just now.
    pub scratch: &'a mut [u8],
    /// Counts the source files, so that each has a name of its own.
    pub source_files: &'a mut u64,
    /// Whether a client may end the guest.
    pub is_init: bool,
    /// Set when a client has asked to end the guest.
    pub shutdown: &'a mut Option<Shutdown>,
    /// Set when a client has said that the guest goes on from a snapshot.
    pub is_restored: &'a mut bool,
    /// Makes the control groups of programs.
    pub cgroups: &'a mut Cgroups,
    /// What a restored guest is told apart by.
    pub machine_id: &'a mut MachineId,
    /// The interpreters that stand ready.
    pub warm: &'a mut Warm,
    /// Programs that ask for children of the guest.
    pub branching: &'a mut Branching,
    /// What the root consists of, if it is a layer above an image.
    pub layers: Option<Rc<Layers>>,
}

/// A client's connection.
pub struct Connection {
    /// `None` once there is no client any more.
    wire: Option<Wire>,
    frames: FrameBuffer,
    output: Output,
    programs: Vec<Program>,
    /// Control groups of programs that are over, to be removed when they are empty.
    remains: Vec<Cgroup>,
    /// Sources of programs that are over. To remove them takes longer than to tell the end.
    litter: Vec<SourceFile>,
    /// Requests that wait for an interpreter to stand ready.
    warming: Vec<(u32, Outcome)>,
    state: State,
    /// Whether the agent has made the connection, to the host.
    is_link: bool,
    /// Whether the client has ever answered.
    is_greeted: bool,
    /// Whether the client can be asked for children of the guest.
    takes_asks: bool,
}

#[derive(Clone, Copy)]
enum State {
    /// The client's Hello has not come.
    Greeting,
    /// Requests are served; the client wants this window for each output stream.
    Open { output_window: u32 },
    /// The last Error is on its way out; nothing more is read.
    Failed,
    /// The client is gone, or lost.
    Gone,
}

impl Connection {
    /// Greets a client.
    pub fn new(wire: Wire, hello: Hello) -> Self {
        let mut output = Output::default();
        output.push(0, Kind::Hello(hello));
        Self {
            wire: Some(wire),
            frames: FrameBuffer::default(),
            output,
            programs: Vec::new(),
            remains: Vec::new(),
            litter: Vec::new(),
            warming: Vec::new(),
            state: State::Greeting,
            is_link: false,
            is_greeted: false,
            takes_asks: false,
        }
    }

    /// Greets the host, to which the agent has connected.
    pub fn link(wire: Wire, hello: Hello) -> Self {
        Self {
            is_link: true,
            ..Self::new(wire, hello)
        }
    }

    /// Asks the client for children of the guest; false where it is not one that can be asked.
    pub fn ask(&mut self, wanted: BranchWanted) -> bool {
        let can = self.takes_asks && matches!(self.state, State::Open { .. });
        if can {
            self.output.push(0, Kind::BranchWanted(wanted));
        }
        can
    }

    /// What the client is on, as long as there is one.
    pub fn wire(&self) -> Option<&Wire> {
        self.wire.as_ref()
    }

    /// The programs that run, in no particular order.
    pub fn programs(&self) -> &[Program] {
        &self.programs
    }

    /// Whether requests are to be read now: not from a client that is behind with reading.
    pub fn wants_requests(&self) -> bool {
        matches!(self.state, State::Greeting | State::Open { .. }) && !self.output.is_full()
    }

    /// Whether there is something to send.
    pub fn wants_to_send(&self) -> bool {
        !self.output.is_empty()
    }

    /// What its stream is to be watched for.
    pub fn wants(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.wants_requests());
        flags.set(PollFlags::OUT, self.wants_to_send());
        flags
    }

    /// Whether programs' output is to be read now.
    pub fn wants_output(&self) -> bool {
        !self.output.is_full()
    }

    /// Whether the connection can be dropped.
    pub fn is_over(&self) -> bool {
        match self.state {
            State::Gone => self.programs.is_empty(),
            State::Failed => self.output.is_empty(),
            State::Greeting | State::Open { .. } => false,
        }
    }

    /// Sends what can be sent now. Without a client, what there is to say is forgotten.
    pub fn flush(&mut self) {
        match &self.wire {
            None => self.output.clear(),
            Some(wire) => {
                if let Err(errno) = self.output.flush(wire) {
                    self.broken(Some(errno));
                }
            }
        }
    }

    /// Reads once from the client and serves the requests that are whole.
    pub fn receive(&mut self, context: &mut Context<'_>) {
        // More than one message's worth: each turn of the loop costs as much as many bytes.
        let room = context.scratch.len().min(2 * MAX_DATA);
        let room = context.scratch.get_mut(..room).unwrap_or_default();
        let Some(wire) = &self.wire else { return };
        match wire.read(room) {
            Ok(0) => return self.hung_up(),
            Ok(count) => {
                let bytes = context.scratch.get(..count).unwrap_or_default();
                self.frames.input().extend_from_slice(bytes);
            }
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(errno) => return self.broken(Some(errno)),
        }
        while matches!(self.state, State::Greeting | State::Open { .. }) {
            let result = match self.frames.next_message() {
                Ok(Some(message)) => self.dispatch(message, context),
                Ok(None) => return,
                Err(error) => Err(Failure::new(
                    match error {
                        FrameError::TooLarge { .. } => ErrorCode::FrameTooLarge,
                        FrameError::Malformed { .. } => ErrorCode::Malformed,
                    },
                    error.to_string(),
                )),
            };
            if let Err(failure) = result {
                self.fail(failure);
            }
        }
    }

    /// What programs have left that are over since this was last asked: their control groups, and their sources.
    pub fn take_remains(&mut self) -> (Vec<Cgroup>, Vec<SourceFile>) {
        let sources = std::mem::take(&mut self.litter);
        (std::mem::take(&mut self.remains), sources)
    }

    /// When the first of its programs has used up its time.
    pub fn deadline(&self) -> Option<Instant> {
        self.programs.iter().filter_map(Program::deadline).min()
    }

    /// Ends the programs whose time is over.
    pub fn check_deadlines(&mut self, now: Instant) {
        for program in &mut self.programs {
            program.check_deadline(now);
        }
    }

    /// Handles one message.
    ///
    /// # Errors
    /// A breach of the protocol. Failures of a request are sent to the client here.
    fn dispatch(&mut self, message: ToAgent, context: &mut Context<'_>) -> Result<(), Failure> {
        use to_agent::Kind as Ask;
        let id = message.request_id;
        let (kind, output_window) = match (self.state, message.kind) {
            (State::Greeting, Some(Ask::Hello(hello))) => return self.greet(&hello),
            (State::Open { output_window }, kind) if !matches!(kind, Some(Ask::Hello(_))) => {
                (kind, output_window)
            }
            _ => {
                return Err(Failure::new(
                    ErrorCode::HelloExpected,
                    "one Hello opens a connection, and nothing comes before it",
                ));
            }
        };
        if id == 0 {
            return Err(Failure::new(ErrorCode::BadRequestId, "request id 0"));
        }
        // Everything else refers to a request.
        let starts = !matches!(
            kind,
            Some(
                Ask::StdinData(_)
                    | Ask::StdinClose(_)
                    | Ask::Signal(_)
                    | Ask::Cancel(_)
                    | Ask::Credit(_)
                    | Ask::Resize(_)
            )
        );
        let program = self
            .programs
            .iter_mut()
            .find(|program| program.request_id == id);
        let is_warming = self.warming.iter().any(|(warming, _)| *warming == id);
        if starts && (program.is_some() || is_warming) {
            let message = format!("request id {id} belongs to a running request");
            return Err(Failure::new(ErrorCode::BadRequestId, message));
        }

        let result = match (kind, program) {
            (Some(Ask::Ping(_)), _) => {
                self.output.push(id, Kind::Pong(Pong {}));
                Ok(())
            }
            (Some(Ask::Exec(exec)), _) => self.exec(id, &exec, None, output_window, context),
            (Some(Ask::RunCode(code)), _) => self.run_code(id, code, output_window, context),
            (Some(Ask::Warm(warm)), _) => self.warm(id, &warm, context),
            (Some(Ask::Cancel(_)), None) if is_warming => {
                self.warming.retain(|(warming, _)| *warming != id);
                Err(Failure::new(
                    ErrorCode::Cancelled,
                    "the request was cancelled",
                ))
            }
            (Some(Ask::Shutdown(shutdown)), _) => self.shutdown(id, shutdown, context),
            (Some(Ask::Restored(restored)), _) => self.restored(id, &restored, context),
            (Some(Ask::Branched(branched)), _) => {
                context.branching.answered(&branched);
                self.output.push(id, Kind::Done(Done {}));
                Ok(())
            }
            (Some(Ask::ReadFile(it)), _) => self.work(id, &Task::Read(it), output_window, context),
            (Some(Ask::WriteFile(it)), _) => {
                self.work(id, &Task::Write(it), output_window, context)
            }
            (Some(Ask::List(it)), _) => self.work(id, &Task::List(it), output_window, context),
            (Some(Ask::Stat(it)), _) => self.work(id, &Task::Stat(it), output_window, context),
            (Some(Ask::Remove(it)), _) => self.work(id, &Task::Remove(it), output_window, context),
            (Some(Ask::MakeDirectory(it)), _) => {
                self.work(id, &Task::MakeDirectory(it), output_window, context)
            }
            (Some(Ask::Rename(it)), _) => self.work(id, &Task::Rename(it), output_window, context),
            (Some(Ask::Watch(it)), _) => self.work(id, &Task::Watch(it), output_window, context),
            (Some(Ask::ReadTree(it)), _) => {
                self.work(id, &Task::ReadTree(it), output_window, context)
            }
            (Some(Ask::WriteTree(it)), _) => {
                self.work(id, &Task::WriteTree(it), output_window, context)
            }
            (Some(Ask::ListUpper(_)), _) => match context.layers.clone() {
                Some(layers) => self.work(id, &Task::ListUpper(layers), output_window, context),
                None => Err(Failure::new(
                    ErrorCode::Unsupported,
                    "the root is no layer above an image",
                )),
            },
            (None, _) => Err(Failure::new(
                ErrorCode::Unsupported,
                "this agent does not know the request",
            )),
            (Some(Ask::StdinData(data)), Some(program)) => {
                program.stdin_data(&data.data, &mut self.output)?;
                Ok(())
            }
            (Some(Ask::StdinClose(_)), Some(program)) => {
                program.stdin_close();
                Ok(())
            }
            (Some(Ask::Credit(credit)), Some(program)) => {
                program.credit(credit.stream(), credit.bytes);
                Ok(())
            }
            (Some(Ask::Cancel(_)), Some(program)) => {
                program.kill();
                Ok(())
            }
            (Some(Ask::Resize(resize)), Some(program)) => {
                program.resize(resize);
                Ok(())
            }
            (Some(Ask::Signal(signal)), Some(program)) => {
                let number = i32::try_from(signal.signo).ok();
                if let Some(signal) = number.and_then(Signal::from_named_raw) {
                    program.signal(signal);
                }
                Ok(())
            }
            // About a request that has ended: it may have crossed with its end.
            (Some(_), None) | (Some(Ask::Hello(_)), Some(_)) => Ok(()),
        };
        if let Err(failure) = result {
            self.output.push(id, Kind::Error(failure.into()));
        }
        Ok(())
    }

    fn greet(&mut self, hello: &Hello) -> Result<(), Failure> {
        let theirs = VersionRange::from(hello);
        if SUPPORTED.common(theirs).is_none() {
            return Err(Failure::new(
                ErrorCode::VersionMismatch,
                format!("the agent speaks protocol version {SUPPORTED}, the client {theirs}"),
            ));
        }
        let output_window = match hello.output_window {
            0 => DEFAULT_OUTPUT_WINDOW,
            window => window,
        };
        self.state = State::Open { output_window };
        self.is_greeted = true;
        self.takes_asks = self.is_link && hello.features.contains(&Feature::GuestBranch.into());
        Ok(())
    }

    fn admit(&mut self, mut program: Program, timeout_ms: u64) {
        if timeout_ms > 0 {
            // One that is beyond what a clock can say is as good as none.
            let timeout = Duration::from_millis(timeout_ms);
            program.set_deadline(Instant::now().checked_add(timeout));
        }
        self.programs.push(program);
    }

    fn exec(
        &mut self,
        id: u32,
        exec: &Exec,
        file: Option<SourceFile>,
        output_window: u32,
        context: &mut Context<'_>,
    ) -> Result<(), Failure> {
        self.check_room()?;
        let identity = Identity::resolve(&exec.user, context.is_init)?;
        let cgroup = context.cgroups.create(exec.limits.as_ref())?;
        let spawned = match spawn::spawn(exec, identity.as_ref(), cgroup.as_ref()) {
            Ok(spawned) => spawned,
            Err(failure) => {
                self.remains.extend(cgroup);
                return Err(failure);
            }
        };
        let program = Program::new(id, spawned, output_window, cgroup, file);
        self.output.push(id, started(program.pid()));
        self.admit(program, exec.timeout_ms);
        Ok(())
    }

    fn check_room(&self) -> Result<(), Failure> {
        if self.programs.len() < MAX_PROGRAMS {
            return Ok(());
        }
        Err(Failure::new(
            ErrorCode::TooMany,
            format!("{MAX_PROGRAMS} programs run on this connection already"),
        ))
    }

    /// Starts what a request about files asks for.
    fn work(
        &mut self,
        id: u32,
        task: &Task,
        output_window: u32,
        context: &mut Context<'_>,
    ) -> Result<(), Failure> {
        self.check_room()?;
        let identity = Identity::resolve(task.user(), context.is_init)?;
        let spawned = files::start(task, identity.as_ref())?;
        self.programs
            .push(Program::helper(id, spawned, output_window));
        Ok(())
    }

    fn shutdown(
        &mut self,
        id: u32,
        shutdown: Shutdown,
        context: &mut Context<'_>,
    ) -> Result<(), Failure> {
        if !context.is_init {
            return Err(Failure::new(
                ErrorCode::Unsupported,
                "this agent is not PID 1 and cannot end the guest",
            ));
        }
        self.output.push(id, Kind::ShuttingDown(ShuttingDown {}));
        *context.shutdown = Some(shutdown);
        Ok(())
    }

    fn restored(
        &mut self,
        id: u32,
        restored: &Restored,
        context: &mut Context<'_>,
    ) -> Result<(), Failure> {
        if !context.is_init {
            return Err(Failure::new(
                ErrorCode::Unsupported,
                "this agent is not PID 1 and cannot change the guest's clock",
            ));
        }
        let lane = self.wire().and_then(Wire::lane);
        let is_seeded = lane.is_some_and(Lane::take_seeded);
        restored::restored(restored, is_seeded, context.machine_id)?;
        *context.is_restored = true;
        context.branching.restored(restored.child.as_ref());
        self.output.push(id, Kind::Done(Done {}));
        Ok(())
    }

    /// A pipe of a program is ready.
    pub fn move_data(&mut self, request_id: u32, stream: Stream, scratch: &mut [u8]) {
        // Asked again for each pipe: those before may have filled the buffer.
        if stream != Stream::Stdin && self.output.is_full() {
            return;
        }
        let mut programs = self.programs.iter_mut();
        if let Some(program) = programs.find(|program| program.request_id == request_id) {
            program.move_data(stream, scratch, &mut self.output);
        }
    }

    /// A process has ended; says whether it was one of this connection's.
    pub fn reaped(&mut self, ended: &Ended) -> bool {
        let mut programs = self.programs.iter();
        let Some(index) = programs.position(|program| program.is_process(ended.pid)) else {
            return false;
        };
        self.hear(index);
        if let Some(program) = self.programs.get_mut(index) {
            match &mut program.start {
                None => program.reaped(ended),
                // It has ended before it ran anything.
                Some(start) => start.lost(),
            }
        }
        true
    }

    /// Reports the programs that are over.
    pub fn report(&mut self, scratch: &mut [u8]) {
        let (output, remains) = (&mut self.output, &mut self.remains);
        let litter = &mut self.litter;
        self.programs.retain_mut(|program| {
            program.drain(scratch, output);
            let Some(kind) = program.over() else {
                return true;
            };
            output.push(program.request_id, kind);
            remains.extend(program.cgroup.take());
            litter.extend(program.source_file.take());
            false
        });
    }
}

fn started(pid: Pid) -> Kind {
    let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
    Kind::Started(Started { pid })
}
