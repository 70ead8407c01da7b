//! The persistent memory device.

use arbitrary::Arbitrary;
use vmm::devices::virtio::pmem::{Pmem, PmemConfig};
use vmm::devices::virtio::testing::{r, w};

use crate::guest::{BUFFERS, Guest, MAX_STEPS, desc};
use crate::step::{Buffer, Step};

const REQUEST: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 0x1000;

/// Steps of its driver.
pub type Input = Vec<PmemStep>;

/// A step.
#[derive(Arbitrary, Clone, Debug)]
pub enum PmemStep {
    /// Any driver's.
    Any(Step),
    /// A request of this kind, whole or in pieces, with another buffer in its place or not.
    Request(u32, u8, Option<Buffer>),
}

/// Runs the device under the driver.
pub fn run(steps: &Input) {
    let config = PmemConfig {
        id: "fuzz".into(),
        start: 0x1_0000_0000,
        size: 0x20_0000,
    };
    let mut guest = Guest::new(Pmem::new(config).expect("a device"));
    guest.restart(true);
    for step in steps.iter().take(MAX_STEPS) {
        match *step {
            PmemStep::Any(ref step) => guest.step(step),
            PmemStep::Request(kind, cut, other) => {
                let cut = u32::from(cut % 5);
                guest.write(REQUEST, &kind.to_le_bytes());
                let mut chain = vec![r(REQUEST, cut), r(REQUEST + u64::from(cut), 4 - cut)];
                chain.extend(other.map(desc));
                chain.push(w(ANSWER, 4));
                guest.offer(0, &chain);
            }
        }
    }
    guest.driver.run();
    guest.check_memory();
    guest.restart(true);
    guest.driver.write(REQUEST, &[0; 4]);
    guest.driver.write(ANSWER, &[0xee; 4]);
    assert_eq!(
        guest.driver.request(0, &[r(REQUEST, 4), w(ANSWER, 4)]),
        [(0, 4)]
    );
    assert_eq!(guest.driver.read(ANSWER, 4), [0; 4]);
}
