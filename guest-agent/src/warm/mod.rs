//! Interpreters that stand ready with modules imported, so that code need not wait for one to start.
//!
//! An interpreter (`python.py`) runs no program itself: for each one the agent asks it for a copy (`standby.rs`). One copy
//! is kept waiting, made while nothing else runs. The interpreter is the programs' user from its first moment, so that no
//! copy has privileges to drop. Programs cannot look into it: it forbids tracing, and so does a copy that waits. They can
//! kill it, being the same user: then it is started again, and code runs in fresh interpreters meanwhile.

mod standby;

use std::cell::RefCell;
use std::ffi::CString;
use std::rc::Rc;

use guest_agent::proto::{self, ErrorCode, Exec, Language, RunCode};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{SendFlags, send};
use rustix::process::{Pid, Signal, kill_process};

pub use self::standby::{Copy, Start, Tidings};
use self::standby::{Standby, packet_sockets, receive};
use crate::cgroup::{Cgroup, Cgroups};
use crate::epoll::Watched;
use crate::failure::Failure;
use crate::identity::Identity;
use crate::runners::{self, Draft};
use crate::spawn::{self, Spawned, Theirs};
use crate::sys::Ended;

/// What runs in the interpreter.
const PROGRAM: &str = include_str!("python.py");

/// What is on its command line. The program comes as the first packet on its socket.
const LOADER: &[u8] = b"import posix; exec(posix.read(0, 65536))";

/// The most interpreters at once.
const MAX_INTERPRETERS: usize = 8;

/// The most modules, and the most bytes of their names.
const MAX_MODULES: usize = 256;
const MAX_NAMES: usize = 32 * 1024;

/// The longest packet that a copy is sent, as in `python.py`.
const MAX_PACKET: usize = 64 * 1024;

/// The longest source that goes into the packet. A longer one is read from its file.
const MAX_INLINE: usize = 32 * 1024;

/// The most that an interpreter may say of its failure.
const MAX_SAID: usize = 4096;

/// How a request for an interpreter ends; `None` as long as it has not.
pub type Outcome = Rc<RefCell<Option<Result<(), Failure>>>>;

/// All the interpreters.
#[derive(Default)]
pub struct Warm {
    interpreters: Vec<Interpreter>,
    /// Control groups that nothing needs any more.
    remains: Vec<Cgroup>,
    /// How many files were made ahead.
    drafts: u64,
}

/// What an interpreter, or its copy that waits, is known by to who polls.
#[derive(Clone, Copy)]
pub struct Which(usize, Part);

#[derive(Clone, Copy)]
enum Part {
    Interpreter,
    Standby,
}

/// What became of a program that might run in a copy.
pub enum Begun {
    /// It is on its way into one, with our ends of its streams, in this control group.
    Warm(Box<Start>, Spawned, Option<Cgroup>),
    /// It needs a fresh interpreter.
    Fresh(Exec),
}

struct Interpreter {
    exec: Exec,
    identity: Option<Identity>,
    modules: String,
    /// What it looked at when it started.
    settings: Vec<CString>,
    process: Process,
    is_ready: bool,
    /// What it said before it was ready.
    said: Vec<u8>,
    standby: Option<Standby>,
    /// The last copy was lost before it was ready: the next is made when it is needed.
    is_barren: bool,
    /// It never made a copy.
    is_useless: bool,
    /// Of the request that waits for it.
    outcome: Option<Outcome>,
}

struct Process {
    pid: Pid,
    control: Watched,
    cgroup: Option<Cgroup>,
}

impl Process {
    fn start(
        exec: &Exec,
        identity: Option<&Identity>,
        modules: &str,
        cgroups: &mut Cgroups,
    ) -> Result<Self, Failure> {
        let failed = |errno| Failure::internal("an interpreter's socket", errno);
        let (control, theirs) = packet_sockets().map_err(failed)?;
        for packet in [PROGRAM, modules] {
            send(&control, packet.as_bytes(), SendFlags::NOSIGNAL).map_err(failed)?;
        }
        let theirs = Theirs {
            stdout: fcntl_dupfd_cloexec(&theirs, 3).map_err(failed)?,
            stderr: fcntl_dupfd_cloexec(&theirs, 3).map_err(failed)?,
            stdin: theirs,
        };
        let cgroup = cgroups.create(None)?;
        let pid = spawn::start(exec, identity, cgroup.as_ref(), &theirs);
        let pid = pid.inspect_err(|_| {
            let _ = cgroup.as_ref().map(Cgroup::remove);
        })?;
        Ok(Self {
            pid,
            control,
            cgroup,
        })
    }
}

