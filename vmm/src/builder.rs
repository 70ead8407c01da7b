//! A [`VmConfig`] becomes a [`Machine`]: the only room that sees every component.
//!
//! What the host is slow at is done side by side: registering guest memory with KVM waits for a grace period of the host's
//! kernel, and meanwhile the kernel is loaded.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::boot::{self, BootError};
use crate::arch::x86_64::kernel::{Kernel, KernelError, LoadedKernel};
use crate::arch::x86_64::{layout, mptable};
use crate::config::{ConfigError, ConsoleConfig, DriveConfig, DriveInterface, VmConfig};
use crate::console_log::ConsoleLog;
use crate::devices::bus::{Bus, BusError};
use crate::devices::live::LiveDevices;
use crate::devices::serial::{ConsoleTail, Keyboard, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::blk::{Block, BlockConfig, BlockError};
use crate::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY, WINDOW_SIZE};
use crate::devices::virtio::pmem::{Pmem, PmemConfig, PmemError};
use crate::devices::virtio::rng::{Rng, RngError};
use crate::devices::virtio::vsock::{self, Vsock, VsockError};
use crate::drive::{Drive, DriveError};
use crate::event_loop::{EventLoopError, Subscriber};
use crate::exit::ExitLatch;
use crate::host::{self, KvmKind};
use crate::kvm::{self, KvmError, call_failed};
use crate::machine::{Machine, Parts};
use crate::memory::{self, GuestMemory, MemoryError};
use crate::sys::file_mapping::FileMapping;
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

