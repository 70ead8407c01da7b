//! A [`VmConfig`], or a saved state, becomes a [`Machine`]: the only room that sees every component.
//!
//! What the host is slow at is done side by side: registering guest memory with KVM waits for a grace period of the host's
//! kernel, and meanwhile the kernel is loaded, or a snapshot's pages are mapped and the processors restored.

mod devices;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use snapshot_fmt::chain::Chain;
use snapshot_fmt::state::machine::MachineState;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};

use self::devices::{Devices, MappedFile};
use crate::arch::x86_64::boot::{self, BootError};
use crate::arch::x86_64::kernel::{Kernel, KernelError, LoadedKernel};
use crate::arch::x86_64::{layout, mptable};
use crate::config::{ConfigError, VmConfig};
use crate::devices::bus::BusError;
use crate::devices::lane::LaneError;
use crate::devices::serial::SerialError;
use crate::devices::virtio::blk::BlockError;
use crate::devices::virtio::blk::stack::Backing;
use crate::devices::virtio::mmio::TransportError;
use crate::devices::virtio::pmem::PmemError;
use crate::devices::virtio::rng::RngError;
use crate::devices::virtio::vsock::VsockError;
use crate::drive::DriveError;
use crate::event_loop::EventLoopError;
use crate::host::{self, KvmKind};
use crate::kvm::{self, KvmError, call_failed, platform};
use crate::machine::{Machine, Parts};
use crate::memory::{self, GuestMemory, MemoryError};
use crate::pager::{Ahead, Pager, PagerError, Pages};
use crate::sys::file_mapping::FileMapping;
use crate::timings::Timings;
use crate::vcpu::state::VcpuStateError;
use crate::vcpu::{self, NewVcpu, VcpuContext};

