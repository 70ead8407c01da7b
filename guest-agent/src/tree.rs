//! Trees of files as tar streams: packed and unpacked in the same way on both sides.
//!
//! A stream is hostile: no name in it leads out of the directory that it is unpacked in, be it
//! by "..", from the root, or through a symbolic link that came before, and only files,
//! directories and links are made. Of permissions the set-uid, set-gid and sticky bits are dropped.

use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Builder, EntryType, Header, HeaderMode};
use thiserror::Error;

/// How deep a tree may be.
const MAX_DEPTH: usize = 1000;

/// What can go wrong with a tree.
#[derive(Debug, Error)]
pub enum TreeError {
    /// A file, or the stream itself, cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file, or the tree if it is the stream.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The stream names a file outside the directory.
    #[error("{}: the tar stream leads out of the directory", path.display())]
    LeadsOut {
        /// The name.
        path: PathBuf,
    },
    /// Directories lie too deep in each other.
    #[error("{}: directories lie too deep in each other", path.display())]
    TooDeep {
        /// The directory.
        path: PathBuf,
    },
}

fn at(path: &Path) -> impl Fn(io::Error) -> TreeError + '_ {
    move |source| TreeError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Packs a directory with all that is in it, under names relative to it; or a file that is no
/// directory, under its last name. A symbolic link to it is followed. What is neither file,
/// directory nor symbolic link is left out.
///
/// # Errors
/// [`TreeError::Io`] and [`TreeError::TooDeep`].
pub fn pack(root: &Path, out: impl Write) -> Result<(), TreeError> {
    let fail = at(root);
    // Before there is a builder, which writes an archive's end also when nothing was packed.
    let resolved = root.canonicalize().map_err(&fail)?;
    let metadata = resolved.metadata().map_err(&fail)?;
    let mut builder = Builder::new(out);
    builder.mode(HeaderMode::Complete);
    builder.follow_symlinks(false);
    builder.sparse(false);
    if metadata.is_dir() {
        builder.append_dir("./", &resolved).map_err(&fail)?;
        pack_below(&mut builder, &resolved, Path::new(""), 0)?;
    } else {
        let name = root.file_name().or(resolved.file_name());
        let name = name.unwrap_or("file".as_ref());
        append(&mut builder, &resolved, Path::new(name), &metadata).map_err(&fail)?;
    }
    builder
        .into_inner()
        .and_then(|mut out| out.flush())
        .map_err(&fail)
}

