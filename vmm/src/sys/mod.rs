//! Thin wrappers around system calls that no crate of ours offers safely.
//!
//! Each file wraps one thing and states the invariant that makes its `unsafe` sound.
#![allow(unsafe_code)]

pub mod advise;
pub mod bus_error;
pub mod file_mapping;
pub mod fork;
pub mod heap;
pub mod overlay;
pub mod page_scan;
pub mod slice;
pub mod stack;
pub mod unread;
pub mod userfaultfd;
pub mod vectored;
