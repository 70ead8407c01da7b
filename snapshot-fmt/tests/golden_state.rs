//! The file `golden/v1/machine.bin` is the state of a machine as version 1 of the format has it: every field of every type, none of
//! them what it would be by default. `machine-lane.bin` has the lane as well, which came later.
//!
//! `WRITE_GOLDEN=1 cargo test -p snapshot-fmt --test golden_state` writes it. A field that is added has a default, the file stays as it is, and a second
//! one beside it gets the field; any other change is a new version of the format.
#![allow(missing_docs)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use snapshot_fmt::state::agent::AgentState;
use snapshot_fmt::state::lane::LaneState;
use snapshot_fmt::state::machine::{DeviceStates, MachineState};
use snapshot_fmt::state::platform::PlatformState;
use snapshot_fmt::state::serial::SerialState;
use snapshot_fmt::state::vcpu::{CpuidEntry, VcpuState};
use snapshot_fmt::state::virtio::{
    BlockState, PmemState, VirtioDeviceState, VirtioMmioState, VirtioState, VirtqueueState,
    VsockConnectionState, VsockPorts, VsockState,
};
use snapshot_fmt::state_file;

const WITHOUT_LANE: &str = "machine.bin";
const WITH_LANE: &str = "machine-lane.bin";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/v1")
        .join(name)
}

fn vcpu() -> VcpuState {
    VcpuState {
        cpuid: vec![CpuidEntry {
            function: 7,
            index: 1,
            flags: 2,
            registers: [3, 4, 5, u32::MAX],
        }],
        tsc_khz: 2_596_122,
        regs: vec![1, 2],
        sregs: vec![3],
        xsave: (0..=255).collect(),
        xcrs: vec![4],
        debug_regs: vec![5],
        lapic: vec![6],
        events: vec![7],
        mp_state: 8,
        msrs: vec![(0x10, u64::MAX), (0x4b56_4d01, 9)],
    }
}

fn virtio(device_type: u32, device: VirtioDeviceState) -> VirtioState {
    VirtioState {
        transport: VirtioMmioState {
            device_type,
            device_features_sel: 1,
            driver_features_sel: 2,
            driver_features: 1 << 32,
            queue_sel: 3,
            status: 15,
            interrupt_status: 1,
            config_generation: 4,
            queues: vec![VirtqueueState {
                size: 128,
                ready: true,
                desc_table: 0x1000,
                avail_ring: 0x2000,
                used_ring: u64::MAX,
                next_avail: 5,
                next_used: 6,
            }],
        },
        device,
    }
}

fn vsock() -> VsockState {
    let ports = |host, guest| VsockPorts { host, guest };
    VsockState {
        cid: 3,
        next_host_port: 1 << 30,
        kept: Some(VsockConnectionState {
            ports: ports(1024, 7),
            buf_alloc: 1,
            forwarded: 2,
            forwarded_told: 3,
            sent: 4,
            peer_fwd_cnt: 5,
            peer_buf_alloc: 6,
        }),
        ended: vec![ports(8, 9)],
        reset: false,
    }
}

fn machine() -> MachineState {
    MachineState {
        vcpus: vec![vcpu()],
        platform: PlatformState {
            pic_master: vec![1],
            pic_slave: vec![2],
            ioapic: vec![3],
            pit: vec![4],
            clock_ns: 5,
        },
        devices: DeviceStates {
            serial: SerialState {
                baud_divisor_low: 1,
                baud_divisor_high: 2,
                interrupt_enable: 3,
                interrupt_identification: 4,
                line_control: 5,
                line_status: 6,
                modem_control: 7,
                modem_status: 8,
                scratch: 9,
                received: b"text".to_vec(),
            },
            virtio: vec![
                virtio(
                    27,
                    VirtioDeviceState::Pmem(PmemState {
                        id: "image".to_owned(),
                        start: 1 << 40,
                        size: 1 << 21,
                    }),
                ),
                virtio(
                    2,
                    VirtioDeviceState::Block(BlockState {
                        id: "disk".to_owned(),
                        read_only: true,
                        sectors: 8,
                    }),
                ),
                virtio(4, VirtioDeviceState::Rng),
                virtio(19, VirtioDeviceState::Vsock(vsock())),
            ],
            lane: None,
        },
        agent: Some(AgentState {
            min_version: 1,
            max_version: 2,
            software: "agent \"0.1\"".to_owned(),
            features: vec![1, -1],
            boot_id: vec![0, 255],
            stdin_window: 3,
            output_window: 4,
            last_request_id: 5,
        }),
    }
}

fn machine_with_lane() -> MachineState {
    let mut machine = machine();
    machine.devices.lane = Some(LaneState {
        frame: 1 << 20,
        open: true,
        kept: true,
    });
    if let VirtioDeviceState::Vsock(vsock) = &mut machine.devices.virtio[3].device {
        vsock.reset = true;
    }
    machine
}

fn files() -> [(&'static str, MachineState); 2] {
    [(WITHOUT_LANE, machine()), (WITH_LANE, machine_with_lane())]
}

fn write(path: &Path, machine: &MachineState) {
    state_file::write(&File::create(path).unwrap(), path, machine).unwrap();
}

#[test]
fn machines_of_version_1_are_read() {
    for (name, machine) in files() {
        let path = golden(name);
        let file = File::open(&path).unwrap();
        let (read, _) = state_file::read::<MachineState>(file, &path).unwrap();
        assert_eq!(read, machine, "{name}");
    }
}

#[test]
fn machines_of_version_1_are_written() {
    for (name, machine) in files() {
        if std::env::var_os("WRITE_GOLDEN").is_some() {
            write(&golden(name), &machine);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        write(&path, &machine);
        assert!(
            fs::read(&path).unwrap() == fs::read(golden(name)).unwrap(),
            "{name} is written otherwise than in version 1"
        );
    }
}

#[test]
fn an_agent_goes_on_only_with_what_it_talked_on() {
    let agent = machine().agent;
    let settled = |lane: Option<(bool, bool)>, agent| {
        let mut machine = machine_with_lane();
        machine.agent = None;
        machine.devices.lane = lane.map(|(open, kept)| LaneState {
            frame: 1,
            open,
            kept,
        });
        machine.settle_agent(agent);
        let VirtioDeviceState::Vsock(vsock) = machine.devices.virtio[3].device.clone() else {
            unreachable!("the fourth device is the socket device");
        };
        let lane = machine.devices.lane.is_some_and(|lane| lane.kept);
        (
            machine.agent.is_some(),
            lane,
            vsock.kept.is_some(),
            vsock.ended.len(),
        )
    };
    // Without a lane, or with one that nobody has open.
    for lane in [None, Some((false, false))] {
        assert_eq!(settled(lane, agent.clone()), (true, false, true, 1));
        assert_eq!(settled(lane, None), (false, false, false, 0));
    }
    // On the lane, a connection by vsock is another's.
    let lane = Some((true, true));
    assert_eq!(settled(lane, agent.clone()), (true, true, false, 2));
    assert_eq!(settled(lane, None), (false, false, false, 0));
    assert_eq!(
        settled(Some((true, false)), agent),
        (false, false, false, 0)
    );
}
