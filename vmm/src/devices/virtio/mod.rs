//! Virtio devices (Virtual I/O Device, version 1.2) over MMIO.
