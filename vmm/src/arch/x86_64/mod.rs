//! x86-64: where things lie in guest memory, how Linux is entered, and what its
//! processors are told about themselves.

pub mod boot;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod msrs;
pub mod regs;
