//! `POST /v1/snapshot`: saves the sandbox while it runs on.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use rustix::net::sockopt::socket_peercred;
use snapshot_fmt::chain::Chain;
use snapshot_fmt::manifest::{Machine as Description, Programs};

use super::routes::client_is_gone;
use super::types::{ErrorBody, ErrorCode, SnapshotRequest, SnapshotView};
use crate::agent::Agent;
use crate::devices::virtio::blk::backup::Moment;
use crate::machine::Machine;
use crate::sandbox::record::Record;
use crate::snapshot::SnapshotError;
use crate::snapshot::chains::Chains;
use crate::snapshot::memory_layer::Lineage;
use crate::snapshot::restore::{Base, Saved};
use crate::snapshot::save::{Order, Taken, take};
use crate::store::{Owner, Store, StoreError};
use crate::timings::micros;

/// What a sandbox's next snapshot is a difference to: the one that it goes back to, or the last that was taken.
struct Parent {
    snapshot: Base,
    /// As [`Lineage::covered`].
    covered: usize,
}

impl Parent {
    fn of(past: &Past) -> Option<Self> {
        past.base.clone().map(|snapshot| Self {
            covered: snapshot.chains.memory.layers().len(),
            snapshot,
        })
    }
}

/// What a sandbox goes back to.
pub struct Past {
    /// What its machine began with, if that was saved.
    pub began: Option<Arc<Saved>>,
    /// The snapshot that this begins with, if it is one of the user's.
    pub base: Option<Base>,
}

impl Past {
    /// What its memory began with.
    pub fn origin(&self) -> Option<&Chain> {
        let memory = self.began.as_ref()?.memory.known()?;
        Some(memory)
    }
}

/// A sandbox's snapshots: one at a time.
pub struct Snapshots {
    /// What the machine is, and its disks were when it was made.
    pub machine: Description,
    past: RwLock<Past>,
    /// What the next snapshot is a difference to. Locked after the past.
    parent: Mutex<Option<Parent>>,
}

impl Snapshots {
    /// For a `machine`. Where its past begins with a snapshot of the user's, its first snapshot is a difference to that.
    pub fn new(machine: Description, past: Past) -> Self {
        Self {
            machine,
            parent: Mutex::new(Parent::of(&past)),
            past: RwLock::new(past),
        }
    }

    /// What the sandbox goes back to. It stays so meanwhile.
    pub fn past(&self) -> RwLockReadGuard<'_, Past> {
        self.past.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `change` take the machine back to another past, while nobody saves or branches it.
    pub fn change_past<E>(&self, change: impl FnOnce(&mut Past) -> Result<(), E>) -> Result<(), E> {
        let mut past = self.past.write().unwrap_or_else(PoisonError::into_inner);
        let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut past)?;
        *parent = Parent::of(&past);
        Ok(())
    }

    /// Takes one for `client`, and gives it up where that has gone away. Others wait.
    pub fn take(
        &self,
        machine: &Machine,
        agent: Option<&Agent>,
        record: &Record,
        request: SnapshotRequest,
        client: &UnixStream,
    ) -> Result<SnapshotView, ErrorBody> {
        self.try_take(machine, agent, record, request, client)
            .map_err(|error| ErrorBody::new(code(&error), error.to_string()))
    }

    fn try_take(
        &self,
        machine: &Machine,
        agent: Option<&Agent>,
        record: &Record,
        request: SnapshotRequest,
        client: &UnixStream,
    ) -> Result<SnapshotView, SnapshotError> {
        let store = Store::of_user()?;
        let past = self.past();
        let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        let base = parent.as_ref().filter(|_| !request.full);
        let order = Order {
            machine,
            description: &self.machine,
            agent,
            programs: programs(record),
            warm: record.warm.as_ref().map(Into::into),
            // One that has a name is to stay.
            owner: Some(client)
                .filter(|_| request.aside && request.name.is_none())
                .and_then(owner),
            name: request.name,
            lineage: Lineage {
                origin: past.origin(),
                parent: base.map(|parent| &*parent.snapshot.chains.memory),
                covered: base.map_or(0, |parent| parent.covered),
                in_memory: false,
            },
            parent_disks: base.map(|parent| &parent.snapshot.chains.disks),
            parent: base.map(|parent| parent.snapshot.held.snapshot().id()),
            is_given_up: &|| client_is_gone(client),
        };
        let Taken {
            held,
            memory,
            disks,
            times,
        } = take(order, &store)?;
        let manifest = held.snapshot().manifest().clone();
        match Chains::open(&store, held.snapshot()) {
            _ if request.aside => {}
            Ok(chains) => {
                disks.into_iter().for_each(Moment::keep);
                *parent = Some(Parent {
                    snapshot: Base {
                        chains,
                        held: Arc::new(held),
                    },
                    covered: usize::MAX,
                });
            }
            // It is taken all the same.
            Err(error) => {
                log::warn!("the next snapshot will not be a difference to this one: {error}");
            }
        }
        Ok(SnapshotView {
            id: manifest.id.to_string(),
            name: manifest.name,
            parent: manifest.parent.map(|id| id.to_string()),
            bytes: manifest.files.iter().map(|file| file.bytes).sum(),
            data_pages: memory.data_pages,
            zero_pages: memory.zero_pages,
            state_us: micros(times.state),
            freeze_us: micros(times.freeze),
            pause_us: micros(times.pause),
            total_us: micros(times.total),
        })
    }
}

/// The process at the other end of a connection, if it is one of this host's.
fn owner(client: &UnixStream) -> Option<Owner> {
    let peer = socket_peercred(client).ok()?;
    Owner::of(u32::try_from(peer.pid.as_raw_nonzero().get()).ok()?)
}

/// How programs are run in the sandbox of `record`.
pub fn programs(record: &Record) -> Programs {
    Programs {
        env: record.env.clone(),
        cwd: record.cwd.clone(),
        user: record.user.clone(),
    }
}

pub(super) fn code(error: &SnapshotError) -> ErrorCode {
    match error {
        SnapshotError::Store(
            StoreError::BadName { .. }
            | StoreError::Unknown { .. }
            | StoreError::Ambiguous { .. }
            | StoreError::Gone { .. },
        ) => ErrorCode::BadBody,
        _ => ErrorCode::Internal,
    }
}
