//! The thread that serves the devices' events.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::exit::{ExitLatch, ExitReason};

/// A device's side that the event loop calls.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Why the event loop could not be started.
#[derive(Debug, Error)]
pub enum EventLoopError {
    /// epoll failed.
    #[error("cannot make the event loop: {0}")]
    Create(event_manager::Error),
    /// No eventfd, or no thread.
    #[error("cannot start the event loop: {0}")]
    Start(#[from] io::Error),
}

/// The running event loop. It stops when it is dropped.
pub struct EventLoop {
    stop: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Wakes the loop so that it sees `stop`.
struct Wake(EventFd);

impl MutEventSubscriber for Wake {
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0, EventSet::IN)) {
            log::error!("event loop: cannot watch its own eventfd: {error}");
        }
    }
}

impl EventLoop {
    /// Starts a loop that serves `subscribers`. Its unexpected end is written to `exit`.
    pub fn start(subscribers: Vec<Subscriber>, exit: ExitLatch) -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Subscriber>::new().map_err(EventLoopError::Create)?;
        let wake = EventFd::new(EFD_NONBLOCK)?;
        manager.add_subscriber(Arc::new(Mutex::new(Wake(wake.try_clone()?))));
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = Builder::new()
            .name("event-loop".to_owned())
            .spawn(move || {
                while !stopped.load(Ordering::SeqCst) {
                    match manager.run() {
                        Ok(_) => {}
                        Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {
                        }
                        Err(error) => {
                            return exit.set(ExitReason::Monitor(format!("event loop: {error}")));
                        }
                    }
                }
            })?;
        Ok(Self {
            stop,
            wake,
            thread: Some(thread),
        })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // It fails only where the counter is full, and then the loop wakes as well.
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