impl Warm {
    /// Starts an interpreter, in the place of the one for the same user.
    ///
    /// # Errors
    /// A failure that names the field that is wrong, or that the interpreter cannot be started.
    pub fn start(
        &mut self,
        request: &proto::Warm,
        is_init: bool,
        cgroups: &mut Cgroups,
    ) -> Result<Outcome, Failure> {
        let invalid = |message: String| Failure::new(ErrorCode::InvalidArgument, message);
        if request.language() != Language::Python {
            let message = format!("language {} cannot be warm", request.language);
            return Err(Failure::new(ErrorCode::Unsupported, message));
        }
        let is_name = |name: &str| {
            name.split('.').all(|part| !part.is_empty()) && !name.contains([',', '\0', '/'])
        };
        if let Some(name) = request.modules.iter().find(|name| !is_name(name)) {
            return Err(invalid(format!("modules: {name:?} is no module's name")));
        }
        // With a comma, it is no empty packet, which would be the end.
        let modules = request.modules.join(",") + ",";
        if request.modules.len() > MAX_MODULES || modules.len() > MAX_NAMES {
            return Err(invalid("modules: too many".into()));
        }
        let identity = Identity::resolve(&request.user, is_init)?;
        let interpreter = runners::python(&request.env).as_bytes();
        let exec = Exec {
            argv: vec![interpreter.to_vec(), b"-c".to_vec(), LOADER.to_vec()],
            env: request.env.clone(),
            ..Exec::default()
        };
        spawn::check(&exec)?;
        self.retire(|other| other.identity == identity);
        if self.interpreters.len() >= MAX_INTERPRETERS {
            let message = format!("{MAX_INTERPRETERS} interpreters stand ready already");
            return Err(Failure::new(ErrorCode::TooMany, message));
        }
        let outcome = Outcome::default();
        self.interpreters.push(Interpreter {
            process: Process::start(&exec, identity.as_ref(), &modules, cgroups)?,
            settings: settings(spawn::environment(&exec, identity.as_ref())),
            exec,
            identity,
            modules,
            is_ready: false,
            said: Vec::new(),
            standby: None,
            is_barren: false,
            is_useless: false,
            outcome: Some(outcome.clone()),
        });
        Ok(outcome)
    }

    /// Ends those that `are` so.
    fn retire(&mut self, are: impl Fn(&Interpreter) -> bool) {
        let (retired, kept) = std::mem::take(&mut self.interpreters)
            .into_iter()
            .partition(are);
        self.interpreters = kept;
        for interpreter in retired {
            let Interpreter {
                process,
                standby,
                outcome,
                ..
            } = interpreter;
            let _ = kill_process(process.pid, Signal::KILL);
            self.remains.extend(process.cgroup);
            self.remains.extend(standby.and_then(Standby::dismiss));
            settle(
                outcome,
                Err(Failure::new(ErrorCode::Cancelled, "another took its place")),
            );
        }
    }

    /// Whether code might run in a copy: [`Self::begin`] looks closer.
    pub fn might_run(&self, code: &RunCode) -> bool {
        !self.interpreters.is_empty()
            && code.language() == Language::Python
            && !code.cold
            && code.pty.is_none()
            && matches!(code.cwd.first(), None | Some(b'/'))
            // A fresh interpreter says what is wrong with it.
            && !code.source.contains(&0)
    }

    /// A file for the source of a program of `identity`, if one was made ahead.
    pub fn take_draft(&mut self, identity: Option<&Identity>) -> Option<Draft> {
        let owner = identity.map(Identity::ids);
        let standbys = self
            .interpreters
            .iter_mut()
            .filter(|one| one.identity.as_ref() == identity);
        let mut standbys = standbys.filter_map(|one| one.standby.as_mut());
        let is_theirs = |draft: &mut Draft| draft.owner == owner;
        standbys.find_map(|standby| standby.draft.take_if(is_theirs))
    }

