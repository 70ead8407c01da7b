//! What the API does: one function for each path and method.

use std::fmt::Display;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::guest_branch::GuestBranches;
use super::http::{Chunks, Request};
use super::rollback::Reception;
use super::snapshot::Snapshots;
use super::types::{ErrorBody, ErrorCode, SandboxView, State, StopRequest, StopView};
use crate::agent::{AGENT_PORT, Agent, ShutdownMode};
use crate::console_log::ConsoleReader;
use crate::devices::virtio::blk::allowance::Allowance;
use crate::exit::{ExitLatch, ExitReason};
use crate::machine::{Machine, RunState};
use crate::metrics::{Facts, Metrics};
use crate::pager::own_pages;
use crate::process_memory::{private_bytes, resident_bytes};
use crate::reaper::Reaper;
use crate::sandbox::SandboxPaths;
use crate::sandbox::record::Record;
use crate::timings::{Timings, millis};

/// The API's description.
pub const OPENAPI: &str = include_str!("openapi.json");

/// What OpenMetrics text is called.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What an exploration adds to the path of its requests.
pub(super) const TRIAL: &str = "trial=true";
/// How often a console that is followed is looked at.
const FOLLOW_PAUSE: Duration = Duration::from_millis(100);
/// What a forced end may take.
const FORCE_PATIENCE: Duration = Duration::from_secs(5);

/// What the API acts on.
pub struct Control {
    /// It, as threads have it that it does not wait for.
    pub(super) myself: Weak<Self>,
    pub(super) record: Record,
    pub(super) paths: SandboxPaths,
    timings: Arc<Timings>,
    pub(super) metrics: Metrics,
    /// It ends where the machine does.
    machine: Weak<Machine>,
    pub(super) exit: ExitLatch,
    agent: Mutex<Option<Agent>>,
    pub(super) reception: Box<dyn Reception>,
    pub(super) snapshots: Snapshots,
    pub(super) reaper: Reaper,
    /// Held by one who makes children out of a budget.
    pub(super) branching: Mutex<()>,
    pub(super) guest_branches: GuestBranches,
    /// What is kept of drives for children.
    pub(super) drive_backup: Arc<Allowance>,
    stopping: AtomicBool,
    /// Only its parent knows of the sandbox, and may have something tried in it.
    unborn: AtomicBool,
}

/// What a request is answered with.
pub enum Reply {
    /// Status 200 and this JSON.
    Json(Vec<u8>),
    /// Status 200 and text of this kind (a media type).
    Text(&'static str, String),
    /// It was sent already.
    Sent,
}

type Handler = fn(&Control, &Request, &mut UnixStream) -> Result<Reply, ErrorBody>;

/// Methods and paths.
const ROUTES: [(&str, &str, Handler); 12] = [
    ("GET", "/v1/sandbox", sandbox),
    ("POST", "/v1/pause", pause),
    ("POST", "/v1/resume", resume),
    ("POST", "/v1/stop", stop),
    ("POST", "/v1/snapshot", snapshot),
    ("POST", "/v1/rollback", rollback),
    ("POST", "/v1/branch", branch),
    ("POST", "/v1/explore", explore),
    ("POST", "/v1/exec", exec),
    ("GET", "/v1/console", console),
    ("GET", "/v1/metrics", metrics),
    ("GET", "/v1/openapi.json", openapi),
];

/// Finds the function for a request, and calls it.
pub fn route(
    control: &Control,
    request: &Request,
    stream: &mut UnixStream,
) -> Result<Reply, ErrorBody> {
    let mut found = false;
    for (method, path, handler) in ROUTES {
        if path == request.path {
            found = true;
            if method == request.method {
                return handler(control, request, stream);
            }
        }
    }
    let (method, path) = (&request.method, &request.path);
    Err(if found {
        let message = format!("{path} does not take {method}");
        ErrorBody::new(ErrorCode::MethodNotAllowed, message)
    } else {
        let message = format!("there is no {path}; GET /v1/openapi.json describes what there is");
        ErrorBody::new(ErrorCode::NotFound, message)
    })
}

fn json(value: &impl Serialize) -> Result<Reply, ErrorBody> {
    serde_json::to_vec(value)
        .map(Reply::Json)
        .map_err(|error| ErrorBody::new(ErrorCode::Internal, error.to_string()))
}

/// The request's body; the default where there is none.
fn body<T: DeserializeOwned + Default>(request: &Request) -> Result<T, ErrorBody> {
    if request.body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&request.body)
        .map_err(|error| ErrorBody::new(ErrorCode::BadBody, format!("the body: {error}")))
}

