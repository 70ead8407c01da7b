//! A disk of a moment, for sandboxes in other processes to rest on while this one's guest writes on.
//!
//! Nothing is copied for it: the children get the files that the disk consists of, open for reading only, and the map of the blocks that are in the one that the guest writes
//! to. From then on a block of that file is saved before it is changed for the first time ([`super::backup`]), for as long as a process has
//! the file of saved blocks open ([`super::frozen`]). Nothing is left behind then: the disk does not get deeper by being branched, and has no more files than before. A guest that writes pays for each
//! moment whose children live, a copy of a block for each; moments between which it did not write are one.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::allowance::Allowance;
use super::backup::Backup;
use super::disk::{Disk, Reading};
use super::frozen::{self, FrozenFile};
use super::queue::SECTOR;
use super::stack::Backing;

/// All that is needed to share a disk of a moment to come, so that the moment is short.
pub struct Sharing {
    disk: Arc<Disk>,
    new: Reading,
    /// What serves as well while the guest has not written since it was made: so a disk that rests costs nothing, however often it is branched.
    again: Option<Reading>,
}

impl Sharing {
    /// `scratch`, of [`super::stack::scratch_file`], takes the old content of blocks, as much as `allowance` has.
    pub fn new(disk: &Arc<Disk>, scratch: File, allowance: &Arc<Allowance>) -> io::Result<Self> {
        frozen::prepare(&scratch, disk.blocks())?;
        let reading = |backup: Arc<Backup>| -> io::Result<Reading> {
            let (file, saved) = (disk.reader()?, backup.reader()?);
            let frozen = FrozenFile::new(file, saved, disk.sectors() * SECTOR);
            Ok((backup, frozen))
        };
        let again = disk.unchanged_since();
        let new = Backup::new(scratch, disk.blocks(), Some(allowance.share()));
        Ok(Self {
            disk: Arc::clone(disk),
            new: reading(Arc::new(new))?,
            // It may have come out of use.
            again: again.and_then(|backup| reading(backup).ok()),
        })
    }

    /// The moment is now. No request is half done.
    pub fn begin(self) -> Backing {
        self.disk.share(self.new, self.again)
    }
}
