//! Interim.
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use snapshot_fmt::chain::Chain;
use snapshot_fmt::layer::Layer;
use snapshot_fmt::manifest::{MANIFEST, Manifest};

use super::SnapshotError;

pub struct Store {
    root: PathBuf,
}
pub struct Draft {
    root: PathBuf,
    path: PathBuf,
}

impl Store {
    pub fn open() -> Result<Self, SnapshotError> {
        let base = std::env::var_os("XDG_DATA_HOME")
            .map(PathBuf::from)
            .or_else(|| {
                std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"))
            })
            .unwrap_or_default();
        let root = base.join("bough/snapshots");
        fs::create_dir_all(&root).map_err(io_error(&root))?;
        Ok(Self { root })
    }
    pub fn begin(&self) -> Result<Draft, SnapshotError> {
        let path = self.root.join(format!("tmp-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).map_err(io_error(&path))?;
        Ok(Draft {
            root: self.root.clone(),
            path,
        })
    }
    pub fn find(&self, reference: &str) -> Result<(PathBuf, Manifest), SnapshotError> {
        for entry in fs::read_dir(&self.root).map_err(io_error(&self.root))? {
            let dir = entry.map_err(io_error(&self.root))?.path();
            let path = dir.join(MANIFEST);
            let Ok(file) = File::open(&path) else {
                continue;
            };
            let manifest = Manifest::read(file, &path)?;
            if manifest.name.as_deref() == Some(reference)
                || manifest.id.to_string().starts_with(reference)
            {
                return Ok((dir, manifest));
            }
        }
        Err(SnapshotError::Description {
            what: format!("no snapshot {reference}"),
        })
    }
    pub fn open_chain(&self, manifest: &Manifest) -> Result<Chain, SnapshotError> {
        let mut layers = Vec::new();
        let mut next = Some(manifest.id);
        while let Some(id) = next {
            let dir = self.root.join(id.to_string());
            let path = dir.join(MANIFEST);
            let manifest = Manifest::read(File::open(&path).map_err(io_error(&path))?, &path)?;
            let path = dir.join(super::MEMORY);
            layers.push(Layer::open(
                File::open(&path).map_err(io_error(&path))?,
                &path,
            )?);
            next = manifest.parent;
        }
        layers.reverse();
        Chain::new(layers).map_err(|error| SnapshotError::Description {
            what: error.to_string(),
        })
    }
}

impl Draft {
    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn publish(self, mut manifest: Manifest) -> Result<Manifest, SnapshotError> {
        let path = self.path.join(MANIFEST);
        let json = manifest.seal(&path)?;
        fs::write(&path, json).map_err(io_error(&path))?;
        let to = self.root.join(manifest.id.to_string());
        fs::rename(&self.path, &to).map_err(io_error(&to))?;
        Ok(manifest)
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError + use<> {
    let path = path.to_owned();
    move |source| SnapshotError::Io { path, source }
}
