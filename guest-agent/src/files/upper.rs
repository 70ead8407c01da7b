//! What the guest has written: the layer above the image, told entry by entry, and /tmp.
//!
//! The tree is hostile: programs of the guest made it, and change it meanwhile. So it is walked by descriptors, each of a directory that
//! was found in another; no link is followed, no other file system entered; depth, entries and bytes are bounded.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use guest_agent::proto::{InImage, MAX_UPPER_BYTES, MAX_UPPER_ENTRIES, UpperEntry, UpperKind};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fgetxattr, fstat, openat, readlinkat, stat,
    statat,
};
use rustix::io::Errno;

use super::{Records, failed};
use crate::failure::Failure;

/// How many directories deep a tree is walked. Each has two descriptors open, of the 1,024 that a process may have.
const MAX_DEPTH: usize = 128;

/// The mark of a directory that hides the image's (Linux, Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
const OPAQUE: &CStr = c"trusted.overlay.opaque";

/// What the root consists of, held open since before it was put together: later nothing else leads there, for programs neither.
pub struct Layers {
    /// What the guest has written.
    pub upper: OwnedFd,
    /// What it began with.
    pub image: OwnedFd,
}

/// Tells what is in the layer, and in /tmp.
///
/// # Errors
/// The layer cannot be read, or the client is gone.
pub fn list(layers: &Layers) -> Result<(), Failure> {
    let fail = |what: &str, errno: Errno| failed(Path::new(what), &errno.into());
    let upper = open(layers.upper.as_fd(), c".").map_err(|errno| fail("the layer", errno))?;
    let image = open(layers.image.as_fd(), c".").map_err(|errno| fail("the image", errno))?;
    let mut walk = Walk::default();
    walk.tree(b"", upper, Some(image))?;
    // One that is no file system of its own was in the layer.
    let root = stat("/").map_err(|errno| fail("/", errno))?.st_dev;
    let is_own = |tmp: &OwnedFd| fstat(tmp).is_ok_and(|tmp| tmp.st_dev != root);
    if let Some(tmp) = open(CWD, c"/tmp").ok().filter(is_own) {
        walk.tree(b"/tmp", tmp, None)?;
    }
    if walk.is_cut {
        walk.records.push(&UpperEntry {
            kind: UpperKind::Cut.into(),
            ..UpperEntry::default()
        })?;
    }
    walk.records.send()
}

/// Opens a directory in another.
fn open(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// A directory that is being read.
struct Level {
    dir: Dir,
    /// The image's, where that shows through.
    image: Option<OwnedFd>,
    /// The length of its path.
    path: usize,
}

#[derive(Default)]
struct Walk {
    records: Records,
    entries: usize,
    bytes: usize,
    is_cut: bool,
}

impl Walk {
    /// Tells what is in the directory `top`, which is called `path`, and below.
    fn tree(&mut self, path: &[u8], top: OwnedFd, image: Option<OwnedFd>) -> Result<(), Failure> {
        let unreadable = |path: &[u8], errno: Errno| failed(super::path(path), &errno.into());
        let mut path = path.to_vec();
        let device = fstat(&top)
            .map_err(|errno| unreadable(&path, errno))?
            .st_dev;
        let mut levels = vec![Level {
            dir: Dir::new(top).map_err(|errno| unreadable(&path, errno))?,
            image,
            path: path.len(),
        }];
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path);
            let Some(found) = level.dir.read() else {
                levels.pop();
                continue;
            };
            let found = found.map_err(|errno| unreadable(&path, errno))?;
            let name = found.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            path.push(b'/');
            path.extend_from_slice(name.to_bytes());
            let dir = level.dir.fd().map_err(|errno| unreadable(&path, errno))?;
            // What is gone by now is not in there any more.
            let Ok(stat) = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let mut entry = describe(&path, dir, name, &stat);
            let image = level.image.as_ref().map(AsFd::as_fd);
            entry.in_image = compare(&entry, &stat, image, name).into();
            let below = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory if stat.st_dev == device => open(dir, name).ok(),
                _ => None,
            };
            let shows = below.as_ref().and_then(|below| {
                let image = open(image?, name).ok()?;
                entry.opaque = is_opaque(below);
                (!entry.opaque).then_some(image)
            });
            self.bytes += entry.path.len() + entry.target.len();
            self.entries += 1;
            if self.entries > MAX_UPPER_ENTRIES || self.bytes > MAX_UPPER_BYTES {
                self.is_cut = true;
                return Ok(());
            }
            self.records.push(&entry)?;
            match below.map(Dir::new) {
                Some(Ok(dir)) if levels.len() < MAX_DEPTH => levels.push(Level {
                    dir,
                    image: shows,
                    path: path.len(),
                }),
                Some(_) => self.is_cut = true,
                None => {}
            }
        }
        Ok(())
    }
}

fn kind(stat: &Stat) -> UpperKind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => UpperKind::File,
        FileType::Directory => UpperKind::Directory,
        FileType::Symlink => UpperKind::Symlink,
        FileType::CharacterDevice if stat.st_rdev == 0 => UpperKind::Removed,
        _ => UpperKind::Other,
    }
}

fn target(dir: BorrowedFd<'_>, name: &CStr) -> Vec<u8> {
    readlinkat(dir, name, Vec::new()).map_or_else(|_| Vec::new(), |target| target.into_bytes())
}

