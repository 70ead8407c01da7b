//! The devices of a machine, made new or from their states, in one order: windows and interrupt lines follow from it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::slice::Iter;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use snapshot_fmt::state::lane::LaneState;
use snapshot_fmt::state::machine::DeviceStates;
use snapshot_fmt::state::serial::SerialState;
use snapshot_fmt::state::virtio::{VirtioDeviceState, VirtioMmioState, VirtioState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{BuildError, SavedDisks};
use crate::agent::AGENT_PORT;
use crate::arch::x86_64::layout;
use crate::config::{ConsoleConfig, DriveConfig, DriveInterface, VmConfig, VsockConfig};
use crate::console_log::ConsoleLog;
use crate::devices::bus::Bus;
use crate::devices::lane::{self, Lane, LaneConfig};
use crate::devices::live::{Disks, LiveDevices};
use crate::devices::serial::{ConsoleTail, Keyboard, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::blk::{Block, BlockConfig, Disk};
use crate::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY, WINDOW_SIZE};
use crate::devices::virtio::pmem::{Pmem, PmemConfig};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{self, Vsock};
use crate::drive::Drive;
use crate::event_loop::Subscriber;
use crate::exit::ExitLatch;
use crate::host::KvmKind;
use crate::kvm::{KvmError, call_failed};
use crate::memory::GuestMemory;
use crate::sys::file_mapping::FileMapping;

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
pub(super) struct Devices<'a> {
    memory: Arc<GuestMemory>,
    /// The states that the devices still to be made continue from; none for a machine that boots.
    saved: Option<Iter<'a, VirtioState>>,
    /// What saved disks continue from.
    saved_disks: Option<SavedDisks>,
    /// The disks that the guest may write to.
    disks: Disks,
    pub pio: Bus,
    pub mmio: Bus,
    /// GSI and line of each device that interrupts.
    irqs: Vec<(u32, EventFd)>,
    /// First address and queue events of each virtio device's window, in the order of the windows.
    windows: Vec<(u64, Vec<EventFd>)>,
    /// The files that are still to be made devices.
    mapped: std::vec::IntoIter<MappedFile>,
    /// Files that the guest sees as memory, with their guest physical addresses.
    pub files: Vec<(u64, FileMapping)>,
    pub subscribers: Vec<Subscriber>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    lane: Option<Arc<Mutex<Lane>>>,
    lane_doorbell: Option<EventFd>,
    /// Where the lane says that a restored agent, which it has kept, has said something.
    agent_spoken: Option<EventFd>,
    /// The host's end of the agent's connection, where a restored guest has kept it.
    pub agent_link: Option<UnixStream>,
    root: Option<Root>,
    pub exit: ExitLatch,
    pub console: ConsoleTail,
}

/// A disk's file that the guest is to see as memory.
pub(super) struct MappedFile {
    /// Its guest physical address.
    pub start: u64,
    /// It.
    pub mapping: FileMapping,
    file_system: Option<&'static str>,
}

/// Maps the files that a guest of `config`, with this memory, sees as memory.
pub(super) fn map_files(
    config: &VmConfig,
    ram: &[(u64, u64)],
) -> Result<Vec<MappedFile>, BuildError> {
    let granule = usize::try_from(layout::PMEM_GRANULE).unwrap_or(usize::MAX);
    let ram_end = ram.last().map_or(0, |(start, len)| start + len);
    let mut next = layout::pmem_start(ram_end);
    let drives = config.drives.iter();
    drives
        .filter(|drive| drive.interface == DriveInterface::Pmem)
        .map(|drive| {
            let Drive {
                file, file_system, ..
            } = Drive::open(drive)?;
            let path = drive.path.clone();
            let mapping = FileMapping::new(file, granule)
                .map_err(|source| BuildError::Map { path, source })?;
            let start = next;
            next = layout::pmem_start(start + mapping.size() as u64);
            Ok(MappedFile {
                start,
                mapping,
                file_system,
            })
        })
        .collect()
}

/// What the kernel needs to mount its root file system.
struct Root {
    interface: DriveInterface,
    read_only: bool,
    file_system: Option<&'static str>,
}

