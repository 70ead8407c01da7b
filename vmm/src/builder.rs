//! A [`VmConfig`] becomes a [`Machine`]: the only room that sees every component.
//!
//! What the host is slow at is done side by side: registering guest memory with KVM waits for a grace period of the host's
//! kernel, and meanwhile the kernel is loaded.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::boot::{self, BootError};
use crate::arch::x86_64::kernel::{Kernel, KernelError, LoadedKernel};
use crate::arch::x86_64::{layout, mptable};
use crate::config::{ConfigError, ConsoleConfig, VmConfig};
use crate::devices::bus::{Bus, BusDevice, BusError};
use crate::devices::serial::{ConsoleTail, Keyboard, SerialPort};
use crate::event_loop::{EventLoopError, Subscriber};
use crate::exit::ExitLatch;
use crate::host::{self, KvmKind};
use crate::kvm::{self, KvmError, call_failed};
use crate::machine::{Machine, Parts};
use crate::memory::{self, GuestMemory, MemoryError};
use crate::timings::Timings;
use crate::vcpu::{self, VcpuContext};

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
    #[error("cannot write the console to {path}: {source}")]
    Console {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The event loop did not start.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// The system is out of something, for example file descriptors.
    #[error("the system refused a resource: {0}")]
    System(#[from] io::Error),
}

/// Builds the machine that `config` describes and starts it.
pub fn build(config: &VmConfig, timings: &Arc<Timings>) -> Result<Machine, BuildError> {
    let kvm = kvm::open()?;
    config.validate(host::limits(&kvm))?;
    let kind = KvmKind::detect();
    let ram = layout::ram_ranges(config.memory_mib << 20);
    let ram_end = ram.first().map_or(0, |(start, len)| start + len);
    let kernel = Kernel::open(&config.kernel, ram_end)?;
    let mut devices = Devices::new(config)?;
    timings.mark("inputs checked");

    let vm = kvm::create_vm(&kvm)?;
    let memory = Arc::new(memory::create(&ram)?);
    timings.mark("VM made");

    let cpus = u8::try_from(config.cpus).unwrap_or(u8::MAX);
    let software = kind == KvmKind::Software;
    let (vcpus, loaded) = std::thread::scope(|scope| -> Result<_, BuildError> {
        let slots = scope.spawn(|| kvm::register_memory(&vm, &memory));
        let vcpus = vcpu::create(&kvm, &vm, cpus, software)?;
        let loaded = load(kernel, &memory, &ram, &devices.cmdline(config, kind), cpus)?;
        timings.mark("kernel loaded");
        slots.join().unwrap_or_else(|_| {
            Err(call_failed("KVM_SET_USER_MEMORY_REGION")(io::Error::other(
                "the thread died",
            )))
        })?;
        Ok((vcpus, loaded))
    })?;
    if let Some(boot_cpu) = vcpus.first() {
        vcpu::set_entry(boot_cpu, loaded.entry)?;
    }
    timings.mark("memory registered");

    devices.connect(&vm)?;
    timings.mark("devices connected");
    let context = VcpuContext {
        id: 0,
        pio: Arc::new(devices.pio),
        mmio: Arc::new(devices.mmio),
        memory: Arc::clone(&memory),
        exit: devices.exit,
        software,
        timings: Arc::clone(timings),
    };
    let (console, subscribers) = (devices.console, devices.subscribers);
    Ok(Machine::start(Parts {
        vm,
        memory,
        vcpus,
        context,
        subscribers,
        console,
    })?)
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

/// The devices of a machine, before KVM knows of them.
struct Devices {
    pio: Bus,
    mmio: Bus,
    irqs: Vec<(u32, EventFd)>,
    subscribers: Vec<Subscriber>,
    exit: ExitLatch,
    console: ConsoleTail,
}

impl Devices {
    fn new(config: &VmConfig) -> Result<Self, BuildError> {
        let mut devices = Self {
            pio: Bus::default(),
            mmio: Bus::default(),
            irqs: Vec::new(),
            subscribers: Vec::new(),
            exit: ExitLatch::new()?,
            console: ConsoleTail::default(),
        };
        devices.add_serial(&config.console)?;
        devices.pio_device(layout::I8042_PORT, 5, Keyboard::new(devices.exit.clone()))?;
        Ok(devices)
    }

    fn pio_device(
        &mut self,
        port: u64,
        ports: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), BusError> {
        self.pio.insert(port, ports, Arc::new(Mutex::new(device)))
    }

    /// A new interrupt line to the IOAPIC's pin `gsi`.
    fn irq(&mut self, gsi: u32) -> io::Result<EventFd> {
        let line = EventFd::new(EFD_NONBLOCK)?;
        self.irqs.push((gsi, line.try_clone()?));
        Ok(line)
    }

    fn add_serial(&mut self, console: &ConsoleConfig) -> Result<(), BuildError> {
        let stream: Option<Box<dyn Write + Send>> = match console {
            ConsoleConfig::Kept => None,
            ConsoleConfig::Stderr => Some(Box::new(io::stderr())),
            ConsoleConfig::File(path) => {
                let file = File::create(path).map_err(|source| BuildError::Console {
                    path: path.clone(),
                    source,
                })?;
                Some(Box::new(file))
            }
        };
        let line = Arc::new(self.irq(layout::SERIAL_GSI)?);
        let port = SerialPort::new(line, self.console.clone(), stream);
        self.pio_device(layout::SERIAL_PORT, 8, port)?;
        Ok(())
    }

    /// The kernel's command line: what every guest needs, what this kind of KVM needs, the devices, the user's words.
    fn cmdline(&self, config: &VmConfig, kind: KvmKind) -> String {
        let mut words = vec![
            "console=ttyS0 reboot=k panic=-1".to_owned(),
            kind.cmdline().to_owned(),
        ];
        words.push(config.cmdline.clone());
        words.retain(|word| !word.is_empty());
        words.join(" ")
    }

    /// Connects interrupts and queue notifications to KVM.
    fn connect(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        for (gsi, line) in &self.irqs {
            vm.register_irqfd(line, *gsi)
                .map_err(call_failed("KVM_IRQFD"))?;
        }
        Ok(())
    }
}
