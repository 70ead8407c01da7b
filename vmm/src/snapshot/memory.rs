//! Memory of a machine to go on with, of which the newest layer may be on its way: a parent hands over all else while it is being written.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use snapshot_fmt::chain::Chain;

use super::SnapshotError;

/// Waits for what is missing.
type Rest = Box<dyn FnOnce() -> Result<Chain, SnapshotError> + Send>;

/// Layers of memory.
pub struct Memory {
    chain: OnceLock<Arc<Chain>>,
    rest: Mutex<Option<Rest>>,
}

impl From<Arc<Chain>> for Memory {
    fn from(chain: Arc<Chain>) -> Self {
        Self {
            chain: chain.into(),
            rest: Mutex::default(),
        }
    }
}

impl Memory {
    /// What `rest` will wait for, once.
    pub fn late(rest: impl FnOnce() -> Result<Chain, SnapshotError> + Send + 'static) -> Self {
        Self {
            chain: OnceLock::new(),
            rest: Mutex::new(Some(Box::new(rest))),
        }
    }

    /// The layers, if all of them are there.
    pub fn known(&self) -> Option<&Arc<Chain>> {
        self.chain.get()
    }

    /// The layers, which are waited for.
    pub fn wait(&self) -> Result<&Arc<Chain>, SnapshotError> {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rest) = rest.take() {
            let chain = rest()?;
            return Ok(self.chain.get_or_init(|| Arc::new(chain)));
        }
        let never = || SnapshotError::Memory(io::Error::other("its newest layer never came"));
        self.known().ok_or_else(never)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_is_an_error_each_time() {
        let memory = Memory::late(|| Err(SnapshotError::Memory(io::Error::other("gone"))));
        assert!(memory.known().is_none());
        let why = || memory.wait().unwrap_err().to_string();
        assert!(why().contains("gone"));
        assert!(why().contains("never came"));
        assert!(memory.known().is_none());
    }
}
