//! Protocol versions: which one a connection uses.

use std::fmt;

use crate::proto::Hello;

/// The versions that this library speaks.
pub const SUPPORTED: VersionRange = VersionRange { min: 1, max: 1 };

/// An inclusive range of protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    /// The lowest.
    pub min: u32,
    /// The highest.
    pub max: u32,
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.min, self.max) {
            (min, max) if min == max => write!(f, "{min}"),
            (min, max) => write!(f, "{min} to {max}"),
        }
    }
}

impl From<&Hello> for VersionRange {
    fn from(hello: &Hello) -> Self {
        Self {
            min: hello.min_version,
            max: hello.max_version,
        }
    }
}

impl VersionRange {
    /// The highest version in both ranges, if there is one.
    ///
    /// ```
    /// use guest_agent::version::VersionRange;
    /// let ours = VersionRange { min: 1, max: 3 };
    /// assert_eq!(ours.common(VersionRange { min: 2, max: 9 }), Some(3));
    /// assert_eq!(ours.common(VersionRange { min: 4, max: 9 }), None);
    /// ```
    #[must_use]
    pub fn common(self, other: Self) -> Option<u32> {
        let highest = self.max.min(other.max);
        (highest >= self.min && highest >= other.min).then_some(highest)
    }
}
