//! Bough: a microVM monitor that branches.
//!
//! One process runs one sandbox. See `docs/architecture.md` for the rooms of
//! this house and the direction in which they may import each other.

pub mod agent;
pub mod arch;
pub mod boot_cache;
pub mod builder;
pub mod cli;
pub mod config;
pub mod config_file;
pub mod confinement;
pub mod console_log;
pub mod control;
pub mod devices;
pub mod doctor;
pub mod drive;
pub mod event_loop;
pub mod exit;
pub mod gate;
pub mod handover;
pub mod host;
pub mod kvm;
pub mod logger;
pub mod machine;
pub mod memory;
pub mod message;
pub mod metrics;
pub mod pagemap;
pub mod pager;
pub mod pool;
pub mod proc_stat;
pub mod process_memory;
pub mod reaper;
pub mod sandbox;
pub mod sizes;
pub mod snapshot;
pub mod store;
pub mod supervisor;
pub mod sys;
pub mod timings;
pub mod user_dirs;
pub mod vcpu;
pub mod warm;