    /// Has code run in a copy, if there is an interpreter like the fresh one that `exec` would start. The last argument but
    /// for the code's own is the file of the code, which is `source`.
    ///
    /// # Errors
    /// The control group with the limits that it asks for cannot be had.
    pub fn begin(
        &mut self,
        exec: Exec,
        source: &[u8],
        identity: Option<Identity>,
        cgroups: &mut Cgroups,
    ) -> Result<Begun, Failure> {
        let environment = spawn::environment(&exec, identity.as_ref());
        let packet = packet(&exec, &environment, source);
        let settings = settings(environment);
        let interpreter = self.interpreters.iter_mut().find(|one| {
            one.is_ready
                && one.identity == identity
                && one.exec.argv.first() == exec.argv.first()
                && one.settings == settings
        });
        let (Some(interpreter), Ok(_), 0..=MAX_PACKET) =
            (interpreter, spawn::check(&exec), packet.len())
        else {
            return Ok(Begun::Fresh(exec));
        };
        let Some(mut standby) = interpreter.take_standby() else {
            return Ok(Begun::Fresh(exec));
        };
        let limits = exec
            .limits
            .as_ref()
            .filter(|limits| **limits != proto::Limits::default());
        let own = standby.cgroup.take();
        let (group, is_new) = match own {
            Some(own) if limits.is_none() => (Some(own), false),
            own => {
                self.remains.extend(own);
                (cgroups.create(limits)?, true)
            }
        };
        let moves = group.as_ref().filter(|_| is_new);
        let (start, spawned) = standby.begin(packet, exec, identity, moves);
        Ok(Begun::Warm(Box::new(start), spawned, group))
    }

    /// What is to be polled for something to read.
    pub fn sockets(&self) -> impl Iterator<Item = (Which, &Watched)> {
        let interpreters = self.interpreters.iter().enumerate();
        interpreters.flat_map(|(index, one)| {
            let control = (Which(index, Part::Interpreter), &one.process.control);
            let standby = one
                .standby
                .as_ref()
                .map(|standby| (Which(index, Part::Standby), standby.socket()));
            std::iter::once(control).chain(standby)
        })
    }

    /// Hears what one of them says.
    pub fn hear(&mut self, which: Which, cgroups: &mut Cgroups) {
        let Which(index, part) = which;
        let Some(interpreter) = self.interpreters.get_mut(index) else {
            return;
        };
        match part {
            Part::Interpreter => {
                if !interpreter.hear() {
                    // It has ended, or has let go of its socket and is lost.
                    let _ = kill_process(interpreter.process.pid, Signal::KILL);
                }
            }
            Part::Standby => {
                self.drafts += 1;
                let remains = interpreter.hear_standby(self.drafts, cgroups);
                self.remains.extend(remains);
            }
        }
    }

    /// A process has ended; says whether it was an interpreter or a copy that waited.
    pub fn reaped(&mut self, ended: &Ended, cgroups: &mut Cgroups) -> bool {
        let Some(index) = self.interpreters.iter().position(|one| one.has(ended.pid)) else {
            return false;
        };
        let mut interpreter = self.interpreters.swap_remove(index);
        if interpreter.process.pid != ended.pid {
            let standby = interpreter.standby.take();
            self.remains.extend(standby.and_then(Standby::dismiss));
            self.interpreters.push(interpreter);
            return true;
        }
        // What it said last may not have been heard.
        interpreter.hear();
        self.remains.extend(interpreter.process.cgroup.take());
        if interpreter.is_ready && interpreter.restart(cgroups).is_ok() {
            self.interpreters.push(interpreter);
            return true;
        }
        self.remains
            .extend(interpreter.standby.and_then(Standby::dismiss));
        let said = String::from_utf8_lossy(&interpreter.said);
        let message = match said.trim() {
            "" => format!("the interpreter ended: {:?}", ended.status),
            said => said.replace('\n', " | "),
        };
        settle(
            interpreter.outcome,
            Err(Failure::new(ErrorCode::InvalidArgument, message)),
        );
        true
    }

    /// At the end of a turn: gives up what nobody waits for, and where nothing runs in a copy (`is_idle`), has the next made.
    pub fn tend(&mut self, is_idle: bool) {
        self.retire(|one| {
            // Its own is the only one that is left of an outcome that nobody waits for.
            let mut outcome = one.outcome.iter();
            one.is_useless || outcome.any(|outcome| Rc::strong_count(outcome) == 1)
        });
        for one in &mut self.interpreters {
            let is_due = is_idle || one.outcome.is_some();
            if is_due && one.is_ready && one.standby.is_none() && !one.is_barren {
                one.standby = Standby::ask(&one.process.control, one.identity.as_ref()).ok();
                one.is_barren = one.standby.is_none();
            }
        }
    }

    /// The control groups that nothing needs any more.
    pub fn take_remains(&mut self) -> Vec<Cgroup> {
        std::mem::take(&mut self.remains)
    }
}

