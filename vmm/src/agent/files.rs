//! Files of the guest: read, written, listed, watched, and whole trees in and out.
//!
//! Content moves in pieces with credit, so memory stays bounded on both sides whatever its size.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use guest_agent::frame::FrameBuffer;
use guest_agent::proto::{self, FileInfo, MAX_DATA, WatchEvent, from_agent, to_agent};
use guest_agent::tree::{self, TreeError};
use prost::Message;

use super::content::Content;
use super::link::Request;
use super::{Agent, AgentError, UNEXPECTED};

/// The most entries that a directory is believed to have.
const MAX_ENTRIES: usize = 1 << 20;

/// How a file is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Its permissions; otherwise those that it has, or 0644 for a new one.
    pub mode: Option<u32>,
    /// Adds to what is there, as it comes. Otherwise the file is replaced when all has come.
    pub append: bool,
    /// Makes the directories that lead there.
    pub parents: bool,
    /// Fails if the file exists.
    pub create_new: bool,
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

impl Agent {
    fn user(&self) -> String {
        self.file_user.clone()
    }

    fn content(&self, kind: to_agent::Kind) -> Result<Content, AgentError> {
        let request = Request::start(&self.owner, kind)?;
        Ok(Content::new(request, self.hello.stdin_window))
    }

    fn done(&self, kind: to_agent::Kind) -> Result<(), AgentError> {
        match Request::start(&self.owner, kind)?.end()? {
            from_agent::Kind::Done(_) => Ok(()),
            _ => Err(UNEXPECTED),
        }
    }

    /// Writes the content of a file of the guest to `out`; says how many bytes it were.
    ///
    /// # Errors
    /// [`AgentError::Refused`], [`AgentError::Output`] if `out` fails, and those of the connection.
    pub fn read_file(&self, path: &Path, out: &mut dyn Write) -> Result<u64, AgentError> {
        let mut content = self.content(to_agent::Kind::ReadFile(proto::ReadFile {
            path: bytes(path),
            user: self.user(),
            ..Default::default()
        }))?;
        let mut count = 0_u64;
        let mut buffer = vec![0; MAX_DATA];
        loop {
            let result = content.read(&mut buffer);
            let read = content.explain(result, AgentError::Socket)?;
            let data = buffer.get(..read).unwrap_or_default();
            if data.is_empty() {
                let stream = "the file's content";
                let flushed = out.flush();
                return flushed
                    .map(|()| count)
                    .map_err(|source| AgentError::Output { stream, source });
            }
            count = count.saturating_add(data.len() as u64);
            out.write_all(data).map_err(|source| AgentError::Output {
                stream: "the file's content",
                source,
            })?;
        }
    }