fn describe(path: &[u8], dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> UpperEntry {
    let kind = kind(stat);
    let path = path.to_vec();
    if kind == UpperKind::Removed {
        return UpperEntry {
            path,
            kind: kind.into(),
            ..UpperEntry::default()
        };
    }
    UpperEntry {
        path,
        kind: kind.into(),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_ns: nanos(stat.st_mtime, stat.st_mtime_nsec),
        ctime_ns: nanos(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
        target: match kind {
            UpperKind::Symlink => target(dir, name),
            _ => Vec::new(),
        },
        ..UpperEntry::default()
    }
}

/// A time that a program may have set to anything.
fn nanos(seconds: i64, nanos: impl TryInto<i64>) -> i64 {
    let nanos = nanos.try_into().unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// What the image has in place of `entry`.
fn compare(entry: &UpperEntry, stat: &Stat, image: Option<BorrowedFd<'_>>, name: &CStr) -> InImage {
    let Some(image) = image else {
        return InImage::No;
    };
    let Ok(own) = statat(image, name, AtFlags::SYMLINK_NOFOLLOW) else {
        return InImage::No;
    };
    let is_same = own.st_mode == stat.st_mode
        && (own.st_uid, own.st_gid) == (stat.st_uid, stat.st_gid)
        && match entry.kind() {
            UpperKind::Directory => true,
            UpperKind::Symlink => target(image, name) == entry.target,
            UpperKind::File => {
                own.st_size == stat.st_size
                    && nanos(own.st_mtime, own.st_mtime_nsec) == entry.mtime_ns
            }
            UpperKind::Other => own.st_rdev == stat.st_rdev,
            UpperKind::Removed | UpperKind::Cut => false,
        };
    match is_same {
        true => InImage::Same,
        false => InImage::Other,
    }
}

fn is_opaque(directory: &OwnedFd) -> bool {
    let mut value = [0; 1];
    let length = fgetxattr(directory, OPAQUE, value.as_mut_slice());
    length == Ok(1) && value == *b"y"
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn walked(upper: &Path, image: &Path) -> (Vec<(String, UpperKind, InImage)>, bool) {
        let dir = |path: &Path| -> OwnedFd { fs::File::open(path).unwrap().into() };
        let mut walk = Walk::default();
        walk.tree(b"", dir(upper), Some(dir(image))).unwrap();
        let mut frames = guest_agent::frame::FrameBuffer::default();
        frames.input().extend_from_slice(&walk.records.buffer);
        let mut told = Vec::new();
        while let Some(entry) = frames.next_message::<UpperEntry>().unwrap() {
            let path = String::from_utf8_lossy(&entry.path).into_owned();
            told.push((path, entry.kind(), entry.in_image()));
        }
        told.sort();
        (told, walk.is_cut)
    }

    #[test]
    fn a_layer_is_told_beside_its_image() {
        let both = tempfile::tempdir().unwrap();
        let (upper, image) = (both.path().join("upper"), both.path().join("image"));
        for tree in [&upper, &image] {
            fs::create_dir_all(tree.join("etc/deep")).unwrap();
            symlink("/", tree.join("link")).unwrap();
            fs::write(tree.join("etc/hosts"), "the same length").unwrap();
            fs::File::open(tree.join("etc/hosts"))
                .and_then(|file| file.set_modified(std::time::UNIX_EPOCH))
                .unwrap();
        }
        fs::write(upper.join("etc/deep/new"), "new").unwrap();
        fs::write(image.join("etc/deep/old"), "old").unwrap();
        symlink("elsewhere", upper.join("etc/self")).unwrap();
        symlink("self", image.join("etc/self")).unwrap();
        fs::set_permissions(upper.join("etc"), fs::Permissions::from_mode(0o700)).unwrap();
        let (told, is_cut) = walked(&upper, &image);
        let told: Vec<_> = told.iter().map(|(path, k, i)| (&**path, *k, *i)).collect();
        assert_eq!(
            told,
            [
                ("/etc", UpperKind::Directory, InImage::Other),
                ("/etc/deep", UpperKind::Directory, InImage::Same),
                ("/etc/deep/new", UpperKind::File, InImage::No),
                ("/etc/hosts", UpperKind::File, InImage::Same),
                ("/etc/self", UpperKind::Symlink, InImage::Other),
                ("/link", UpperKind::Symlink, InImage::Same),
            ]
        );
        assert!(!is_cut);
    }

    #[test]
    fn a_tree_that_is_too_deep_is_cut() {
        let both = tempfile::tempdir().unwrap();
        let image = both.path().join("image");
        let mut deep = both.path().join("upper");
        let upper = deep.clone();
        deep.extend(std::iter::repeat_n("d", MAX_DEPTH + 5));
        fs::create_dir(&image).unwrap();
        fs::create_dir_all(&deep).unwrap();
        let (told, is_cut) = walked(&upper, &image);
        assert!(is_cut);
        assert_eq!(told.len(), MAX_DEPTH);
    }

    #[test]
    fn times_beyond_all_bounds_are_the_nearest() {
        assert_eq!(nanos(1, 2_u64), 1_000_000_002);
        assert_eq!(nanos(i64::MAX, 1_u64), i64::MAX);
        assert_eq!(nanos(i64::MIN, 0_u64), i64::MIN);
    }
}
