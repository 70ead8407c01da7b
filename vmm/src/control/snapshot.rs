//! `POST /v1/snapshot`: saves the sandbox while it runs on.

use std::sync::{Arc, Mutex, PoisonError};

use snapshot_fmt::chain::Chain;
use snapshot_fmt::manifest::{MEMORY, Programs};

use super::types::{ErrorBody, ErrorCode, SnapshotRequest, SnapshotView};
use crate::agent::Agent;
use crate::config::VmConfig;
use crate::machine::Machine;
use crate::sandbox::record::Record;
use crate::snapshot::SnapshotError;
use crate::snapshot::memory_layer::Lineage;
use crate::snapshot::save::{Order, Taken, take};
use crate::store::{Held, Store, StoreError};

/// What a sandbox's next snapshot is a difference to: the one that it was restored from, or the last that was taken.
pub struct Parent {
    /// It; nobody can remove it.
    pub held: Arc<Held>,
    /// Its memory.
    pub chain: Arc<Chain>,
}

/// A sandbox's snapshots: one at a time.
pub struct Snapshots {
    config: VmConfig,
    /// What the machine's memory began with.
    origin: Option<Arc<Chain>>,
    parent: Mutex<Option<Parent>>,
}

impl Snapshots {
    /// For the machine of `config`, whose memory began with `origin`, and whose first snapshot is a difference to `parent`: the
    /// snapshot that it was restored from, if it is one of the user's.
    pub fn new(config: VmConfig, origin: Option<Arc<Chain>>, parent: Option<Parent>) -> Self {
        Self {
            config,
            origin,
            parent: Mutex::new(parent),
        }
    }

    /// Takes one. Others wait.
    pub fn take(
        &self,
        machine: &Machine,
        agent: Option<&Agent>,
        record: &Record,
        request: SnapshotRequest,
    ) -> Result<SnapshotView, ErrorBody> {
        self.try_take(machine, agent, record, request)
            .map_err(|error| ErrorBody::new(code(&error), error.to_string()))
    }

    fn try_take(
        &self,
        machine: &Machine,
        agent: Option<&Agent>,
        record: &Record,
        request: SnapshotRequest,
    ) -> Result<SnapshotView, SnapshotError> {
        let store = Store::of_user()?;
        let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        let base = parent.as_ref().filter(|_| !request.full);
        let order = Order {
            machine,
            config: &self.config,
            agent,
            programs: Programs {
                env: record.env.clone(),
                cwd: record.cwd.clone(),
                user: record.user.clone(),
            },
            warm: record.warm.as_ref().map(Into::into),
            name: request.name,
            lineage: Lineage {
                origin: self.origin.as_deref(),
                parent: base.map(|parent| &*parent.chain),
            },
            parent: base.map(|parent| parent.held.snapshot().id()),
        };
        let Taken {
            held,
            memory,
            times,
        } = take(order, &store)?;
        let manifest = held.snapshot().manifest().clone();
        match store.chain(held.snapshot(), MEMORY) {
            Ok(chain) => {
                *parent = Some(Parent {
                    chain: Arc::new(chain),
                    held: Arc::new(held),
                });
            }
            // It is taken all the same.
            Err(error) => {
                log::warn!("the next snapshot will not be a difference to this one: {error}");
            }
        }
        let micros =
            |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
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

fn code(error: &SnapshotError) -> ErrorCode {
    match error {
        SnapshotError::WritableDrive { .. } => ErrorCode::Conflict,
        SnapshotError::Store(StoreError::BadName { .. }) => ErrorCode::BadBody,
        _ => ErrorCode::Internal,
    }
}
