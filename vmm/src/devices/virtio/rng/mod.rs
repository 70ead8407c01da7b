//! virtio-rng: an entropy source (Virtio 1.2, section 5.4).

mod device;
mod queue;

pub use device::{Rng, RngError};

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
