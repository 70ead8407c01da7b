//! The entropy device.

use vmm::devices::virtio::rng::Rng;
use vmm::devices::virtio::testing::w;

use crate::guest::{BUFFERS, Guest, MAX_STEPS};
use crate::step::Step;

/// Steps of its driver.
pub type Input = Vec<Step>;

/// Runs the device under the driver.
pub fn run(steps: &Input) {
    let mut guest = Guest::new(Rng::new().expect("a device"));
    guest.restart(true);
    for step in steps.iter().take(MAX_STEPS) {
        guest.step(step);
    }
    guest.driver.run();
    guest.check_memory();
    guest.restart(true);
    assert_eq!(guest.driver.request(0, &[w(BUFFERS, 8)]), [(0, 8)]);
}