impl Interpreter {
    fn has(&self, pid: Pid) -> bool {
        self.process.pid == pid || self.standby.as_ref().and_then(Standby::pid) == Some(pid)
    }

    fn restart(&mut self, cgroups: &mut Cgroups) -> Result<(), Failure> {
        self.is_ready = false;
        self.said.clear();
        self.process = Process::start(&self.exec, self.identity.as_ref(), &self.modules, cgroups)?;
        Ok(())
    }

    /// The copy that waits, or else a new one.
    fn take_standby(&mut self) -> Option<Standby> {
        let ask = || Standby::ask(&self.process.control, self.identity.as_ref()).ok();
        self.standby.take().or_else(ask)
    }

    /// Hears what it says; says whether it is still there.
    fn hear(&mut self) -> bool {
        let mut room = [0; MAX_SAID];
        while let Some((count, _)) = receive(&self.process.control, &mut room) {
            match room.get(..count).unwrap_or_default() {
                b"" => return false,
                b"ready" => self.is_ready = true,
                said if self.said.len() < MAX_SAID => self.said.extend(said),
                _ => {}
            }
        }
        true
    }

    /// Gives a control group that nothing needs any more.
    fn hear_standby(&mut self, number: u64, cgroups: &mut Cgroups) -> Option<Cgroup> {
        let mut standby = self.standby.take()?;
        let was_ready = standby.pid().is_some();
        if !standby.hear() {
            self.is_barren = !was_ready;
            self.is_useless = self.is_barren && self.outcome.is_some();
            let message = "the interpreter makes no copies of itself";
            settle(
                self.outcome.take(),
                Err(Failure::new(ErrorCode::Internal, message)),
            );
            return standby.dismiss();
        }
        if let (Some(pid), false) = (standby.pid(), was_ready) {
            // Where it cannot be had, or not take the copy, the program gets another, or a fresh interpreter.
            let cgroup = cgroups.create(None).ok().flatten();
            standby.cgroup = cgroup.filter(|cgroup| cgroup.adopt(pid).is_ok());
            standby.cgroup.iter_mut().for_each(Cgroup::open_usage);
            let owner = self.identity.as_ref().map(Identity::ids);
            standby.draft = Draft::ahead(number, owner).ok();
            self.is_barren = false;
            settle(self.outcome.take(), Ok(()));
        }
        self.standby = Some(standby);
        None
    }
}

fn settle(outcome: Option<Outcome>, result: Result<(), Failure>) {
    if let Some(outcome) = outcome {
        outcome.borrow_mut().get_or_insert(result);
    }
}

/// What an interpreter, its C library or its loader looks at when it starts, in an order of its own. PYTHONPATH is left out: a copy
/// does by itself what follows from it.
fn settings(environment: Vec<CString>) -> Vec<CString> {
    let is_setting = |variable: &CString| {
        let name = variable
            .as_bytes()
            .split(|&byte| byte == b'=')
            .next()
            .unwrap_or_default();
        let named: [&[u8]; 6] = [
            b"GLIBC_TUNABLES",
            b"HOME",
            b"LANG",
            b"LANGUAGE",
            b"PATH",
            b"TZ",
        ];
        let prefixes: [&[u8]; 4] = [b"LC_", b"LD_", b"MALLOC_", b"PYTHON"];
        name != b"PYTHONPATH"
            && (named.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix)))
    };
    let mut settings: Vec<_> = environment.into_iter().filter(is_setting).collect();
    settings.sort();
    settings
}

/// A program as a copy reads it: fields that end with NUL, and the source.
fn packet(exec: &Exec, environment: &[CString], source: &[u8]) -> Vec<u8> {
    let arguments = exec.argv.get(2..).unwrap_or_default();
    let source = Some(source).filter(|source| source.len() <= MAX_INLINE);
    let counts = format!(
        "{} {} {}",
        arguments.len(),
        environment.len(),
        u8::from(source.is_some())
    );
    let path = exec.argv.get(1).map(Vec::as_slice).unwrap_or_default();
    let fields = [path, &exec.cwd, counts.as_bytes()].into_iter();
    let fields = fields.chain(arguments.iter().map(Vec::as_slice));
    let mut packet = Vec::new();
    for field in fields.chain(environment.iter().map(|variable| variable.as_bytes())) {
        packet.extend(field);
        packet.push(0);
    }
    packet.extend(source.unwrap_or_default());
    packet
}
