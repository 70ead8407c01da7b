//! Messages of the monitor: warnings and errors, one line each, on standard error.

use log::{LevelFilter, Log, Metadata, Record};

struct StderrLogger;

impl Log for StderrLogger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        // virtio-queue reports each bad queue that a guest sets up, as often as it likes; our devices say it once.
        !metadata.target().starts_with("virtio_queue")
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            eprintln!("vmm: {level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Sends messages to standard error from now on.
pub fn install() {
    // It fails only where there is a logger already.
    if log::set_logger(&StderrLogger).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}
