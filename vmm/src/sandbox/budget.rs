//! What a sandbox and all that branch off it may have together.
//!
//! It is looked at when children are made: those that would not fit are refused, and nobody is ended later. Branches that are made at the same moment by several sandboxes of a
//! tree do not see each other's children before these begin.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::list::{FindError, living_of_tree};
use crate::process_memory::private_bytes;

/// A budget. What it does not name is not bounded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Memory that each has for itself, all together, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// How many there may be at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandboxes: Option<u32>,
    /// What each of them may keep of its drives for those that branch off it, in MiB. Nobody is refused for it: who goes beyond costs
    /// children their drives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive_backup_mib: Option<u64>,
}

/// Why children are refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OverBudget {
    /// There would be too many.
    #[error(
        "the tree has {living} sandboxes, and {wanted} more would be over its budget of {budget} (--tree-sandboxes): end some first"
    )]
    Sandboxes {
        /// How many live.
        living: usize,
        /// How many children are wanted.
        wanted: u32,
        /// How many there may be.
        budget: u32,
    },
    /// They would have too much.
    #[error(
        "the sandboxes of the tree have {used} MiB for themselves, and {wanted} MiB more would be over its budget of {budget} MiB (--tree-memory): end some first, make fewer, or reserve less (--reserve)"
    )]
    Memory {
        /// MiB that those who live have.
        used: u64,
        /// MiB that the children are expected to come to have.
        wanted: u64,
        /// MiB that all may have.
        budget: u64,
    },
}

impl Budget {
    /// What this does not name is as `other` has it.
    pub fn or(self, other: Self) -> Self {
        Self {
            memory_mib: self.memory_mib.or(other.memory_mib),
            sandboxes: self.sandboxes.or(other.sandboxes),
            drive_backup_mib: self.drive_backup_mib.or(other.drive_backup_mib),
        }
    }

    /// Whether nothing is bounded that is looked at when children are made.
    pub fn is_unbounded(&self) -> bool {
        self.memory_mib.is_none() && self.sandboxes.is_none()
    }

    /// Whether nothing is bounded at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Refuses `count` children, each of which is expected to come to have `reserve_mib`, in the tree whose root has the id `root`.
    pub fn check(
        &self,
        root: &str,
        count: u32,
        reserve_mib: u64,
    ) -> Result<Result<(), OverBudget>, FindError> {
        if self.is_unbounded() {
            return Ok(Ok(()));
        }
        let living = living_of_tree(root)?;
        let pids: Vec<u32> = living.iter().map(|sandbox| sandbox.record.pid).collect();
        let used_mib = match self.memory_mib {
            None => 0,
            Some(_) => pids.iter().map(|&pid| private_bytes(pid)).sum::<u64>() >> 20,
        };
        Ok(self.fits(pids.len(), used_mib, count, reserve_mib))
    }

    fn fits(
        &self,
        living: usize,
        used: u64,
        count: u32,
        reserve_mib: u64,
    ) -> Result<(), OverBudget> {
        if let Some(budget) = self.sandboxes
            && living as u64 + u64::from(count) > u64::from(budget)
        {
            return Err(OverBudget::Sandboxes {
                living,
                wanted: count,
                budget,
            });
        }
        let wanted = u64::from(count).saturating_mul(reserve_mib);
        match self.memory_mib {
            Some(budget) if used.saturating_add(wanted) > budget => Err(OverBudget::Memory {
                used,
                wanted,
                budget,
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_let_in() {
        let budget = Budget {
            memory_mib: Some(100),
            sandboxes: Some(4),
            drive_backup_mib: Some(1),
        };
        assert_eq!(budget.fits(2, 68, 2, 16), Ok(()));
        assert!(matches!(
            budget.fits(3, 0, 2, 1),
            Err(OverBudget::Sandboxes {
                living: 3,
                wanted: 2,
                budget: 4
            })
        ));
        assert!(matches!(
            budget.fits(1, 69, 2, 16),
            Err(OverBudget::Memory {
                used: 69,
                wanted: 32,
                budget: 100
            })
        ));
        assert!(budget.fits(1, 1, 1, u64::MAX).is_err());
        let flags = Budget {
            memory_mib: None,
            sandboxes: Some(9),
            drive_backup_mib: None,
        };
        let both = Budget {
            memory_mib: Some(100),
            sandboxes: Some(9),
            drive_backup_mib: Some(1),
        };
        assert_eq!(flags.or(budget), both);
        assert_eq!(Budget::default().fits(1000, u64::MAX, 1000, 9), Ok(()));
    }
}