/// Builds the machine that `config` describes and starts it.
pub fn build(config: &VmConfig, timings: &Arc<Timings>) -> Result<Machine, BuildError> {
    let kvm = kvm::open()?;
    config.validate(host::limits(&kvm))?;
    let kind = KvmKind::detect();
    let ram = layout::ram_ranges(config.memory_mib << 20);
    let ram_end = ram.first().map_or(0, |(start, len)| start + len);
    let kernel = Kernel::open(&config.kernel, ram_end)?;
    let memory = Arc::new(memory::create(&ram)?);
    let (mut devices, serial) = Devices::new(config, &memory, &ram)?;
    let cmdline = devices.cmdline(config, kind);
    timings.mark("inputs checked");

    let vm = kvm::create_vm(&kvm)?;
    timings.mark("VM made");

    let cpus = u8::try_from(config.cpus).unwrap_or(u8::MAX);
    let software = kind == KvmKind::Software;
    let (vcpus, loaded) = std::thread::scope(|scope| -> Result<_, BuildError> {
        let slots = scope.spawn(|| {
            kvm::register_memory(&vm, &memory)?;
            let first = u32::try_from(ram.len()).unwrap_or(u32::MAX);
            kvm::register_files(&vm, first, &devices.files)
        });
        let vcpus = vcpu::create(&kvm, &vm, cpus, software)?;
        let loaded = load(kernel, &memory, &ram, &cmdline, cpus)?;
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
    let (console, subscribers, files) = (devices.console, devices.subscribers, devices.files);
    let live = LiveDevices {
        serial,
        virtio: devices.transports,
    };
    Ok(Machine::start(Parts {
        vm,
        memory,
        files,
        vcpus,
        context,
        subscribers,
        devices: live,
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

/// A file for the console, whose errors say which it is.
struct ConsoleFile {
    file: File,
    path: PathBuf,
}

impl Write for ConsoleFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes).map_err(|error| {
            let path = self.path.display();
            let told = format!("{path}: {error}; make room there, or name another file");
            io::Error::new(error.kind(), told)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The devices of a machine, before KVM knows of them.
struct Devices {
    memory: Arc<GuestMemory>,
    pio: Bus,
    mmio: Bus,
    /// GSI and line of each device that interrupts.
    irqs: Vec<(u32, EventFd)>,
    /// First address and queue events of each virtio device's window, in the order of the windows.
    windows: Vec<(u64, Vec<EventFd>)>,
    /// Files that the guest sees as memory, with their guest physical addresses, and where the next may start.
    files: Vec<(u64, FileMapping)>,
    next_file: u64,
    subscribers: Vec<Subscriber>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    root: Option<Root>,
    exit: ExitLatch,
    console: ConsoleTail,
}

/// What the kernel needs to mount its root file system.
struct Root {
    interface: DriveInterface,
    read_only: bool,
    file_system: Option<&'static str>,
}

impl Devices {
    fn new(
        config: &VmConfig,
        memory: &Arc<GuestMemory>,
        ram: &[(u64, u64)],
    ) -> Result<(Self, Arc<Mutex<SerialPort>>), BuildError> {
        let ram_end = ram.last().map_or(0, |(start, len)| start + len);
        let mut devices = Self {
            memory: Arc::clone(memory),
            pio: Bus::default(),
            mmio: Bus::default(),
            irqs: Vec::new(),
            windows: Vec::new(),
            files: Vec::new(),
            next_file: layout::pmem_start(ram_end),
            subscribers: Vec::new(),
            transports: Vec::new(),
            root: None,
            exit: ExitLatch::new()?,
            console: ConsoleTail::default(),
        };
        let keyboard = Keyboard::new(devices.exit.clone());
        devices
            .pio
            .insert(layout::I8042_PORT, 5, Arc::new(Mutex::new(keyboard)))?;
        for (index, drive) in config.drives.iter().enumerate() {
            devices.add_drive(index, drive)?;
        }
        if let Some(config) = &config.vsock {
            let (cid, socket_path) = (config.cid, config.socket.clone());
            devices.add_virtio(Vsock::new(vsock::VsockConfig { cid, socket_path })?)?;
        }
        devices.add_virtio(Rng::new()?)?;
        // Last: a file for the console is made anew only where nothing else was refused.
        let serial = devices.add_serial(&config.console)?;
        Ok((devices, serial))
    }

    /// A new interrupt line to the IOAPIC's pin `gsi`.
    fn irq(&mut self, gsi: u32) -> io::Result<EventFd> {
        let line = EventFd::new(EFD_NONBLOCK)?;
        self.irqs.push((gsi, line.try_clone()?));
        Ok(line)
    }

    fn add_serial(
        &mut self,
        console: &ConsoleConfig,
    ) -> Result<Arc<Mutex<SerialPort>>, BuildError> {
        let failed = |path: &PathBuf| {
            let path = path.clone();
            |source| BuildError::Console { path, source }
        };
        let stream: Option<Box<dyn Write + Send>> = match console {
            ConsoleConfig::Kept => None,
            ConsoleConfig::Stderr => Some(Box::new(io::stderr())),
            ConsoleConfig::File(path) => {
                // Non-blocking: nobody may be at the other end of a pipe.
                let file = File::options()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .map_err(failed(path))?;
                let path = path.clone();
                Some(Box::new(ConsoleFile { file, path }))
            }
            ConsoleConfig::Log(path) => {
                Some(Box::new(ConsoleLog::create(path).map_err(failed(path))?))
            }
        };
        let line = Arc::new(self.irq(layout::SERIAL_GSI)?);
        let port = SerialPort::new(line, self.console.clone(), stream);
        let port = Arc::new(Mutex::new(port));
        self.pio
            .insert(layout::SERIAL_PORT, 8, Arc::clone(&port) as _)?;
        Ok(port)
    }

    fn add_drive(&mut self, index: usize, config: &DriveConfig) -> Result<(), BuildError> {
        let Drive { file, file_system } = Drive::open(config)?;
        let read_only = config.read_only;
        if index == 0 {
            self.root = Some(Root {
                interface: config.interface,
                read_only,
                file_system,
            });
        }
        let id = format!("drive-{index}");
        let path = config.path.clone();
        match config.interface {
            DriveInterface::Block => self.add_virtio(Block::new(BlockConfig {
                file,
                path,
                read_only,
                id,
            })?),
            DriveInterface::Pmem => self.add_pmem(file, path, id),
        }
    }

    fn add_pmem(&mut self, file: File, path: PathBuf, id: String) -> Result<(), BuildError> {
        let granule = usize::try_from(layout::PMEM_GRANULE).unwrap_or(usize::MAX);
        let mapping =
            FileMapping::new(file, granule).map_err(|source| BuildError::Map { path, source })?;
        let (start, size) = (self.next_file, mapping.size() as u64);
        self.next_file = layout::pmem_start(start + size);
        self.files.push((start, mapping));
        self.add_virtio(Pmem::new(PmemConfig { id, start, size })?)
    }

    /// Gives a virtio device the next window, interrupt line and a place in the event loop.
    fn add_virtio<D>(&mut self, device: D) -> Result<(), BuildError>
    where
        D: VirtioDevice + MutEventSubscriber + 'static,
    {
        let index = u32::try_from(self.windows.len()).unwrap_or(u32::MAX);
        let gsi = layout::VIRTIO_GSI_START.saturating_add(index);
        if gsi > layout::GSI_MAX {
            let max = layout::GSI_MAX - layout::VIRTIO_GSI_START + 1;
            return Err(BuildError::TooManyDevices { max });
        }
        let base = layout::VIRTIO_MMIO_START + u64::from(index) * WINDOW_SIZE;
        let irq = Arc::new(self.irq(gsi)?);
        let device = Arc::new(Mutex::new(device));
        let transport = MmioTransport::new(Arc::clone(&self.memory), irq, Arc::clone(&device) as _);
        let events = transport.queue_events().iter().map(EventFd::try_clone);
        self.windows
            .push((base, events.collect::<io::Result<_>>()?));
        let transport = Arc::new(Mutex::new(transport));
        self.mmio
            .insert(base, WINDOW_SIZE, Arc::clone(&transport) as _)?;
        self.transports.push(transport);
        self.subscribers.push(device);
        Ok(())
    }

    /// The kernel's command line: what every guest needs, what this kind of KVM needs, the devices, the
    /// user's words.
    fn cmdline(&self, config: &VmConfig, kind: KvmKind) -> String {
        let mut words = vec![
            "console=ttyS0 reboot=k panic=-1 quiet".to_owned(),
            kind.cmdline().to_owned(),
        ];
        for ((base, _), gsi) in self.windows.iter().zip(layout::VIRTIO_GSI_START..) {
            words.push(format!(
                "virtio_mmio.device={:#x}@{base:#x}:{gsi}",
                WINDOW_SIZE
            ));
        }
        if let Some(root) = &self.root {
            let (device, pmem) = match root.interface {
                DriveInterface::Block => ("vda", false),
                DriveInterface::Pmem => ("pmem0", true),
            };
            words.push(format!(
                "root=/dev/{device} {}",
                if root.read_only { "ro" } else { "rw" }
            ));
            words.extend(root.file_system.map(|name| format!("rootfstype={name}")));
            // Of the file systems that can do DAX, EROFS goes on without it where an image does not allow it.
            if pmem && root.file_system == Some("erofs") {
                words.push("rootflags=dax".to_owned());
            }
        }
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
        for (base, events) in &self.windows {
            let notify = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
            for (queue, event) in (0u32..).zip(events) {
                vm.register_ioevent(event, &notify, queue)
                    .map_err(call_failed("KVM_IOEVENTFD"))?;
            }
        }
        Ok(())
    }
}