impl<'a> Devices<'a> {
    /// The devices of `config`, as new, or each as `saved` has it; and those of them that can be saved.
    pub fn new(
        config: &VmConfig,
        memory: &Arc<GuestMemory>,
        mapped: Vec<MappedFile>,
        saved: Option<(&'a DeviceStates, SavedDisks)>,
    ) -> Result<(Self, LiveDevices), BuildError> {
        let (saved, saved_disks) = saved.unzip();
        let mut devices = Self {
            memory: Arc::clone(memory),
            saved: saved.map(|saved| saved.virtio.iter()),
            saved_disks,
            disks: Disks::new(),
            pio: Bus::default(),
            mmio: Bus::default(),
            irqs: Vec::new(),
            windows: Vec::new(),
            mapped: mapped.into_iter(),
            files: Vec::new(),
            subscribers: Vec::new(),
            transports: Vec::new(),
            vsock: None,
            lane: None,
            lane_doorbell: None,
            agent_spoken: None,
            agent_link: None,
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
        if let Some(vsock) = &config.vsock {
            if config.lane {
                let saved = saved.map(|saved| saved.lane.as_ref());
                devices.add_lane(vsock, saved)?;
            }
            devices.add_vsock(vsock)?;
        }
        devices.add_rng()?;
        if devices.saved.as_mut().and_then(Iterator::next).is_some() {
            return Err(BuildError::OtherDevices("more devices were saved"));
        }
        // Last: a file for the console is made anew only where nothing else was refused.
        let serial = devices.add_serial(&config.console, saved.map(|saved| &saved.serial))?;
        let live = LiveDevices {
            serial,
            virtio: std::mem::take(&mut devices.transports),
            vsock: devices.vsock.take(),
            lane: devices.lane.take(),
            disks: std::mem::take(&mut devices.disks),
        };
        Ok((devices, live))
    }

    /// The state that the next virtio device continues from, `None` for a machine that boots.
    fn next_saved(&mut self) -> Result<Option<&'a VirtioState>, BuildError> {
        match &mut self.saved {
            None => Ok(None),
            Some(rest) => rest
                .next()
                .map(Some)
                .ok_or(BuildError::OtherDevices("fewer devices were saved")),
        }
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
        saved: Option<&SerialState>,
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
        let tail = self.console.clone();
        let port = match saved {
            None => SerialPort::new(line, tail, stream),
            Some(state) => SerialPort::restore(line, tail, stream, state)?,
        };
        let port = Arc::new(Mutex::new(port));
        self.pio
            .insert(layout::SERIAL_PORT, 8, Arc::clone(&port) as _)?;
        Ok(port)
    }

    fn add_drive(&mut self, index: usize, config: &DriveConfig) -> Result<(), BuildError> {
        let id = format!("drive-{index}");
        let file_system = match config.interface {
            DriveInterface::Block => {
                let path = config.path.clone();
                if let Some(saved) = self.saved_disks.as_mut().filter(|_| !config.read_only) {
                    let disk = saved.disks.remove(&index);
                    let disk = disk.ok_or(BuildError::OtherDevices("a disk has no content"))?;
                    let disk = Disk::over(disk.backing, disk.sectors, &saved.dir, &id)?;
                    return self.add_block(index, disk, path, id);
                }
                let drive = Drive::open(config)?;
                let file_system = drive.file_system;
                let mut disk = Disk::of_file(drive.file, &path, config.read_only)?;
                if let Some(lock) = drive.lock {
                    disk = disk.with_reader(lock);
                }
                self.add_block(index, disk, path, id)?;
                file_system
            }
            DriveInterface::Pmem => self.add_pmem(id)?,
        };
        if index == 0 {
            self.root = Some(Root {
                interface: config.interface,
                read_only: config.read_only,
                file_system,
            });
        }
        Ok(())
    }

    fn add_block(
        &mut self,
        index: usize,
        disk: Disk,
        path: PathBuf,
        id: String,
    ) -> Result<(), BuildError> {
        let disk = Arc::new(disk);
        if !disk.read_only() {
            self.disks.insert(index, Arc::clone(&disk));
        }
        let config = BlockConfig { disk, path, id };
        match self.next_saved()? {
            None => self.add_virtio(Block::new(config)?, None),
            Some(VirtioState {
                transport,
                device: VirtioDeviceState::Block(state),
            }) => self.add_virtio(Block::restore(config, state)?, Some(transport)),
            Some(_) => Err(BuildError::OtherDevices("a block device is new")),
        }
        .map(drop)
    }

    /// Gives the file's kind of file system.
    fn add_pmem(&mut self, id: String) -> Result<Option<&'static str>, BuildError> {
        let file = self.mapped.next();
        let file = file.ok_or(BuildError::OtherDevices("a file is not mapped"))?;
        let (start, size) = (file.start, file.mapping.size() as u64);
        self.files.push((start, file.mapping));
        let config = PmemConfig { id, start, size };
        match self.next_saved()? {
            None => self.add_virtio(Pmem::new(config)?, None),
            Some(VirtioState {
                transport,
                device: VirtioDeviceState::Pmem(state),
            }) => self.add_virtio(Pmem::restore(config, state)?, Some(transport)),
            Some(_) => Err(BuildError::OtherDevices("a pmem device is new")),
        }?;
        Ok(file.file_system)
    }