/// Why a machine could not be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The configuration cannot work here.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM is missing or refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The boot data could not be laid out.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory refused the MP table.
    #[error("cannot write the MP table: {0}")]
    MpTable(GuestMemoryError),
    /// Two devices claim the same addresses: a mistake of ours.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The file for the console cannot be made.
    #[error("cannot write the console to {path}: {source}; name another file")]
    Console {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A disk's file cannot be used.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// A disk cannot be made of its file.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A file cannot be mapped for the guest.
    #[error("cannot map the image {path}: {source}")]
    Map {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// A file that is mapped cannot be made a device.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// There is no entropy device.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// The vsock device cannot be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The lane cannot be made.
    #[error(transparent)]
    Lane(#[from] LaneError),
    /// A saved serial port cannot be continued.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// A saved virtio transport cannot be continued.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A saved processor cannot be continued.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// The saved pages cannot be given to the guest.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// The saved machine has other devices.
    #[error("the saved machine is another than its description: {0}; the snapshot is damaged")]
    OtherDevices(&'static str),
    /// There are not enough interrupt lines.
    #[error(
        "too many devices: {max} virtio devices are possible, the entropy device and vsock among them"
    )]
    TooManyDevices {
        /// How many are possible.
        max: u32,
    },
    /// The event loop did not start.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// The system is out of something, for example file descriptors.
    #[error("the system refused a resource: {0}")]
    System(#[from] io::Error),
}

/// What a machine begins with.
pub enum Origin<'a> {
    /// Its kernel's entry point.
    Boot,
    /// A saved machine's next instruction.
    Saved {
        /// All but memory and disks.
        state: &'a MachineState,
        /// Memory.
        pages: Pages,
        /// The disks that the guest may write to.
        disks: SavedDisks,
        /// When it stood still, if it was a running parent.
        moment: Option<u64>,
    },
}

/// A disk of a saved machine that its guest may write to.
pub struct SavedDisk {
    /// What it was.
    pub backing: Backing,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
}

/// The disks of a saved machine that its guest may write to.
pub struct SavedDisks {
    /// They, by the numbers of their drives.
    pub disks: BTreeMap<usize, SavedDisk>,
    /// The directory in whose file system is kept what the guest writes to them.
    pub dir: PathBuf,
}

/// An [`Origin`] whose files are open.
enum Start<'a> {
    Kernel(Kernel),
    Saved(&'a MachineState, Pages),
}

/// A machine without a beginning: what takes the host long is done, and in its memory is nothing, or what one is likely to begin with. It serves one machine, once.
pub struct Shell {
    kvm: Kvm,
    vm: VmFd,
    memory: Arc<GuestMemory>,
    files: Vec<MappedFile>,
    /// None where KVM does not know the memory yet.
    vcpus: Option<Vec<NewVcpu>>,
    /// What lies over its memory already.
    ahead: Option<Ahead>,
}

impl Shell {
    /// One for `config`, of which memory, processors and disks count, without processors and which KVM does not know the memory of yet.
    fn bare(config: &VmConfig) -> Result<Self, BuildError> {
        let kvm = kvm::open()?;
        config.validate(host::limits(&kvm))?;
        let ram = layout::ram_ranges(config.memory_mib << 20);
        Ok(Self {
            vm: kvm::create_vm(&kvm)?,
            kvm,
            memory: Arc::new(memory::create(&ram)?),
            files: devices::map_files(config, &ram)?,
            vcpus: None,
            ahead: None,
        })
    }

    /// One for `config`, of which memory, processors and disks count.
    pub fn new(config: &VmConfig) -> Result<Self, BuildError> {
        let mut shell = Self::bare(config)?;
        let files = shell.files.iter().map(|file| (file.start, &file.mapping));
        register(&shell.vm, &shell.memory, files)?;
        shell.vcpus = Some(new_vcpus(&shell.kvm, &shell.vm, config)?);
        Ok(shell)
    }

    /// Lays `chain` over its memory, which is likely to be what the machine begins with.
    pub fn lay(&mut self, chain: Chain) -> Result<(), BuildError> {
        self.ahead = Some(Ahead::lay(chain, &self.memory)?);
        Ok(())
    }
}

/// Has KVM know memory and files.
fn register<'a>(
    vm: &VmFd,
    memory: &GuestMemory,
    files: impl Iterator<Item = (u64, &'a FileMapping)>,
) -> Result<(), KvmError> {
    kvm::register_memory(vm, memory)?;
    let first = u32::try_from(memory.num_regions()).unwrap_or(u32::MAX);
    kvm::register_files(vm, first, files)
}

/// Builds the machine that `config` describes and starts it. A `shell` must have been made for the same memory and disks.
pub fn build(
    config: &VmConfig,
    origin: Origin<'_>,
    shell: Option<Shell>,
    timings: &Arc<Timings>,
) -> Result<Machine, BuildError> {
    let Shell {
        kvm,
        vm,
        memory,
        files,
        vcpus,
        ahead,
    } = shell.map_or_else(|| Shell::bare(config), Ok)?;
    timings.mark("VM made");
    let ram = layout::ram_ranges(config.memory_mib << 20);
    let ram_end = ram.first().map_or(0, |(start, len)| start + len);
    let (start, saved, moment) = match origin {
        Origin::Boot => {
            let kernel = Kernel::open(&config.kernel, ram_end)?;
            (Start::Kernel(kernel), None, None)
        }
        Origin::Saved {
            state,
            pages,
            disks,
            moment,
        } => {
            let devices = (&state.devices, disks);
            (Start::Saved(state, pages), Some(devices), moment)
        }
    };
    let (mut devices, live) = Devices::new(config, &memory, files, saved)?;
    timings.mark("inputs checked");

    let kind = KvmKind::detect();
    let cpus = cpus_of(config);
    let software = kind == KvmKind::Software;
    let (vcpus, pager, saved) = std::thread::scope(|scope| -> Result<_, BuildError> {
        let slots = vcpus.is_none().then(|| {
            scope.spawn(|| {
                let files = devices.files.iter().map(|(start, file)| (*start, file));
                register(&vm, &memory, files)
            })
        });
        let vcpus = vcpus.map_or_else(|| new_vcpus(&kvm, &vm, config), Ok)?;
        let made = match start {
            Start::Saved(state, pages) => {
                let pager = Pager::start_with(ahead, pages, &memory, &devices.exit)?;
                timings.mark("pages mapped");
                platform::restore(&vm, &state.platform)?;
                let vcpus = vcpus.into_iter().zip(&state.vcpus);
                let vcpus = vcpus.map(|(vcpu, saved)| vcpu.restore(saved));
                let vcpus = vcpus.collect::<Result<_, _>>()?;
                timings.mark("processors restored");
                Ok((vcpus, Some(pager), Some(state)))
            }
            Start::Kernel(kernel) => {
                let cmdline = devices.cmdline(config, kind);
                let entry = || load(kernel, &memory, &ram, &cmdline, cpus);
                let vcpus = boot_vcpus(vcpus, entry);
                timings.mark("kernel loaded");
                vcpus.map(|vcpus| (vcpus, None, None))
            }
        };
        let joined = slots.map_or(Ok(Ok(())), |slots| slots.join());
        joined.unwrap_or_else(|_| {
            Err(call_failed("KVM_SET_USER_MEMORY_REGION")(io::Error::other(
                "the thread died",
            )))
        })?;
        made
    })?;
    timings.mark("memory registered");

    devices.connect(&vm)?;
    timings.mark("devices connected");
    if let Some(state) = saved {
        for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
            vcpu::state::restore_msrs(vcpu, state)?;
        }
        live.give_seed()?;
        platform::restore_clock(&vm, &state.platform, moment)?;
    }
    if let Some(pager) = &pager {
        pager.guest_starts()?;
    }
    let context = VcpuContext {
        id: 0,
        pio: Arc::new(devices.pio),
        mmio: Arc::new(devices.mmio),
        memory: Arc::clone(&memory),
        exit: devices.exit,
        software,
        timings: Arc::clone(timings),
    };
    Ok(Machine::start(Parts {
        vm,
        memory,
        files: devices.files,
        vcpus,
        context,
        subscribers: devices.subscribers,
        devices: live,
        pager,
        agent_link: devices.agent_link,
        console: devices.console,
    })?)
}