/// Packs what is in a directory, whose name in the stream is `below`.
fn pack_below<W: Write>(
    builder: &mut Builder<W>,
    directory: &Path,
    below: &Path,
    depth: usize,
) -> Result<(), TreeError> {
    if depth > MAX_DEPTH {
        let path = directory.to_owned();
        return Err(TreeError::TooDeep { path });
    }
    for entry in std::fs::read_dir(directory).map_err(at(directory))? {
        let entry = entry.map_err(at(directory))?;
        let (from, name) = (entry.path(), below.join(entry.file_name()));
        // What is gone by now is not in there any more.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        append(builder, &from, &name, &metadata).map_err(at(&from))?;
        if metadata.is_dir() {
            pack_below(builder, &from, &name, depth + 1)?;
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

/// Unpacks a stream into a directory, which is made if it is not there. Reads the stream to its end.
///
/// # Errors
/// [`TreeError`]; what was unpacked before stays.
pub fn unpack(stream: impl Read, root: &Path) -> Result<(), TreeError> {
    let fail = at(root);
    std::fs::create_dir_all(root).map_err(&fail)?;
    let base = root.canonicalize().map_err(&fail)?;
    let mut archive = Archive::new(stream);
    archive.set_preserve_permissions(false);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(false);
    let mut directories: Vec<(PathBuf, u32)> = Vec::new();
    for entry in archive.entries().map_err(&fail)? {
        let mut entry = entry.map_err(&fail)?;
        let name = entry.path().map_err(&fail)?.into_owned();
        let leads_out = || TreeError::LeadsOut { path: name.clone() };
        let plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if !name.components().all(plain) {
            return Err(leads_out());
        }
        let inside = match entry.header().entry_type() {
            EntryType::Directory => {
                let directory = make_directory(&base, &name)?;
                // One that may not be written to is filled before it is closed.
                let mode = entry.header().mode().unwrap_or(0o755) & 0o777;
                directories.push((directory, mode));
                true
            }
            EntryType::Regular | EntryType::Continuous | EntryType::Symlink | EntryType::Link => {
                entry.unpack_in(&base).map_err(at(&root.join(&name)))?
            }
            _ => true,
        };
        if !inside {
            return Err(leads_out());
        }
    }
    for (directory, mode) in directories.iter().rev() {
        let permissions = Permissions::from_mode(*mode);
        std::fs::set_permissions(directory, permissions).map_err(at(directory))?;
    }
    // What follows the archive's own end is padding.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(&fail)?;
    Ok(())
}

/// Makes a directory inside `base`, unless a symbolic link leads out of it.
fn make_directory(base: &Path, name: &Path) -> Result<PathBuf, TreeError> {
    let mut reached = base.to_owned();
    for part in name.components() {
        let Component::Normal(part) = part else {
            continue;
        };
        reached.push(part);
        match std::fs::create_dir(&reached) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                reached = reached.canonicalize().map_err(at(name))?;
                if !reached.starts_with(base) {
                    return Err(TreeError::LeadsOut { path: name.into() });
                }
                if !reached.is_dir() {
                    return Err(at(name)(error));
                }
            }
            result => result.map_err(at(name))?,
        }
    }
    Ok(reached)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let from = tempfile::tempdir().unwrap();
        let root = from.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/b/file"), "content").unwrap();
        std::fs::write(root.join("a").join("n".repeat(200)), "").unwrap();
        let mode = |mode| Permissions::from_mode(mode);
        std::fs::set_permissions(root.join("a/b/file"), mode(0o640)).unwrap();
        std::fs::set_permissions(root.join("a/b"), mode(0o555)).unwrap();
        symlink("b/file", root.join("a/link")).unwrap();
        symlink("/nowhere", root.join("dangling")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        let mut stream = Vec::new();
        pack(root, &mut stream).unwrap();

        let to = tempfile::tempdir().unwrap();
        let root = to.path().join("new");
        unpack(&stream[..], &root).unwrap();
        let file = root.join("a/b/file");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "content");
        let (new, old) = (file.metadata().unwrap(), from.path().join("a/b/file"));
        assert_eq!(new.mode() & 0o7777, 0o640);
        assert_eq!(new.mtime(), old.metadata().unwrap().mtime());
        assert_eq!(root.join("a/b").metadata().unwrap().mode() & 0o777, 0o555);
        assert_eq!(
            std::fs::read_link(root.join("a/link")).unwrap(),
            Path::new("b/file")
        );
        assert_eq!(
            std::fs::read_link(root.join("dangling")).unwrap(),
            Path::new("/nowhere")
        );
        assert!(root.join("a").join("n".repeat(200)).exists());
        assert!(!root.join("socket").exists());
    }

    /// An archive with one entry, whose name is not looked at by the one who packs.
    fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (kind, name, target) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            header.set_size(0);
            let field = &mut header.as_gnu_mut().unwrap().name;
            field[..name.len()].copy_from_slice(name.as_bytes());
            if !target.is_empty() {
                header.set_link_name_literal(target).unwrap();
            }
            header.set_cksum();
            builder.append(&header, io::empty()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn nothing_leads_out() {
        use EntryType::{Directory, Link, Regular, Symlink};
        let outside = tempfile::tempdir().unwrap();
        let place = outside.path().to_str().unwrap();
        let bad: [&[(EntryType, &str, &str)]; 7] = [
            &[(Regular, "../escape", "")],
            &[(Regular, "/escape", "")],
            &[(Directory, "a/../../escape", "")],
            &[(Symlink, "way", place), (Regular, "way/escape", "")],
            &[(Symlink, "way", place), (Directory, "way/escape", "")],
            &[(Symlink, "way", place), (Directory, "way", "")],
            &[(Link, "passwd", "/etc/passwd")],
        ];
        for entries in bad {
            let to = tempfile::tempdir_in(outside.path()).unwrap();
            let result = unpack(&archive(entries)[..], &to.path().join("in"));
            assert!(result.is_err(), "{entries:?}");
            assert!(!outside.path().join("escape").exists(), "{entries:?}");
            assert!(!to.path().join("escape").exists(), "{entries:?}");
        }
    }

    #[test]
    fn devices_are_left_out_and_bits_dropped() {
        let to = tempfile::tempdir().unwrap();
        let entries = [
            (EntryType::Block, "disk", ""),
            (EntryType::Fifo, "pipe", ""),
            (EntryType::Regular, "file", ""),
            (EntryType::Directory, "directory", ""),
        ];
        unpack(&archive(&entries)[..], to.path()).unwrap();
        assert!(!to.path().join("disk").exists() && !to.path().join("pipe").exists());
        for name in ["file", "directory"] {
            let mode = to.path().join(name).metadata().unwrap().mode();
            assert_eq!(mode & 0o7777, 0o755, "{name}");
        }
    }

    #[test]
    fn garbage_is_an_error() {
        let to = tempfile::tempdir().unwrap();
        assert!(unpack(&[0x41; 2000][..], to.path()).is_err());
        let whole = archive(&[(EntryType::Regular, "file", "")]);
        assert!(unpack(&whole[..100], to.path()).is_err());
    }
}