impl Control {
    /// For the sandbox of `record`. `agent` is a connection that serves for its end, and for what the guest asks; until the sandbox is [born](Self::be_born), for
    /// what its parent tries in it, too.
    pub fn new(
        record: Record,
        paths: SandboxPaths,
        timings: Arc<Timings>,
        machine: &Arc<Machine>,
        agent: Agent,
        reception: Box<dyn Reception>,
        snapshots: Snapshots,
    ) -> Arc<Self> {
        let drive_backup = record.budget.drive_backup_mib;
        let drive_backup = drive_backup.map(|mib| mib.saturating_mul(1 << 20));
        let control = Arc::new_cyclic(|myself| Self {
            myself: myself.clone(),
            record,
            paths,
            timings,
            metrics: Metrics::default(),
            exit: machine.exit().clone(),
            machine: Arc::downgrade(machine),
            agent: Mutex::default(),
            reception,
            snapshots,
            reaper: Reaper::default(),
            branching: Mutex::default(),
            guest_branches: GuestBranches::default(),
            drive_backup: Arc::new(Allowance::new(drive_backup)),
            stopping: AtomicBool::new(false),
            unborn: AtomicBool::new(true),
        });
        control.take_agent(agent);
        control
    }

    /// Has another connection to the guest's agent from now on.
    pub(super) fn take_agent(&self, agent: Agent) {
        self.serve_guest(&agent);
        *self.lock_agent() = Some(agent);
    }

    pub(super) fn machine(&self) -> Result<Arc<Machine>, ErrorBody> {
        let ended = || ErrorBody::new(ErrorCode::Conflict, "the sandbox is ending");
        self.machine.upgrade().ok_or_else(ended)
    }

    /// The connection that its monitor keeps, until its end was asked for.
    pub(super) fn agent(&self) -> Option<Agent> {
        self.lock_agent().clone()
    }

    pub(super) fn lock_agent(&self) -> MutexGuard<'_, Option<Agent>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Others may know of the sandbox from now on.
    pub fn be_born(&self) {
        self.unborn.store(false, Ordering::SeqCst);
    }

    /// A connection to try a program by. Others have one of their own, for a child or a snapshot could not keep one that is at work; before anybody can want
    /// one of those, the one that there is does, at none of the cost. A guest that stands still until somebody wants it goes on.
    fn agent_for_trial(&self) -> Option<Agent> {
        let agent = self.agent()?;
        let machine = self.machine().ok()?;
        let is_unborn = self.unborn.load(Ordering::SeqCst);
        is_unborn.then(|| {
            machine.resume();
            agent
        })
    }

    /// A stop was asked for: an end that the guest makes itself is what was wanted.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Ends the VM: asks the guest, and ends it by force where it has not ended after `patience`. True where it was forced.
    pub fn stop(&self, patience: Duration) -> bool {
        self.stopping.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + patience;
        if !patience.is_zero() {
            if let Some(machine) = self.machine.upgrade() {
                machine.resume();
            }
            self.ask_to_end(deadline, patience);
            if self.wait_for_end(deadline) {
                return self.exit.get() == Some(ExitReason::Stopped);
            }
        }
        self.exit.set(ExitReason::Stopped);
        self.wait_for_end(Instant::now() + FORCE_PATIENCE);
        true
    }

