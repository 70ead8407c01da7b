//! Directories and names: list, stat, remove, make, rename.

use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use guest_agent::proto::{FileInfo, FileKind, List, MakeDirectory, Remove, Rename, Stat};

use super::{Records, failed, path};
use crate::failure::Failure;

fn info(name: &[u8], path: &Path, metadata: &Metadata) -> FileInfo {
    let kind = metadata.file_type();
    let kind = if kind.is_file() {
        FileKind::File
    } else if kind.is_dir() {
        FileKind::Directory
    } else if kind.is_symlink() {
        FileKind::Symlink
    } else {
        FileKind::Other
    };
    let target = match kind {
        FileKind::Symlink => std::fs::read_link(path).unwrap_or_default(),
        _ => Default::default(),
    };
    FileInfo {
        name: name.to_vec(),
        kind: kind.into(),
        size: metadata.size(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime_seconds: metadata.mtime(),
        mtime_nanos: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
        target: target.into_os_string().into_encoded_bytes(),
    }
}

/// Carries out `List`.
pub fn list(request: &List) -> Result<(), Failure> {
    let path = path(&request.path);
    let fail = |error: io::Error| failed(path, &error);
    let mut records = Records::default();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        // What is gone by now is not in there any more.
        if let Ok(metadata) = entry.metadata() {
            let name = entry.file_name();
            records.push(&info(name.as_bytes(), &entry.path(), &metadata))?;
        }
    }
    records.send()
}

/// Carries out `Stat`.
pub fn stat(request: &Stat) -> Result<(), Failure> {
    let path = path(&request.path);
    let metadata = if request.follow {
        path.metadata()
    } else {
        path.symlink_metadata()
    };
    let metadata = metadata.map_err(|error| failed(path, &error))?;
    let mut records = Records::default();
    records.push(&info(&request.path, path, &metadata))?;
    records.send()
}

/// Carries out `Remove`.
pub fn remove(request: &Remove) -> Result<(), Failure> {
    let path = path(&request.path);
    let is_directory = path.symlink_metadata().map(|metadata| metadata.is_dir());
    let result = match (is_directory, request.recursive) {
        (Err(error), _) => Err(error),
        (Ok(true), true) => std::fs::remove_dir_all(path),
        (Ok(true), false) => std::fs::remove_dir(path),
        (Ok(false), _) => std::fs::remove_file(path),
    };
    result.map_err(|error| failed(path, &error))
}

/// Carries out `MakeDirectory`.
pub fn make(request: &MakeDirectory) -> Result<(), Failure> {
    let path = path(&request.path);
    let mode = request.mode.unwrap_or(0o755);
    let existed = path.is_dir();
    let mut builder = DirBuilder::new();
    builder
        .recursive(request.parents)
        .mode(0o755)
        .create(path)
        .and_then(|()| match existed {
            true => Ok(()),
            // Whatever the mask makes of it, and for the last directory only.
            false => std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)),
        })
        .map_err(|error| failed(path, &error))
}

/// Carries out `Rename`.
pub fn rename(request: &Rename) -> Result<(), Failure> {
    let (from, to) = (path(&request.from), path(&request.to));
    std::fs::rename(from, to).map_err(|error| failed(from, &error))
}