    /// The lane, new, or as it was `saved`.
    fn add_lane(
        &mut self,
        vsock: &VsockConfig,
        saved: Option<Option<&LaneState>>,
    ) -> Result<(), BuildError> {
        let config = LaneConfig {
            socket_path: vsock.socket.clone(),
            port: AGENT_PORT,
        };
        let memory = Arc::clone(&self.memory);
        let irq = Arc::new(self.irq(layout::LANE_GSI)?);
        let spoken = EventFd::new(EFD_NONBLOCK)?;
        let mut lane = Lane::new(config, memory, irq, spoken.try_clone()?)?;
        match saved {
            None => {}
            Some(None) => return Err(BuildError::OtherDevices("the lane is new")),
            Some(Some(state)) => self.agent_link = lane.load(state)?,
        }
        self.agent_spoken = Some(spoken);
        self.lane_doorbell = Some(lane.doorbell().try_clone()?);
        let lane = Arc::new(Mutex::new(lane));
        let (base, size) = (layout::LANE_START, lane::WINDOW_SIZE);
        self.mmio.insert(base, size, Arc::clone(&lane) as _)?;
        self.subscribers.push(Arc::clone(&lane) as _);
        self.lane = Some(lane);
        Ok(())
    }

    fn add_vsock(&mut self, config: &VsockConfig) -> Result<(), BuildError> {
        let (cid, socket_path) = (config.cid, config.socket.clone());
        let config = vsock::VsockConfig {
            cid,
            socket_path,
            kept_port: AGENT_PORT,
        };
        let mut vsock = Vsock::new(config)?;
        if let Some(spoken) = self.agent_spoken.take() {
            vsock = vsock.beside_lane(spoken);
        }
        let vsock = match self.next_saved()? {
            None => self.add_virtio(vsock, None),
            Some(VirtioState {
                transport,
                device: VirtioDeviceState::Vsock(state),
            }) => {
                let link = self.agent_link.take();
                self.agent_link = vsock.load_beside(state, link)?;
                self.add_virtio(vsock, Some(transport))
            }
            Some(_) => Err(BuildError::OtherDevices("the vsock device is new")),
        }?;
        self.vsock = Some(vsock);
        Ok(())
    }

    fn add_rng(&mut self) -> Result<(), BuildError> {
        match self.next_saved()? {
            None => self.add_virtio(Rng::new()?, None),
            Some(VirtioState {
                transport,
                device: VirtioDeviceState::Rng,
            }) => self.add_virtio(Rng::new()?, Some(transport)),
            Some(_) => Err(BuildError::OtherDevices("the entropy device is new")),
        }
        .map(drop)
    }

    /// Gives a virtio device the next window, interrupt line and a place in the event loop. Behind a `saved` transport it
    /// is activated as it was.
    fn add_virtio<D>(
        &mut self,
        device: D,
        saved: Option<&VirtioMmioState>,
    ) -> Result<Arc<Mutex<D>>, BuildError>
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
        let (memory, behind) = (Arc::clone(&self.memory), Arc::clone(&device) as _);
        let transport = match saved {
            None => MmioTransport::new(memory, irq, behind),
            Some(state) => MmioTransport::restore(memory, irq, behind, state)?,
        };
        let events = transport.queue_events().iter().map(EventFd::try_clone);
        self.windows
            .push((base, events.collect::<io::Result<_>>()?));
        let transport = Arc::new(Mutex::new(transport));
        self.mmio
            .insert(base, WINDOW_SIZE, Arc::clone(&transport) as _)?;
        self.transports.push(transport);
        self.subscribers.push(Arc::clone(&device) as _);
        Ok(device)
    }

    /// The kernel's command line: what every guest needs, what this kind of KVM needs, the devices, the
    /// user's words.
    pub fn cmdline(&self, config: &VmConfig, kind: KvmKind) -> String {
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
        if self.lane_doorbell.is_some() {
            let (base, gsi) = (layout::LANE_START, layout::LANE_GSI);
            words.push(format!("lane.device={base:#x}:{gsi}"));
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

    /// Connects interrupts and queue notifications to KVM. What a restored device has to say arrives then: so the interrupt
    /// controllers are restored before.
    pub fn connect(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        for (gsi, line) in &self.irqs {
            vm.register_irqfd(line, *gsi)
                .map_err(call_failed("KVM_IRQFD"))?;
        }
        if let Some(doorbell) = &self.lane_doorbell {
            let at = IoEventAddress::Mmio(layout::LANE_START + lane::DOORBELL);
            vm.register_ioevent(doorbell, &at, NoDatamatch)
                .map_err(call_failed("KVM_IOEVENTFD"))?;
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
