//! The virtio-mmio transport, version 2 (Virtio 1.2, section 4.2).
//!
//! Invariants:
//! - features change only between DRIVER and FEATURES_OK, and FEATURES_OK is granted only to a driver
//!   that accepts [`F_VERSION_1`] and nothing that was not offered;
//! - a queue's size and addresses change only before DRIVER_OK and while that queue is not ready, and
//!   a queue becomes ready only if its rings are valid and lie in guest memory;
//! - the device holds the queues from DRIVER_OK to reset, and never otherwise.
//!
//! A driver that breaks them is ignored where the specification lets a device ignore it; a bad queue
//! fails the device, which then waits for a reset. Registers that are reserved, read-only, or accessed
//! with another width than 32 bits read as zero and ignore writes.
//!
//! Interrupt status and acknowledgement never take the device's lock, so that a busy device does not
//! stall a vCPU.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snapshot_fmt::state::virtio::{VirtioMmioState, VirtioState, VirtqueueState};
use thiserror::Error;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use self::register::{DRIVER_BITS, MAGIC, VENDOR, half, set_half};
use super::signal::{INTERRUPT_CONFIG, INTERRUPT_USED_BUFFER, Signal, status};
use super::{Activation, F_EVENT_IDX, F_VERSION_1, GuestMemory, VirtioDevice, notify_all};
use crate::devices::bus::BusDevice;
use crate::devices::interrupt::Interrupt;

#[cfg(test)]
mod hostile_tests;
mod register;
#[cfg(test)]
mod tests;

/// Size in bytes of the register window.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Offset of `QueueNotify`, which an ioeventfd may answer.
pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

