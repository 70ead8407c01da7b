//! `POST /v1/rollback`: takes the sandbox back, in place: to what it began with, or to a snapshot.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

use snapshot_fmt::manifest::Machine as Description;
use snapshot_fmt::state::agent::AgentState;

use super::routes::Control;
use super::snapshot::{Past, code};
use super::types::{ErrorBody, ErrorCode, RollbackRequest, RollbackView};
use crate::agent::Agent;
use crate::exit::ExitReason;
use crate::machine::{Machine, Moment, RewindError};
use crate::pager::Mode;
use crate::pool::kind;
use crate::snapshot::restore::{Base, Saved};
use crate::store::Store;
use crate::timings::micros;

/// Where the agent of a guest that was taken back is received.
pub trait Reception: Send + Sync {
    /// Where it calls if its connection did not survive.
    fn listen(&self) -> Result<UnixListener, String>;

    /// When the sandbox's time is over, if it is bounded.
    fn deadline(&self) -> Option<Instant>;

    /// The agent of `machine`'s guest, which was saved with `state`, once that has become a guest of its own.
    fn receive(
        &self,
        machine: &Machine,
        ready: UnixListener,
        state: Option<&AgentState>,
    ) -> Result<Agent, String>;
}

fn conflict(message: impl ToString) -> ErrorBody {
    ErrorBody::new(ErrorCode::Conflict, message.to_string())
}

fn internal(message: impl ToString) -> ErrorBody {
    ErrorBody::new(ErrorCode::Internal, message.to_string())
}

/// What a machine is, in words, as far as it decides what can be gone back to.
fn words(machine: &Description) -> String {
    let bytes: u64 = machine.memory.iter().map(|range| range.bytes).sum();
    format!(
        "{} CPUs, {} MiB, {} drives, kernel {}",
        machine.cpus,
        bytes >> 20,
        machine.drives.len(),
        machine.kernel.path
    )
}

impl Control {
    /// Takes the sandbox back to where `request` says. Whatever ran in it has never been; its clients lose their connections.
    pub(super) fn rollback(&self, request: &RollbackRequest) -> Result<RollbackView, ErrorBody> {
        let start = Instant::now();
        let machine = self.machine()?;
        let mut view = None;
        self.snapshots.change_past(|past| {
            let (to, base) = self.target(past, request.snapshot.as_deref())?;
            let is_origin = past.began.as_ref().is_some_and(|began| same(began, &to));
            let pages = (!is_origin).then(|| to.pages()).transpose();
            let moment = Moment {
                state: Arc::clone(&to.state),
                pages: pages.map_err(internal)?,
                backings: to.backings.clone(),
                dir: self.paths.dir().to_owned(),
            };
            // One rollback at a time has the place where the agent calls.
            let ready = self.reception.listen().map_err(internal)?;
            let rewound = machine.rewind(moment).map_err(|error| match error {
                RewindError::StandStill(_) | RewindError::Broken(_) => internal(error),
                error => conflict(error),
            })?;
            // What it was asked and has not done will never be.
            self.lock_agent().take();
            let agent = self
                .reception
                .receive(&machine, ready, to.state.agent.as_ref())
                .map_err(|why| {
                    let why = format!("the guest that was taken back is not fit for work: {why}");
                    self.exit.set(ExitReason::Monitor(why.clone()));
                    internal(why)
                })?;
            self.take_agent(agent);
            if !is_origin {
                *past = Past {
                    began: Some(to),
                    base,
                };
            }
            view = Some(rewound);
            Ok::<_, ErrorBody>(())
        })?;
        let rewound = view.ok_or_else(|| internal("it was not taken back"))?;
        let view = RollbackView {
            pages: rewound.pages,
            pause_us: micros(rewound.pause),
            total_us: micros(start.elapsed()),
        };
        let phases = [("pause", view.pause_us), ("total", view.total_us)];
        self.metrics.took("rollback", &phases);
        Ok(view)
    }

    /// What to go back to, and the snapshot that differences are taken to then.
    fn target(
        &self,
        past: &Past,
        snapshot: Option<&str>,
    ) -> Result<(Arc<Saved>, Option<Base>), ErrorBody> {
        let Some(reference) = snapshot else {
            let began = past.began.clone().ok_or_else(|| {
                conflict("the sandbox has booted by itself: name a snapshot to go back to")
            })?;
            return Ok((began, past.base.clone()));
        };
        let refused = |error| ErrorBody::new(code(&error), error.to_string());
        let store = Store::of_user().map_err(|error| refused(error.into()))?;
        let saved = Saved::open(&store, reference, Mode::Map).map_err(refused)?;
        let (own, other) = (&self.snapshots.machine, &saved.machine);
        if kind(own) != kind(other) || own.kernel != other.kernel {
            return Err(conflict(format!(
                "{reference} is of another machine ({}; this one: {}): restore it instead",
                words(other),
                words(own)
            )));
        }
        let base = saved.base.clone();
        Ok((Arc::new(saved), base))
    }
}

/// Whether both are the same moment.
fn same(one: &Arc<Saved>, other: &Arc<Saved>) -> bool {
    let id = |saved: &Saved| saved.base.as_ref().map(|base| base.held.snapshot().id());
    let depth = |saved: &Saved| saved.memory.known().map(|chain| chain.layers().len());
    Arc::ptr_eq(one, other)
        || id(one).is_some() && id(one) == id(other) && depth(one) == depth(other)
}
