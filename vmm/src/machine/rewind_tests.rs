//! What going back costs, measured on a guest that is nothing but a loop. With a release build, on a quiet machine with KVM:
//! `cargo test --release -p vmm --lib machine::rewind -- --ignored --nocapture`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshot_fmt::chain::Chain;
use snapshot_fmt::layer::Layer;
use snapshot_fmt::state::machine::MachineState;
use vm_memory::{Bytes, GuestAddress};

use super::{Machine, Moment};
use crate::builder::{self, Origin, SavedDisks};
use crate::config::{ConsoleConfig, VmConfig};
use crate::pager::{Mode, Pages};
use crate::snapshot::memory_layer::{FrozenMemory, Lineage};
use crate::timings::Timings;

/// Where the loop is, and the first of the four pages that it writes its count to.
const ENTRY: u64 = 0x20_0000;
const COUNTS: u64 = 0x30_0000;

/// An executable (ELF) with one segment.
fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    let mut bytes = vec![0; 64 + 56];
    bytes[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    for (at, value) in [
        (16, 2),
        (18, 62),
        (32, 64),
        (54, 56),
        (56, 1),
        (64, 1),
        (72, 120),
    ] {
        bytes[at] = value;
    }
    let len = code.len() as u64;
    for (at, value) in [(24, ENTRY), (80, ENTRY), (88, ENTRY), (96, len), (104, len)] {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bytes.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

/// `inc rax`, four times `mov [page], rax`, and again.
fn counting() -> Vec<u8> {
    let mut code = vec![0x48, 0xff, 0xc0];
    for page in 0..4 {
        code.extend([0x48, 0x89, 0x04, 0x25]);
        let address = u32::try_from(COUNTS).unwrap() + page * 0x1000;
        code.extend(address.to_le_bytes());
    }
    code.extend([0xeb, 0xdb]);
    code
}

fn counts(machine: &Machine) -> [u64; 4] {
    [0, 1, 2, 3].map(|page| {
        let address = GuestAddress(COUNTS + page * 0x1000);
        machine.memory().read_obj(address).unwrap()
    })
}

/// A guest that counts, its state, and its memory of one moment.
fn saved() -> (VmConfig, Arc<MachineState>, Arc<Chain>) {
    crate::kvm::install_kick_handler().unwrap();
    let kernel = kernel(&counting());
    let config = VmConfig {
        cpus: 1,
        memory_mib: 32,
        kernel: kernel.path().to_owned(),
        cmdline: String::new(),
        drives: Vec::new(),
        vsock: None,
        lane: false,
        console: ConsoleConfig::Kept,
    };
    let timings = Arc::new(Timings::since(Instant::now()));
    let machine = builder::build(&config, Origin::Boot, None, &timings).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let file = tempfile::NamedTempFile::new().unwrap();
    let (state, layer) = machine
        .freeze(|state| {
            let own: &File = file.as_file();
            let lineage = Lineage::default();
            (
                state,
                FrozenMemory::take(machine.memory(), own, file.path(), lineage),
            )
        })
        .unwrap();
    layer.unwrap().write().finish(|| false).unwrap();
    let layer = Layer::open(file.reopen().unwrap(), file.path()).unwrap();
    (
        config,
        Arc::new(state),
        Arc::new(Chain::new(vec![layer]).unwrap()),
    )
}

#[test]
#[ignore = "a measurement, and it needs KVM"]
fn going_back_with_four_pages() {
    let (config, state, chain) = saved();
    let timings = Arc::new(Timings::since(Instant::now()));
    let pages = || Pages {
        chain: Arc::clone(&chain),
        mode: Mode::Map,
        working_set: Vec::new(),
    };
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::Saved {
        state: &state,
        pages: pages(),
        disks: SavedDisks {
            disks: BTreeMap::new(),
            dir: dir.path().to_owned(),
        },
        moment: None,
    };
    let mut machine = builder::build(&config, origin, None, &timings).unwrap();
    machine.pause().unwrap();
    machine
        .rewind(Moment {
            state: Arc::clone(&state),
            pages: None,
            backings: BTreeMap::new(),
            dir: PathBuf::new(),
        })
        .unwrap();
    machine.pause().unwrap();
    let first = counts(&machine)[0];
    assert!(first > 0);
    let software = machine.software;
    for forget_shadows in [true, false] {
        if forget_shadows && !software {
            continue;
        }
        machine.software = forget_shadows;
        let mut times = Vec::new();
        let mut whole = Vec::new();
        let mut written = Vec::new();
        for _ in 0..2000 {
            machine.resume();
            std::thread::sleep(Duration::from_micros(300));
            let moment = Moment {
                state: Arc::clone(&state),
                pages: None,
                backings: BTreeMap::new(),
                dir: PathBuf::new(),
            };
            let asked = Instant::now();
            let rewound = machine.rewind(moment).unwrap();
            whole.push(asked.elapsed());
            times.push(rewound.pause);
            written.push(rewound.pages);
            machine.pause().unwrap();
            // It has begun again where it was, and may have gone on a little.
            let [a, _, _, d] = counts(&machine);
            assert!(
                a - d <= 1 && a >= first && a < first + 1_000_000,
                "{a} {d} {first}"
            );
        }
        times.sort_unstable();
        whole.sort_unstable();
        written.sort_unstable();
        let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
        let how = if forget_shadows { "with" } else { "without" };
        println!(
            "{how} forgetting shadows: p50 {:.0} us, p90 {:.0}, p99 {:.0}; from the call p50 {:.0}; pages {}",
            at(50),
            at(90),
            at(99),
            whole[whole.len() / 2].as_secs_f64() * 1e6,
            written[written.len() / 2]
        );
    }
}
