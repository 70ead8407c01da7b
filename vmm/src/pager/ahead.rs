//! Layers that are laid over guest memory before anybody knows what comes on top of them: what a machine like the last ones is likely to begin with.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use snapshot_fmt::chain::Chain;

use super::{Mode, PagerError, map};
use crate::memory::GuestMemory;

/// They. Their files are kept, so that no other can be taken for one of them.
pub struct Ahead(Chain);

impl Ahead {
    /// Lays `chain` over `memory`, which is zeros.
    pub fn lay(chain: Chain, memory: &GuestMemory) -> Result<Self, PagerError> {
        super::check_size(&chain, memory)?;
        map::map(&chain, 0, memory)?;
        Ok(Self(chain))
    }

    /// How many of the layers of `chain`, the first, lie over `memory`. Where it begins with others, or its pages do not come by mapping, `memory` is zeros again.
    pub(super) fn laid_of(
        self,
        chain: &Chain,
        mode: Mode,
        memory: &GuestMemory,
    ) -> Result<usize, PagerError> {
        let (laid, wanted) = (self.0.layers(), chain.layers());
        let files = laid.iter().zip(wanted);
        let mut files = files.map(|(laid, wanted)| are_one(laid.file(), wanted.file()));
        let fits = mode == Mode::Map && laid.len() <= wanted.len();
        if fits && files.all(|is_one| is_one.unwrap_or(false)) {
            return Ok(laid.len());
        }
        map::clear(memory).map_err(PagerError::Clear)?;
        Ok(0)
    }
}

/// Whether two open files are one.
pub fn are_one(a: &File, b: &File) -> io::Result<bool> {
    let (a, b) = (a.metadata()?, b.metadata()?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}
