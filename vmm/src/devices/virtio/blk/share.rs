//! A disk of a moment, for sandboxes in other processes to rest on while this one's guest writes on.
//!
//! Nothing is copied for it: the children get the files that the disk consists of, open for reading only, and the map of the blocks that are in the one that the guest writes
//! to. From then on a block of that file is saved before it is changed for the first time ([`super::backup`]), for as long as a process has
//! the file of saved blocks open ([`super::frozen`]). Nothing is left behind then: the disk does not get deeper by being branched, and has no more files than before.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::backup::Backup;
use super::disk::Disk;
use super::frozen::{self, FrozenFile};
use super::queue::SECTOR;
use super::stack::Backing;

/// All that is needed to share a disk of a moment to come, so that the moment is short.
pub struct Sharing {
    disk: Arc<Disk>,
    backup: Arc<Backup>,
    frozen: FrozenFile,
}

impl Sharing {
    /// `scratch`, of [`super::stack::scratch_file`], takes the old content of blocks.
    pub fn new(disk: &Arc<Disk>, scratch: File) -> io::Result<Self> {
        let blocks = disk.blocks();
        frozen::prepare(&scratch, blocks)?;
        let saved = frozen::reader_of(&scratch)?;
        frozen::use_saved(&saved)?;
        Ok(Self {
            disk: Arc::clone(disk),
            frozen: FrozenFile::new(disk.reader()?, saved, disk.sectors() * SECTOR),
            backup: Arc::new(Backup::new(scratch, blocks, true)),
        })
    }

    /// The moment is now. No request is half done.
    pub fn begin(self) -> Backing {
        self.disk.share(self.backup, self.frozen)
    }
}
