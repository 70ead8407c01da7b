//! Snapshots made of others: flattened, against another parent, from a packed file.

use std::fs::{self, File};
use std::path::Path;

use snapshot_fmt::manifest::{FileEntry, Manifest, STATE, WORKING_SET, is_name};
use snapshot_fmt::ops;
use snapshot_fmt::pack::{self, Pack};
use snapshot_fmt::snapshot::Snapshot;

use super::error::io_error;
use super::{Draft, Held, Store, StoreError};
use crate::sandbox::record::now;

impl Store {
    /// A snapshot of the same content that rests on no other. It keeps the name, unless another is given.
    pub fn flatten(&self, snapshot: &Snapshot, name: Option<&str>) -> Result<Held, StoreError> {
        self.derive(snapshot, None, name)
    }

    /// A snapshot of the same content that rests on `parent`.
    pub fn rebase(
        &self,
        snapshot: &Snapshot,
        parent: &Snapshot,
        name: Option<&str>,
    ) -> Result<Held, StoreError> {
        self.derive(snapshot, Some(parent), name)
    }

    fn derive(
        &self,
        snapshot: &Snapshot,
        parent: Option<&Snapshot>,
        name: Option<&str>,
    ) -> Result<Held, StoreError> {
        if let Some(name) = name.filter(|name| !is_name(name)) {
            return Err(StoreError::BadName {
                name: name.to_owned(),
            });
        }
        let draft = self.begin()?;
        let mut manifest = Manifest {
            parent: parent.map(Snapshot::id),
            created: now(),
            ..snapshot.manifest().clone()
        };
        if let Some(name) = name {
            manifest.name = Some(name.to_owned());
        }
        for entry in &mut manifest.files {
            if entry.name == STATE {
                snapshot.verify_state()?;
                copy(&snapshot.path(STATE), &draft.path().join(STATE))?;
            } else {
                self.derive_layer(snapshot, parent, &draft, entry)?;
            }
        }
        let working_set = snapshot.path(WORKING_SET);
        if working_set.exists() {
            copy(&working_set, &draft.path().join(WORKING_SET))?;
        }
        draft.publish(manifest)
    }

    fn derive_layer(
        &self,
        snapshot: &Snapshot,
        parent: Option<&Snapshot>,
        draft: &Draft,
        entry: &mut FileEntry,
    ) -> Result<(), StoreError> {
        let chain = self.chain(snapshot, &entry.name)?;
        let path = draft.path().join(&entry.name);
        let file = File::create_new(&path).map_err(io_error("make", &path))?;
        let below = parent.filter(|parent| parent.manifest().file(&entry.name).is_some());
        let (summary, _) = match below {
            None => ops::flatten(&chain, file, &path)?,
            Some(parent) => ops::rebase(&chain, &self.chain(parent, &entry.name)?, file, &path)?,
        };
        entry.bytes = summary.bytes;
        entry.digest = summary.digest;
        Ok(())
    }

    /// Adds a packed snapshot, all of it checked. What it rests on must be here.
    pub fn unpack(&self, path: &Path) -> Result<Held, StoreError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let pack = Pack::open(file, path)?;
        let id = pack.manifest().id;
        if self.path(&id).exists() {
            return self.hold(&id.to_string());
        }
        if let Some(parent) = pack
            .manifest()
            .parent
            .filter(|parent| !self.path(parent).exists())
        {
            return Err(StoreError::NoParent { child: id, parent });
        }
        let draft = self.begin()?;
        let snapshot = pack.unpack(draft.path())?;
        draft.publish(snapshot.manifest().clone())
    }
}

/// Packs `snapshot` into the new file `path`. Returns its length in bytes.
pub fn pack(snapshot: &Snapshot, path: &Path) -> Result<u64, StoreError> {
    let file = File::create_new(path).map_err(io_error("make", path))?;
    let packed = pack::pack(snapshot, &file, path).map_err(StoreError::from);
    let synced = packed.and_then(|bytes| {
        file.sync_all().map_err(io_error("sync", path))?;
        Ok(bytes)
    });
    if synced.is_err() {
        // It is no packed snapshot; the first failure is the one to tell.
        let _ = fs::remove_file(path);
    }
    synced
}

fn copy(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::copy(from, to).map_err(io_error("copy", from))?;
    Ok(())
}
