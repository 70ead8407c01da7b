//! Children that the guest itself asks for, as far as its user lets it (`--guest-branch`).
//!
//! The guest is hostile. It says how many, within what it may have alive at a time, and nothing else: not what they are called, nor what they
//! may use. Children are made one call after the other, with a rest between calls, may make none themselves, end when their parent's time is over,
//! and leave nothing when they end. What the guest hears is who they are, or a reason that says nothing of the host; the monitor's log has the real one.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::routes::Control;
use super::types::{BranchRequest, ErrorBody};
use crate::agent::{Agent, BranchWanted};
use crate::sandbox::list::all;
use crate::timings::millis;

/// The shortest rest between two calls. It is as long as the last call took, where that was longer: so a guest has at most half of what making
/// children takes of the host.
const REST: Duration = Duration::from_millis(100);

/// The most refusals that the log tells: a guest may ask for ever.
const LOGGED_MAX: u32 = 32;

/// What the guest has asked for so far.
#[derive(Default)]
pub(super) struct GuestBranches(Mutex<State>);

#[derive(Default)]
struct State {
    /// Ids of the children that were there when it was last looked.
    children: Vec<String>,
    /// When the next may be made.
    rested: Option<Instant>,
    /// How many refusals the log has told.
    logged: u32,
}

impl Control {
    /// Has what `agent`'s guest asks dealt with here, if it may ask anything.
    pub(super) fn serve_guest(&self, agent: &Agent) {
        if self.record.guest_branch == 0 {
            return;
        }
        let control = self.myself.clone();
        agent.answer_with(Arc::new(move |wanted, client| {
            let control = control.upgrade().ok_or("the host is ending this VM")?;
            control.branch_for_guest(wanted, client)
        }));
    }

    fn branch_for_guest(
        &self,
        wanted: &BranchWanted,
        client: &UnixStream,
    ) -> Result<Vec<String>, String> {
        let state = &self.guest_branches.0;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rested) = state.rested {
            std::thread::sleep(rested.saturating_duration_since(Instant::now()));
        }
        let start = Instant::now();
        let result = self.make(&mut state, wanted, client);
        state.rested = Some(Instant::now() + start.elapsed().max(REST));
        result
    }

    fn make(
        &self,
        state: &mut State,
        wanted: &BranchWanted,
        client: &UnixStream,
    ) -> Result<Vec<String>, String> {
        let State {
            children, logged, ..
        } = state;
        let mut refused = |error: &dyn std::fmt::Display| {
            if *logged < LOGGED_MAX {
                *logged += 1;
                log::warn!("the guest wants {} children: {error}", wanted.count);
            }
            "the host cannot make them now".to_owned()
        };
        if !children.is_empty() {
            let listed = all().map_err(|error| refused(&error))?;
            // One that was killed has left its directory, which takes room.
            children.retain(|id| listed.iter().any(|of| of.record.id == *id));
        }
        check(children.len(), wanted.count, self.record.guest_branch)?;
        if self.is_stopping() {
            return Err("the host is ending this VM".to_owned());
        }
        // No guest gets more time than it was given.
        let deadline = self.reception.deadline();
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let request = BranchRequest {
            count: wanted.count,
            ttl_ms: left.map(millis),
            ..BranchRequest::default()
        };
        let view = self
            .branch(request, Some(wanted.ask), client)
            .map_err(|error: ErrorBody| refused(&error.message))?;
        children.extend(view.children.iter().map(|child| child.id.clone()));
        Ok(view.children.into_iter().map(|child| child.name).collect())
    }
}

/// Refuses more children than `most` at a time.
fn check(living: usize, wanted: u32, most: u32) -> Result<(), String> {
    let most = u64::from(most);
    if (living as u64).saturating_add(wanted.into()) <= most {
        return Ok(());
    }
    Err(format!(
        "this VM may have {most} children alive at a time that it has asked for, and has {living}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_may_be_are_alive() {
        assert!(check(0, 3, 3).is_ok());
        assert!(check(1, 3, 3).unwrap_err().contains("3 children"));
        assert!(check(0, u32::MAX, 3).is_err());
        assert!(check(usize::MAX, 1, u32::MAX).is_err());
    }
}
