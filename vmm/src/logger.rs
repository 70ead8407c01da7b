//! Messages of the monitor: warnings and errors, one line each, on standard error.

use std::fmt::Display;
use std::io::Write;

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
            complain(format_args!("{level}: {}", record.args()));
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

/// Prints a line on standard error. Where that is full or closed, nothing is to be done about it.
pub fn complain(message: impl Display) {
    // One write, so that lines of several threads do not mix.
    let _ = std::io::stderr().write_all(format!("vmm: {message}\n").as_bytes());
}
