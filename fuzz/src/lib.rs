//! Fuzz targets for everything that faces a guest, a client or a foreign file: what an input is, and what must hold after it.
//!
//! Inputs are structured: lists of steps that a driver may take. Besides crashes, hangs and unbounded memory, which
//! libFuzzer finds, each target checks what its device promises. For the devices that is, in [`guest`]: guest memory
//! outside the buffers that a driver named is untouched, the event loop comes to rest, and a device that was reset
//! works again.

pub mod blk;
pub mod frames;
pub mod guest;
pub mod handshake;
pub mod kernel;
pub mod lane;
pub mod pmem;
pub mod rng;
pub mod serial;
pub mod snapshot;
pub mod step;
pub mod vsock;