    /// Makes what `source` has the content of a file of the guest. If anything fails, the file is
    /// as it was (except with [`WriteOptions::append`]).
    ///
    /// # Errors
    /// [`AgentError::Refused`], [`AgentError::Source`] if `source` fails, and those of the connection.
    pub fn write_file(
        &self,
        path: &Path,
        source: &mut dyn Read,
        options: WriteOptions,
    ) -> Result<u64, AgentError> {
        let mut content = self.content(to_agent::Kind::WriteFile(proto::WriteFile {
            path: bytes(path),
            user: self.user(),
            mode: options.mode,
            append: options.append,
            parents: options.parents,
            create_new: options.create_new,
        }))?;
        let mut count = 0_u64;
        let mut buffer = vec![0; MAX_DATA];
        loop {
            let read = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(AgentError::Source(error)),
            };
            let data = buffer.get(..read).unwrap_or_default();
            let result = content.write_all(data);
            content.explain(result, AgentError::Socket)?;
            count = count.saturating_add(data.len() as u64);
        }
        content.finish()?;
        Ok(count)
    }

    /// What is in a directory of the guest, in no particular order.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and those of the connection.
    pub fn list(&self, path: &Path) -> Result<Vec<FileInfo>, AgentError> {
        let mut entries = Vec::new();
        let list = proto::List {
            path: bytes(path),
            user: self.user(),
        };
        self.records(to_agent::Kind::List(list), |entry| {
            if entries.len() >= MAX_ENTRIES {
                let what = "a directory with more than a million entries";
                return Err(AgentError::Protocol { what });
            }
            entries.push(entry);
            Ok(true)
        })?;
        Ok(entries)
    }

    /// What is known of a file of the guest; of a symbolic link itself unless `follow` says otherwise.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and those of the connection.
    pub fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo, AgentError> {
        let mut found = None;
        let stat = proto::Stat {
            path: bytes(path),
            user: self.user(),
            follow,
        };
        self.records(to_agent::Kind::Stat(stat), |info| {
            found = Some(info);
            Ok(true)
        })?;
        found.ok_or(UNEXPECTED)
    }

    /// Tells `told` of changes to a file, or in a directory, until it returns false or what is
    /// watched is gone.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and those of the connection.
    pub fn watch(
        &self,
        path: &Path,
        recursive: bool,
        mut told: impl FnMut(WatchEvent) -> bool,
    ) -> Result<(), AgentError> {
        let watch = proto::Watch {
            path: bytes(path),
            user: self.user(),
            recursive,
        };
        self.records(to_agent::Kind::Watch(watch), |event| Ok(told(event)))
    }

    /// Removes a file of the guest, or an empty directory; with `recursive` a full one.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and those of the connection.
    pub fn remove(&self, path: &Path, recursive: bool) -> Result<(), AgentError> {
        self.done(to_agent::Kind::Remove(proto::Remove {
            path: bytes(path),
            user: self.user(),
            recursive,
        }))
    }

    /// Makes a directory of the guest; with `parents` those that lead there, and it may exist.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and those of the connection.
    pub fn make_directory(
        &self,
        path: &Path,
        mode: Option<u32>,
        parents: bool,
    ) -> Result<(), AgentError> {
        self.done(to_agent::Kind::MakeDirectory(proto::MakeDirectory {
            path: bytes(path),
            user: self.user(),
            mode,
            parents,
        }))
    }

    /// Moves a file of the guest.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and those of the connection.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), AgentError> {
        self.done(to_agent::Kind::Rename(proto::Rename {
            from: bytes(from),
            to: bytes(to),
            user: self.user(),
        }))
    }

    /// Copies a directory of the guest, or a file, into `directory` of the host, which is made if
    /// it is not there. A directory's content lands in it, a file under its own name.
    ///
    /// # Errors
    /// [`AgentError::Refused`], [`AgentError::Tree`] if something cannot be written here, and
    /// those of the connection.
    pub fn read_tree(&self, path: &Path, directory: &Path) -> Result<(), AgentError> {
        let mut content = self.content(to_agent::Kind::ReadTree(proto::ReadTree {
            path: bytes(path),
            user: self.user(),
        }))?;
        // Nothing is made here for a tree that is not there.
        let result = content.fill().map(drop);
        result?;
        let result = tree::unpack(BufReader::with_capacity(MAX_DATA, &mut content), directory);
        content.explain(result, AgentError::Tree)
    }

    /// Copies a directory of the host, or a file, into directory `path` of the guest, which is made
    /// if it is not there; as [`Self::read_tree`] the other way.
    ///
    /// # Errors
    /// [`AgentError::Refused`], [`AgentError::Tree`] if something cannot be read here, and
    /// those of the connection.
    pub fn write_tree(&self, from: &Path, path: &Path) -> Result<(), AgentError> {
        // Before the guest makes a directory for it.
        from.metadata().map_err(|source| {
            let path = from.to_owned();
            AgentError::Tree(TreeError::Io { path, source })
        })?;
        let mut content = self.content(to_agent::Kind::WriteTree(proto::WriteTree {
            path: bytes(path),
            user: self.user(),
        }))?;
        let result = tree::pack(from, BufWriter::with_capacity(MAX_DATA, &mut content));
        content.explain(result, AgentError::Tree)?;
        content.finish()
    }

    /// Takes messages from a content that is frames of them, until `take` has had enough.
    pub(super) fn records<M: Message + Default>(
        &self,
        kind: to_agent::Kind,
        mut take: impl FnMut(M) -> Result<bool, AgentError>,
    ) -> Result<(), AgentError> {
        let mut content = self.content(kind)?;
        let mut frames = FrameBuffer::default();
        loop {
            while let Some(message) = frames.next_message().map_err(AgentError::Frame)? {
                if !take(message)? {
                    return Ok(());
                }
            }
            let data = content.fill()?;
            if data.is_empty() {
                return match frames.is_partial() {
                    false => Ok(()),
                    true => Err(AgentError::Protocol {
                        what: "a list that is cut off",
                    }),
                };
            }
            frames.input().extend_from_slice(data);
            let count = data.len();
            content.consume(count);
        }
    }
}