/// Why a saved transport cannot be restored.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The device is of another type.
    #[error("{name} has device type {device}, the saved one {saved}")]
    DeviceType {
        /// The device's name.
        name: String,
        /// Its type.
        device: u32,
        /// The saved type.
        saved: u32,
    },
    /// The driver had accepted features that this device does not offer.
    #[error("{name} lacks the features {missing:#x} that its driver uses")]
    Features {
        /// The device's name.
        name: String,
        /// The missing bits.
        missing: u64,
    },
    /// A status that no driver can bring about.
    #[error("{name}: the saved status {status:#x} is not one that a driver can reach")]
    Status {
        /// The device's name.
        name: String,
        /// The status.
        status: u32,
    },
    /// The device has another number of queues.
    #[error("{name} has {device} queues, the saved one {saved}")]
    QueueCount {
        /// The device's name.
        name: String,
        /// Its number of queues.
        device: usize,
        /// The saved number.
        saved: usize,
    },
    /// A saved queue is not valid.
    #[error("{name}: {reason}")]
    Queue {
        /// The device's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The registers of one device.
pub struct MmioTransport {
    memory: Arc<GuestMemory>,
    signal: Arc<Signal>,
    device: Arc<Mutex<dyn VirtioDevice>>,
    // Copies of what never changes, so that they can be read without the device's lock.
    device_type: u32,
    device_features: u64,
    max_sizes: Vec<u16>,
    events: Arc<[EventFd]>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    /// As the driver set them up; once active, the positions are the device's.
    queues: Vec<VirtqueueState>,
    active: bool,
}

impl MmioTransport {
    /// A transport in the reset state for `device`, which interrupts its driver by `irq`.
    pub fn new(
        memory: Arc<GuestMemory>,
        irq: Arc<dyn Interrupt>,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> Self {
        let locked = lock(&device);
        let signal = Arc::new(Signal::new(locked.name(), irq));
        let (device_type, device_features) = (locked.device_type(), locked.features());
        let (max_sizes, events) = (locked.queue_sizes().to_vec(), locked.queue_events());
        drop(locked);
        let queues = reset_queues(&max_sizes);
        Self {
            memory,
            signal,
            device,
            device_type,
            device_features,
            max_sizes,
            events,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            active: false,
        }
    }

    /// A transport as [`MmioTransport::save`] left it, its device activated if it was. Unacknowledged
    /// interrupts are raised again.
    pub fn restore(
        memory: Arc<GuestMemory>,
        irq: Arc<dyn Interrupt>,
        device: Arc<Mutex<dyn VirtioDevice>>,
        state: &VirtioMmioState,
    ) -> Result<Self, TransportError> {
        let mut this = Self::new(memory, irq, device);
        this.load(state)?;
        Ok(this)
    }

    /// Goes on from what [`MmioTransport::save`] left, after [`MmioTransport::stop`] or as new. Its device is what it was then.
    pub fn load(&mut self, state: &VirtioMmioState) -> Result<(), TransportError> {
        let name = || lock(&self.device).name();
        if state.device_type != self.device_type {
            return Err(TransportError::DeviceType {
                name: name(),
                device: self.device_type,
                saved: state.device_type,
            });
        }
        if !register::is_reachable(state.status)
            || state.status & status::FEATURES_OK != 0 && state.driver_features & F_VERSION_1 == 0
        {
            return Err(TransportError::Status {
                name: name(),
                status: state.status,
            });
        }
        let missing = state.driver_features & !self.device_features;
        if missing != 0 && state.status & status::FEATURES_OK != 0 {
            return Err(TransportError::Features {
                name: name(),
                missing,
            });
        }
        if state.queues.len() != self.max_sizes.len() {
            return Err(TransportError::QueueCount {
                name: name(),
                device: self.max_sizes.len(),
                saved: state.queues.len(),
            });
        }
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.queues.clone_from(&state.queues);
        self.signal.load(
            state.status,
            state.interrupt_status & (INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG),
            state.config_generation,
        );
        let stopped = status::DEVICE_NEEDS_RESET | status::FAILED;
        if state.status & status::DRIVER_OK != 0 && state.status & stopped == 0 {
            self.activate().map_err(|reason| TransportError::Queue {
                name: lock(&self.device).name(),
                reason,
            })?;
        }
        self.signal.resend();
        Ok(())
    }

    /// The registers and queues as they are. The device must be quiet: its vCPUs and the event loop
    /// stopped.
    pub fn save(&self) -> VirtioMmioState {
        let mut queues = self.queues.clone();
        for (saved, live) in queues.iter_mut().zip(lock(&self.device).queues_mut()) {
            saved.next_avail = live.next_avail();
            saved.next_used = live.next_used();
        }
        VirtioMmioState {
            device_type: self.device_type,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            status: self.signal.status(),
            interrupt_status: self.signal.interrupt_status(),
            config_generation: self.signal.config_generation(),
            queues,
        }
    }

    /// The transport and its device as they are, under the conditions of [`MmioTransport::save`].
    pub fn save_with_device(&self) -> VirtioState {
        VirtioState {
            transport: self.save(),
            device: lock(&self.device).state(),
        }
    }

    /// One event for each queue, to be registered as ioeventfd for a 32-bit write of the queue's index
    /// at [`QUEUE_NOTIFY`]. A write that reaches the register itself has the same effect.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    /// The device's way to its driver.
    pub fn signal(&self) -> &Arc<Signal> {
        &self.signal
    }

    fn has(&self, bits: u32) -> bool {
        self.signal.status() & bits == bits
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel)
            .ok()
            .filter(|&index| index < self.queues.len())
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.selected();
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => self.device_type,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.device_features, self.device_features_sel),
            register::QUEUE_NUM_MAX => queue.map_or(0, |index| self.max_sizes[index].into()),
            register::QUEUE_READY => queue.map_or(0, |index| self.queues[index].ready.into()),
            register::INTERRUPT_STATUS => self.signal.interrupt_status(),
            register::STATUS => self.signal.status(),
            register::SHM_FIRST..=register::SHM_LAST => u32::MAX,
            register::CONFIG_GENERATION => self.signal.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => self.signal.acknowledge(value),
            register::STATUS => self.write_status(value),
            register::QUEUE_NUM
            | register::QUEUE_READY
            | register::QUEUE_DESC_LOW
            | register::QUEUE_DESC_HIGH
            | register::QUEUE_DRIVER_LOW
            | register::QUEUE_DRIVER_HIGH
            | register::QUEUE_DEVICE_LOW
            | register::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            _ => {}
        }
    }

    fn write_features(&mut self, value: u32) {
        if !self.has(status::DRIVER) || self.has(status::FEATURES_OK) {
            self.signal
                .warn("features written outside of their negotiation are ignored");
            return;
        }
        set_half(&mut self.driver_features, self.driver_features_sel, value);
    }

    fn notify(&self, index: u32) {
        let event = usize::try_from(index).ok().and_then(|i| self.events.get(i));
        if let Some(event) = event {
            notify_all(std::slice::from_ref(event));
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let Some(index) = self.selected() else {
            return;
        };
        if offset == register::QUEUE_READY {
            self.write_ready(index, value);
            return;
        }
        if self.queues[index].ready || self.has(status::DRIVER_OK) {
            self.signal.warn(format_args!(
                "set-up of queue {index} while it is in use is ignored"
            ));
            return;
        }
        let queue = &mut self.queues[index];
        match offset {
            register::QUEUE_NUM => queue.size = value,
            register::QUEUE_DESC_LOW => set_half(&mut queue.desc_table, 0, value),
            register::QUEUE_DESC_HIGH => set_half(&mut queue.desc_table, 1, value),
            register::QUEUE_DRIVER_LOW => set_half(&mut queue.avail_ring, 0, value),
            register::QUEUE_DRIVER_HIGH => set_half(&mut queue.avail_ring, 1, value),
            register::QUEUE_DEVICE_LOW => set_half(&mut queue.used_ring, 0, value),
            register::QUEUE_DEVICE_HIGH => set_half(&mut queue.used_ring, 1, value),
            _ => {}
        }
    }

    fn write_ready(&mut self, index: usize, value: u32) {
        match (value, self.queues[index].ready) {
            (0, true) => {
                // Section 4.2.2.2: the driver may stop a queue, and must then be left in peace.
                self.queues[index].ready = false;
                if let Some(queue) = lock(&self.device).queues_mut().get_mut(index) {
                    queue.set_ready(false);
                }
            }
            (1, false) if !self.has(status::FEATURES_OK) || self.has(status::DRIVER_OK) => {
                self.signal.warn(format_args!(
                    "queue {index} enabled outside of set-up is ignored"
                ));
            }
            (1, false) => {
                self.queues[index].ready = true;
                if let Err(reason) = self.build_queue(index) {
                    self.queues[index].ready = false;
                    self.signal.fail(reason);
                }
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.signal.status();
        let new = value & DRIVER_BITS;
        if old & DRIVER_BITS & !new != 0 {
            self.signal.warn(format_args!(
                "status {value:#x} would take back bits of {old:#x} and is ignored"
            ));
            return;
        }
        let added = new & !old;
        if added & status::FAILED != 0 {
            self.signal.warn("the driver has given up");
            self.stop();
            self.signal.add_status(status::FAILED);
            return;
        }
        // In the order of section 3.1.1, each step only on top of the one before.
        let steps = [
            (status::ACKNOWLEDGE, 0),
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
        ];
        for (bit, before) in steps {
            if added & bit == 0 {
                continue;
            }
            if !self.has(before) || !self.allows(bit) {
                break;
            }
            self.signal.add_status(bit);
            if bit == status::DRIVER_OK
                && let Err(reason) = self.activate()
            {
                self.signal.fail(reason);
            }
        }
    }

    fn allows(&self, bit: u32) -> bool {
        if bit == status::DRIVER_OK {
            return !self.has(status::FAILED) && !self.signal.has_failed();
        }
        if bit != status::FEATURES_OK {
            return true;
        }
        let alien = self.driver_features & !self.device_features;
        if alien != 0 {
            self.signal
                .warn(format_args!("features {alien:#x} were not offered"));
        } else if self.driver_features & F_VERSION_1 == 0 {
            self.signal.warn("legacy drivers are not supported");
        }
        alien == 0 && self.driver_features & F_VERSION_1 != 0
    }

    fn build_queue(&self, index: usize) -> Result<Queue, String> {
        let (saved, max_size) = (&self.queues[index], self.max_sizes[index]);
        let wrong = |reason: &dyn std::fmt::Display| {
            format!(
                "queue {index} of {} descriptors at {:#x}, {:#x}, {:#x}: {reason}",
                saved.size, saved.desc_table, saved.avail_ring, saved.used_ring
            )
        };
        if !saved.ready {
            return Queue::new(max_size).map_err(|error| wrong(&error));
        }
        let size = u16::try_from(saved.size)
            .map_err(|_| wrong(&format_args!("at most {max_size} are possible")))?;
        let queue = Queue::try_from(QueueState {
            max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: self.driver_features & F_EVENT_IDX != 0,
            size,
            ready: true,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        })
        .map_err(|error| wrong(&error))?;
        // Address 0 means to virtio-queue that the ring was never set.
        if queue.avail_ring() == 0 {
            return Err(wrong(&"the available ring has no address"));
        }
        if !queue.is_valid(&*self.memory) {
            return Err(wrong(&"its rings are not in guest memory"));
        }
        Ok(queue)
    }

    fn activate(&mut self) -> Result<(), String> {
        let queues = (0..self.queues.len())
            .map(|index| self.build_queue(index))
            .collect::<Result<Vec<_>, _>>()?;
        lock(&self.device).activate(Activation {
            memory: self.memory.clone(),
            signal: self.signal.clone(),
            queues,
            features: self.driver_features,
        });
        self.active = true;
        // What the driver or an earlier life made available is served now.
        notify_all(&self.events);
        Ok(())
    }

    /// Takes the queues from the device, which forgets what the driver had set up.
    pub fn stop(&mut self) {
        if self.active {
            lock(&self.device).reset();
            self.active = false;
        }
    }

    /// Section 2.4.
    fn reset(&mut self) {
        self.stop();
        self.signal.reset();
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues = reset_queues(&self.max_sizes);
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            lock(&self.device).read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            if self.has(status::DRIVER) {
                lock(&self.device).write_config(offset, data);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn lock(device: &Mutex<dyn VirtioDevice>) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn reset_queues(max_sizes: &[u16]) -> Vec<VirtqueueState> {
    max_sizes
        .iter()
        .map(|&max_size| VirtqueueState {
            size: max_size.into(),
            ..VirtqueueState::default()
        })
        .collect()
}
