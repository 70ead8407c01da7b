//! Changes to files, by inotify(7), until the client has heard enough.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use guest_agent::proto::{ErrorCode, Watch, WatchEvent, WatchKind};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::{Records, failed, path, wrong};
use crate::failure::Failure;

/// The most directories that one request watches.
const MAX_WATCHES: usize = 8192;

/// What is watched for.
const FLAGS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ATTRIB);

struct Watcher<'a> {
    inotify: OwnedFd,
    root: &'a Path,
    recursive: bool,
    /// Watched directories, relative to the root.
    watched: HashMap<i32, PathBuf>,
    records: Records,
    /// A name that something was moved from, until its new one comes.
    moved: Option<(u32, WatchEvent)>,
}

/// An event, independent of the buffer that it was read into.
struct Change {
    watch: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Option<PathBuf>,
}

/// Carries out `Watch`; comes back only with an error, or when what is watched is gone.
pub fn watch(request: &Watch) -> Result<(), Failure> {
    let root = path(&request.path);
    let inotify =
        inotify::init(CreateFlags::CLOEXEC).map_err(|errno| failed(root, &errno.into()))?;
    let mut watcher = Watcher {
        inotify,
        root,
        recursive: request.recursive,
        watched: HashMap::new(),
        records: Records::default(),
        moved: None,
    };
    watcher.add(PathBuf::new())?;
    watcher.tell(WatchKind::Ready, Path::new(""), false)?;
    watcher.records.send()?;
    watcher.follow()
}

impl Watcher<'_> {
    /// Watches a directory, and if asked to those in it.
    fn add(&mut self, below: PathBuf) -> Result<(), Failure> {
        let full = self.root.join(&below);
        // `join` with nothing appends a slash, which a file does not take.
        let full = if below.as_os_str().is_empty() {
            self.root
        } else {
            &full
        };
        if self.watched.len() >= MAX_WATCHES {
            let what = "too many directories to watch";
            return Err(wrong(ErrorCode::TooMany, self.root, what));
        }
        let is_root = below.as_os_str().is_empty();
        match inotify::add_watch(&self.inotify, full, FLAGS) {
            Ok(watch) => drop(self.watched.insert(watch, below.clone())),
            Err(errno) if is_root => return Err(failed(full, &errno.into())),
            // Gone, or closed to this user: there is nothing to tell of it.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => return Ok(()),
            Err(errno) => return Err(failed(full, &errno.into())),
        }
        if !self.recursive {
            return Ok(());
        }
        let entries = std::fs::read_dir(full).into_iter().flatten().flatten();
        let directories: Vec<PathBuf> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| below.join(entry.file_name()))
            .collect();
        directories
            .into_iter()
            .try_for_each(|below| self.add(below))
    }

    fn tell(&mut self, kind: WatchKind, path: &Path, directory: bool) -> Result<(), Failure> {
        let event = WatchEvent {
            kind: kind.into(),
            path: path.as_os_str().as_bytes().to_vec(),
            to: Vec::new(),
            directory,
        };
        self.records.push(&event)
    }

    fn follow(&mut self) -> Result<(), Failure> {
        let mut buffer = vec![MaybeUninit::uninit(); 64 * 1024];
        loop {
            let mut changes = Vec::new();
            {
                let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
                loop {
                    match reader.next() {
                        Ok(event) => changes.push(Change {
                            watch: event.wd(),
                            flags: event.events(),
                            cookie: event.cookie(),
                            name: event
                                .file_name()
                                .map(|name| OsStr::from_bytes(name.to_bytes()).into()),
                        }),
                        Err(Errno::INTR) => continue,
                        Err(errno) => {
                            return Err(failed(self.root, &io::Error::from(errno)));
                        }
                    }
                    if reader.is_buffer_empty() {
                        break;
                    }
                }
            }
            for change in changes {
                self.take(&change)?;
            }
            self.lost()?;
            self.records.send()?;
            if self.watched.is_empty() {
                return Ok(());
            }
        }
    }

    /// What was moved from here has not come to anywhere that is watched.
    fn lost(&mut self) -> Result<(), Failure> {
        match self.moved.take() {
            Some((_, event)) => self.records.push(&event),
            None => Ok(()),
        }
    }

    fn take(&mut self, change: &Change) -> Result<(), Failure> {
        let flags = change.flags;
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.tell(WatchKind::Overflow, Path::new(""), false);
        }
        if flags.contains(ReadFlags::IGNORED) {
            self.watched.remove(&change.watch);
            return Ok(());
        }
        let Some(directory) = self.watched.get(&change.watch) else {
            return Ok(());
        };
        let is_root = directory.as_os_str().is_empty();
        let path = match &change.name {
            Some(name) => directory.join(name),
            None => directory.clone(),
        };
        let is_directory = flags.contains(ReadFlags::ISDIR);

        if flags.contains(ReadFlags::MOVED_TO) {
            return self.moved_to(change.cookie, &path, is_directory);
        }
        self.lost()?;
        if flags.contains(ReadFlags::MOVED_FROM) {
            let event = WatchEvent {
                kind: WatchKind::Removed.into(),
                path: path.into_os_string().into_encoded_bytes(),
                to: Vec::new(),
                directory: is_directory,
            };
            self.moved = Some((change.cookie, event));
            return Ok(());
        }
        // Of a directory below, its parent tells.
        let of_itself = change.name.is_none();
        let gone = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF;
        if of_itself && !is_root {
            return Ok(());
        }
        if flags.contains(ReadFlags::CREATE) {
            self.tell(WatchKind::Created, &path, is_directory)?;
            if is_directory && self.recursive {
                self.add(path)?;
            }
        } else if flags.contains(ReadFlags::DELETE) || flags.intersects(gone) {
            self.tell(WatchKind::Removed, &path, is_directory)?;
        } else if flags.intersects(ReadFlags::MODIFY | ReadFlags::CLOSE_WRITE) {
            self.tell(WatchKind::Modified, &path, is_directory)?;
        } else if flags.contains(ReadFlags::ATTRIB) {
            self.tell(WatchKind::Attributes, &path, is_directory)?;
        }
        Ok(())
    }

    fn moved_to(&mut self, cookie: u32, path: &Path, directory: bool) -> Result<(), Failure> {
        match self.moved.take() {
            Some((from, mut event)) if from == cookie => {
                event.kind = WatchKind::Moved.into();
                event.to = path.as_os_str().as_bytes().to_vec();
                if directory {
                    self.renamed(Path::new(OsStr::from_bytes(&event.path)), path);
                }
                self.records.push(&event)
            }
            other => {
                if let Some((_, event)) = other {
                    self.records.push(&event)?;
                }
                self.tell(WatchKind::Created, path, directory)?;
                if directory && self.recursive {
                    self.add(path.to_owned())?;
                }
                Ok(())
            }
        }
    }

    /// A watched directory, with those below it, has another name.
    fn renamed(&mut self, from: &Path, to: &Path) {
        for watched in self.watched.values_mut() {
            if let Ok(rest) = watched.strip_prefix(from) {
                *watched = to.components().chain(rest.components()).collect();
            }
        }
    }
}
