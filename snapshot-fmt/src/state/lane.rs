//! The lane: what is saved of it beside its window, which is memory.

use serde::{Deserialize, Serialize};

/// A lane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneState {
    /// The page of guest physical memory that its window begins at; 0 where the guest has named none.
    pub frame: u32,
    /// Whether the guest has a stream open.
    pub open: bool,
    /// Whether that goes on. Otherwise the guest is told that it is lost.
    pub kept: bool,
}
