//! What the guest asks of the host: children of itself. Whoever has the connection's agent may say what is done then; otherwise it is refused.
//!
//! Each is dealt with by a thread of its own, which lasts until the guest has heard the answer: so the connection is read meanwhile. An
//! agent that asks on before that is not one of ours, and few threads are all it gets.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};

use guest_agent::proto::{BranchWanted, Branched, from_agent, to_agent};

use super::inbox::Broken;
use super::link::{Link, Owner, Request, lock};
use super::{Agent, AgentError, UNEXPECTED};

/// The most that are dealt with at once: one, and others whose answer is on its way.
const ASKS_MAX: u32 = 4;

/// Does what is asked, for as long as the connection, which is given, lasts: the names of the children, or a line that says why there are none.
pub type Answerer = dyn Fn(&BranchWanted, &UnixStream) -> Result<Vec<String>, String> + Send + Sync;

impl Agent {
    /// Has `answerer` deal with what this guest asks from now on.
    pub fn answer_with(&self, answerer: Arc<Answerer>) {
        *lock(&self.owner.0.answerer) = Some(answerer);
    }
}

/// Deals with what was asked on the connection `link`, elsewhere.
pub(super) fn deal_with(link: &Arc<Link>, wanted: BranchWanted) -> Result<(), Broken> {
    {
        let mut asks = lock(&link.asks);
        if *asks >= ASKS_MAX {
            return Err(Broken::Protocol("more asked at once than may be"));
        }
        *asks += 1;
    }
    let owner = lock(&link.owner).clone();
    let link = link.clone();
    let thread = std::thread::Builder::new().name("guest-ask".into());
    let spawned = thread.spawn({
        let link = link.clone();
        move || {
            let answerer = lock(&link.answerer).clone();
            let answer = match answerer {
                Some(answerer) => answerer(&wanted, link.socket()),
                None => Err("the host does not allow it".to_owned()),
            };
            // Where it cannot be said, there is nobody any more to say it to.
            let _ = tell(&owner, wanted.ask, answer);
            *lock(&link.asks) -= 1;
        }
    });
    if let Err(error) = spawned {
        *lock(&link.asks) -= 1;
        log::warn!("no thread for what the guest asks: {error}");
        return Err(Broken::Protocol("what it asks cannot be answered"));
    }
    Ok(())
}

/// Tells the guest that asked what has come of it.
fn tell(
    owner: &Weak<Owner>,
    ask: u64,
    answer: Result<Vec<String>, String>,
) -> Result<(), AgentError> {
    let owner = owner.upgrade().ok_or(AgentError::Disconnected)?;
    let (names, refused) = match answer {
        Ok(names) => (names, String::new()),
        Err(why) => (Vec::new(), why),
    };
    let branched = Branched {
        ask,
        names,
        refused,
    };
    match Request::start(&owner, to_agent::Kind::Branched(branched))?.end()? {
        from_agent::Kind::Done(_) => Ok(()),
        _ => Err(UNEXPECTED),
    }
}