/// The processors of `config`.
fn new_vcpus(kvm: &Kvm, vm: &VmFd, config: &VmConfig) -> Result<Vec<NewVcpu>, KvmError> {
    let software = KvmKind::detect() == KvmKind::Software;
    vcpu::create(kvm, vm, cpus_of(config), software)
}

fn cpus_of(config: &VmConfig) -> u8 {
    u8::try_from(config.cpus).unwrap_or(u8::MAX)
}

/// Processors that enter a kernel once `load` has put it into memory.
fn boot_vcpus(
    vcpus: Vec<NewVcpu>,
    load: impl FnOnce() -> Result<LoadedKernel, BuildError>,
) -> Result<Vec<VcpuFd>, BuildError> {
    let vcpus = vcpus.into_iter().map(NewVcpu::for_boot);
    let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
    let loaded = load()?;
    if let Some(boot_cpu) = vcpus.first() {
        vcpu::set_entry(boot_cpu, loaded.entry)?;
    }
    Ok(vcpus)
}

/// Puts the kernel, its boot data and the MP table into guest memory.
fn load(
    kernel: Kernel,
    memory: &GuestMemory,
    ram: &[(u64, u64)],
    cmdline: &str,
    cpus: u8,
) -> Result<LoadedKernel, BuildError> {
    let loaded = kernel.load(memory)?;
    boot::write_boot_data(memory, ram, cmdline, loaded.setup)?;
    mptable::write_mptable(memory, cpus).map_err(BuildError::MpTable)?;
    Ok(loaded)
}
