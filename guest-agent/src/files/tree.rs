//! Trees as tar streams, packed and unpacked by the agent itself: no program of the guest is needed.

use std::fs::{File, Metadata, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use guest_agent::proto::{ErrorCode, ReadTree, WriteTree};
use tar::{Archive, Builder, EntryType, Header, HeaderMode};

use super::{failed, path, wrong};
use crate::failure::Failure;

/// How deep a tree may be.
const MAX_DEPTH: usize = 1000;

/// Carries out `ReadTree`.
pub fn read(request: &ReadTree) -> Result<(), Failure> {
    let root = path(&request.path);
    let fail = |error: io::Error| failed(root, &error);
    let mut builder = Builder::new(BufWriter::with_capacity(64 * 1024, io::stdout().lock()));
    builder.mode(HeaderMode::Complete);
    builder.follow_symlinks(false);
    builder.sparse(false);
    let resolved = root.canonicalize().map_err(fail)?;
    let metadata = resolved.metadata().map_err(fail)?;
    if metadata.is_dir() {
        builder.append_dir("./", &resolved).map_err(fail)?;
        pack(&mut builder, &resolved, Path::new(""), 0)?;
    } else {
        let name = root.file_name().or(resolved.file_name());
        let name = name.unwrap_or("file".as_ref());
        append(&mut builder, &resolved, Path::new(name), &metadata).map_err(fail)?;
    }
    builder
        .into_inner()
        .and_then(|mut out| out.flush())
        .map_err(fail)
}

/// Packs what is in a directory, whose name in the stream is `below`.
fn pack<W: Write>(
    builder: &mut Builder<W>,
    directory: &Path,
    below: &Path,
    depth: usize,
) -> Result<(), Failure> {
    if depth > MAX_DEPTH {
        return Err(wrong(ErrorCode::InvalidArgument, directory, "too deep"));
    }
    let entries = std::fs::read_dir(directory).map_err(|error| failed(directory, &error))?;
    for entry in entries {
        let entry = entry.map_err(|error| failed(directory, &error))?;
        let (from, name) = (entry.path(), below.join(entry.file_name()));
        // What is gone by now is not in there any more.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        append(builder, &from, &name, &metadata).map_err(|error| failed(&from, &error))?;
        if metadata.is_dir() {
            pack(builder, &from, &name, depth + 1)?;
        }
    }
    Ok(())
}

fn append<W: Write>(
    builder: &mut Builder<W>,
    from: &Path,
    name: &Path,
    metadata: &Metadata,
) -> io::Result<()> {
    if metadata.is_dir() {
        builder.append_dir(name, from)
    } else if metadata.is_symlink() {
        let mut header = Header::new_gnu();
        header.set_metadata_in_mode(metadata, HeaderMode::Complete);
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, name, std::fs::read_link(from)?)
    } else if metadata.is_file() {
        builder.append_file(name, &mut File::open(from)?)
    } else {
        Ok(())
    }
}

/// Carries out `WriteTree`.
pub fn write(request: &WriteTree) -> Result<(), Failure> {
    let root = path(&request.path);
    let fail = |error: io::Error| failed(root, &error);
    std::fs::create_dir_all(root).map_err(fail)?;
    let mut archive = Archive::new(io::stdin().lock());
    archive.set_preserve_permissions(false);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(false);
    let mut directories: Vec<(PathBuf, u32)> = Vec::new();
    for entry in archive.entries().map_err(fail)? {
        let mut entry = entry.map_err(fail)?;
        let name = entry.path().map_err(fail)?.into_owned();
        let refuse = || {
            wrong(
                ErrorCode::InvalidArgument,
                &name,
                "the tar stream leads out",
            )
        };
        let plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if !name.components().all(plain) {
            return Err(refuse());
        }
        match entry.header().entry_type() {
            EntryType::Directory => {
                // A directory that may not be written to is filled before it is closed.
                let mode = entry.header().mode().unwrap_or(0o755) & 0o777;
                directories.push((root.join(&name), mode));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::Symlink | EntryType::Link => {}
            _ => continue,
        }
        if entry.header().entry_type() == EntryType::Directory {
            let (directory, _) = directories.last().ok_or_else(refuse)?;
            unpack_directory(root, directory)?;
            continue;
        }
        let unpacked = entry.unpack_in(root);
        if !unpacked.map_err(|error| failed(&root.join(&name), &error))? {
            return Err(refuse());
        }
    }
    for (directory, mode) in directories.iter().rev() {
        std::fs::set_permissions(directory, Permissions::from_mode(*mode))
            .map_err(|error| failed(directory, &error))?;
    }
    // Up to the end of what the client sends: what follows the archive's own end is padding.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(fail)?;
    Ok(())
}

/// Makes a directory inside `root`, unless a symbolic link leads out of it.
fn unpack_directory(root: &Path, directory: &Path) -> Result<(), Failure> {
    let fail = |error: io::Error| failed(directory, &error);
    let base = root.canonicalize().map_err(fail)?;
    let mut reached = base.clone();
    for part in directory
        .strip_prefix(root)
        .unwrap_or(directory)
        .components()
    {
        let Component::Normal(part) = part else {
            continue;
        };
        reached.push(part);
        match std::fs::create_dir(&reached) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                reached = reached.canonicalize().map_err(fail)?;
                if !reached.starts_with(&base) || !reached.is_dir() {
                    let what = "the tar stream leads out, or a file is in the way";
                    return Err(wrong(ErrorCode::InvalidArgument, directory, what));
                }
            }
            result => result.map_err(fail)?,
        }
    }
    Ok(())
}
