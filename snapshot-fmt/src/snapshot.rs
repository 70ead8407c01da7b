//! A snapshot's directory: its manifest, and its files as the manifest has them.
//!
//! Every file is opened by the manifest's entry and must have the length and digest that stand there.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::digest::Digest;
use crate::error::FormatError;
use crate::file::open;
use crate::header::Kind;
use crate::layer::Layer;
use crate::manifest::{FileEntry, MANIFEST, MEMORY, Manifest, STATE, WORKING_SET};
use crate::{state_file, working_set};

/// A snapshot whose manifest has been read.
#[derive(Debug, Clone)]
pub struct Snapshot {
    dir: PathBuf,
    manifest: Manifest,
}

impl Snapshot {
    /// Reads the manifest in `dir`. Whoever knows the id that it must have compares it.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let path = dir.join(MANIFEST);
        Ok(Self {
            manifest: Manifest::read(open(&path, "the manifest")?, &path)?,
            dir: dir.to_owned(),
        })
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The digest of its manifest.
    pub fn id(&self) -> Digest {
        self.manifest.id
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where its file `name` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The names of its layers.
    pub fn layer_names(&self) -> impl Iterator<Item = &str> {
        let names = self.manifest.files.iter().map(|file| file.name.as_str());
        names.filter(|name| *name != STATE)
    }

    /// Opens a layer; its pages are checked as they are read.
    pub fn layer(&self, name: &str) -> Result<Layer, FormatError> {
        let entry = self.entry(name)?;
        let path = self.path(name);
        let layer = Layer::open(open(&path, Kind::Layer.name())?, &path)?;
        self.check(&path, entry, layer.bytes(), layer.digest())?;
        match self.manifest.machine.pages_of(name) {
            Some(pages) if pages != layer.total_pages() => {
                let what = "the layer spans another memory or disk than the manifest describes";
                Err(corrupt(&path, what))
            }
            _ => Ok(layer),
        }
    }

    /// Reads the state.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T, FormatError> {
        let entry = self.entry(STATE)?;
        let path = self.path(STATE);
        let (state, written) = state_file::read(open(&path, Kind::State.name())?, &path)?;
        self.check(&path, entry, written.bytes, written.digest)?;
        Ok(state)
    }

    /// Reads the working set of its memory; `None` where there is none.
    pub fn working_set(&self) -> Result<Option<Vec<u64>>, FormatError> {
        let path = self.path(WORKING_SET);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            _ => open(&path, Kind::WorkingSet.name())?,
        };
        let total_pages = self.manifest.machine.total_pages().unwrap_or(0);
        working_set::read(file, &path, total_pages).map(Some)
    }

    /// Reads the state and checks its digests, without knowing what states there are.
    pub fn verify_state(&self) -> Result<(), FormatError> {
        let entry = self.entry(STATE)?;
        let path = self.path(STATE);
        let written = state_file::verify(open(&path, Kind::State.name())?, &path)?;
        self.check(&path, entry, written.bytes, written.digest)
    }

    /// Reads everything and checks it.
    pub fn verify(&self) -> Result<(), FormatError> {
        self.verify_state()?;
        self.entry(MEMORY)?;
        for name in self.layer_names() {
            self.layer(name)?.verify()?;
        }
        self.working_set().map(drop)
    }

    fn entry(&self, name: &str) -> Result<&FileEntry, FormatError> {
        let what = || {
            corrupt(
                &self.path(MANIFEST),
                &format!("the manifest lists no {name}"),
            )
        };
        self.manifest.file(name).ok_or_else(what)
    }

    fn check(
        &self,
        path: &Path,
        entry: &FileEntry,
        bytes: u64,
        digest: Digest,
    ) -> Result<(), FormatError> {
        if (bytes, digest) == (entry.bytes, entry.digest) {
            return Ok(());
        }
        Err(corrupt(
            path,
            "it is not the file that the manifest lists, but another of its kind",
        ))
    }
}

fn corrupt(path: &Path, what: &str) -> FormatError {
    FormatError::Corrupt {
        file: path.to_owned(),
        offset: 0,
        what: what.to_owned(),
    }
}