    /// What fails here ends in force.
    fn ask_to_end(&self, deadline: Instant, patience: Duration) {
        let kept = self.lock_agent().take();
        let ask = |agent: &mut Agent| {
            agent.set_deadline(Some(deadline));
            agent.shutdown(ShutdownMode::PowerOff, patience / 2)
        };
        if kept.is_some_and(|mut agent| ask(&mut agent).is_ok()) {
            return;
        }
        let agent = Agent::connect(&self.paths.vsock_socket(), AGENT_PORT, Some(deadline));
        let _ = agent.and_then(|mut agent| ask(&mut agent));
    }

    /// True where the VM has ended.
    fn wait_for_end(&self, deadline: Instant) -> bool {
        loop {
            if self.exit.get().is_some() {
                return true;
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            let timeout = Timespec::try_from(rest).ok();
            let mut fds = [PollFd::from_borrowed_fd(
                self.exit.event().as_fd(),
                PollFlags::IN,
            )];
            // An interrupted wait is taken up again.
            let _ = poll(&mut fds, timeout.as_ref());
        }
    }

    fn view(&self) -> Result<SandboxView, ErrorBody> {
        let state = if self.is_stopping() {
            State::Stopping
        } else {
            self.machine()?.state().into()
        };
        Ok(SandboxView {
            record: self.record.clone(),
            state,
            uptime_ms: millis(self.timings.elapsed()),
            resident_bytes: resident_bytes(),
            private_bytes: private_bytes(std::process::id()),
            vsock: self.paths.vsock_socket().to_string_lossy().into_owned(),
        })
    }
}

fn sandbox(control: &Control, _: &Request, _: &mut UnixStream) -> Result<Reply, ErrorBody> {
    json(&control.view()?)
}

fn refuse_while_stopping(control: &Control) -> Result<(), ErrorBody> {
    if control.is_stopping() {
        let message = "the sandbox is being stopped";
        return Err(ErrorBody::new(ErrorCode::Conflict, message));
    }
    Ok(())
}

fn pause(control: &Control, _: &Request, _: &mut UnixStream) -> Result<Reply, ErrorBody> {
    refuse_while_stopping(control)?;
    let paused = control.machine()?.pause();
    paused.map_err(|error| ErrorBody::new(ErrorCode::Internal, error.to_string()))?;
    json(&control.view()?)
}

fn resume(control: &Control, _: &Request, _: &mut UnixStream) -> Result<Reply, ErrorBody> {
    refuse_while_stopping(control)?;
    control.machine()?.resume();
    json(&control.view()?)
}

fn stop(control: &Control, request: &Request, _: &mut UnixStream) -> Result<Reply, ErrorBody> {
    let StopRequest { deadline_ms } = body(request)?;
    // A day is for ever here, and far from where times overflow.
    let patience = Duration::from_millis(deadline_ms.min(86_400_000));
    let forced = control.stop(patience);
    json(&StopView { forced })
}

fn snapshot(
    control: &Control,
    request: &Request,
    stream: &mut UnixStream,
) -> Result<Reply, ErrorBody> {
    refuse_while_stopping(control)?;
    let request = body(request)?;
    let machine = control.machine()?;
    let agent = control.agent();
    let taken =
        control
            .snapshots
            .take(&machine, agent.as_ref(), &control.record, request, stream)?;
    let phases = [
        ("state", taken.state_us),
        ("freeze", taken.freeze_us),
        ("pause", taken.pause_us),
        ("total", taken.total_us),
    ];
    control.metrics.took("snapshot", &phases);
    json(&taken)
}

fn rollback(control: &Control, request: &Request, _: &mut UnixStream) -> Result<Reply, ErrorBody> {
    refuse_while_stopping(control)?;
    json(&control.rollback(&body(request)?)?)
}

fn branch(
    control: &Control,
    request: &Request,
    stream: &mut UnixStream,
) -> Result<Reply, ErrorBody> {
    refuse_while_stopping(control)?;
    json(&control.branch(body(request)?, None, stream)?)
}

fn explore(
    control: &Control,
    request: &Request,
    stream: &mut UnixStream,
) -> Result<Reply, ErrorBody> {
    refuse_while_stopping(control)?;
    control
        .explore(&body(request)?, stream)
        .map(|()| Reply::Sent)
}

fn exec(control: &Control, request: &Request, stream: &mut UnixStream) -> Result<Reply, ErrorBody> {
    refuse_while_stopping(control)?;
    let body = body(request)?;
    super::exec::check(&body)?;
    let trial = (request.query == TRIAL).then(|| control.agent_for_trial());
    let agent = match trial.flatten() {
        Some(agent) => agent,
        None if control.machine()?.state() == RunState::Paused => {
            let message = "the sandbox is paused: POST /v1/resume first";
            return Err(ErrorBody::new(ErrorCode::Conflict, message));
        }
        None => super::exec::connect(&control.paths)?,
    };
    super::exec::exec(&agent, &control.record, &body, stream).map(|()| Reply::Sent)
}

fn console(
    control: &Control,
    request: &Request,
    stream: &mut UnixStream,
) -> Result<Reply, ErrorBody> {
    let follow = match &*request.query {
        "" | "follow=false" => false,
        "follow=true" => true,
        query => {
            let message = format!("{query:?} is not known here; give follow=true, or nothing");
            return Err(ErrorBody::new(ErrorCode::BadRequest, message));
        }
    };
    let unreadable = |error: std::io::Error| {
        ErrorBody::new(ErrorCode::Internal, format!("the console's file: {error}"))
    };
    let mut reader = ConsoleReader::open(&control.paths.console()).map_err(unreadable)?;
    let mut send = |stream: &mut UnixStream| -> std::io::Result<()> {
        let mut chunks = Chunks::start(&mut *stream, "text/plain; charset=utf-8")?;
        let mut buffer = [0; 16 << 10];
        loop {
            let over = control.exit.get().is_some();
            while let count @ 1.. = reader.read(&mut buffer)? {
                chunks.write(&buffer[..count])?;
            }
            if over || !follow || client_is_gone(chunks.stream()) {
                return chunks.end();
            }
            control.wait_for_end(Instant::now() + FOLLOW_PAUSE);
        }
    };
    // It fails where the client is gone.
    let _ = send(stream);
    Ok(Reply::Sent)
}

fn metrics(control: &Control, _: &Request, _: &mut UnixStream) -> Result<Reply, ErrorBody> {
    let internal = |error: &dyn Display| ErrorBody::new(ErrorCode::Internal, error.to_string());
    let machine = control.machine()?;
    let pager = machine.pager();
    let chain = pager.as_ref().map(|pager| &**pager.chain());
    // Without it the rest can be told all the same.
    let own_pages = own_pages(machine.memory(), chain).ok();
    let facts = Facts {
        id: &control.record.id,
        name: &control.record.name,
        uptime: control.timings.elapsed(),
        resident_bytes: resident_bytes(),
        private_bytes: private_bytes(std::process::id()),
        start: control.timings.all(),
        own_pages,
        pager: pager.map(|pager| pager.stats()),
    };
    let text = control.metrics.text(facts);
    let text = text.map_err(|error| internal(&error))?;
    Ok(Reply::Text(METRICS_TYPE, text))
}

/// A client that has closed its end reads nothing more. One that has only ended its requests counts as gone as well.
pub fn client_is_gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

fn openapi(_: &Control, _: &Request, _: &mut UnixStream) -> Result<Reply, ErrorBody> {
    Ok(Reply::Json(OPENAPI.as_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_description_has_the_paths_that_there_are() {
        let description: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let paths = description["paths"].as_object().unwrap();
        let described: BTreeSet<_> = paths
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().unwrap().keys();
                methods.map(move |method| (method.to_uppercase(), path.clone()))
            })
            .collect();
        let routes = ROUTES.map(|(method, path, _)| (method.to_owned(), path.to_owned()));
        assert_eq!(described, BTreeSet::from(routes));
    }
}
