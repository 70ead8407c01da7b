//! What a guest has written to its root, as its agent tells it.

use std::collections::BTreeMap;

use guest_agent::proto::{
    Feature, ListUpper, MAX_UPPER_BYTES, MAX_UPPER_ENTRIES, UpperEntry, UpperKind, to_agent,
};

use super::{Agent, AgentError};

/// The layer above the image, and /tmp.
#[derive(Debug, Default)]
pub struct Upper {
    /// What is in it, by path.
    pub entries: BTreeMap<Vec<u8>, UpperEntry>,
    /// There is more than that.
    pub is_cut: bool,
}

impl Agent {
    /// What the guest has written to its root and to /tmp; `None` if its agent cannot tell.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and those of the connection.
    pub fn upper(&self) -> Result<Option<Upper>, AgentError> {
        if !self.hello.features.contains(&Feature::Upper.into()) {
            return Ok(None);
        }
        let mut upper = Upper::default();
        let (mut count, mut bytes) = (0, 0_usize);
        let ask = to_agent::Kind::ListUpper(ListUpper {});
        self.records(ask, |entry: UpperEntry| {
            if entry.kind() == UpperKind::Cut {
                upper.is_cut = true;
                return Ok(true);
            }
            count += 1;
            bytes = bytes.saturating_add(entry.path.len() + entry.target.len());
            if count > MAX_UPPER_ENTRIES || bytes > MAX_UPPER_BYTES {
                let what = "more of a layer than may be told";
                return Err(AgentError::Protocol { what });
            }
            if !entry.path.starts_with(b"/") || entry.path.contains(&0) {
                let what = "a path in a layer that is none";
                return Err(AgentError::Protocol { what });
            }
            upper.entries.insert(entry.path.clone(), entry);
            Ok(true)
        })?;
        Ok(Some(upper))
    }
}
