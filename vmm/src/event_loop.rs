//! The thread that serves the devices' events.
//!
//! It can be made to stand still between two events: then no request is half done, no device's state changes, and what
//! comes meanwhile waits in the eventfds and sockets that it watches.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::exit::{ExitLatch, ExitReason};
use crate::gate::{Gate, Wanted};

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

/// The event loop did not come to rest.
#[derive(Debug, Error)]
#[error(
    "the devices did not come to rest: the host's disk or processors are overloaded; the VM runs on"
)]
pub struct QuiesceError;

/// The running event loop. It stops when it is dropped.
pub struct EventLoop {
    gate: Arc<Gate<()>>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Wakes the loop so that it looks at its gate.
struct Wake(EventFd);

impl MutEventSubscriber for Wake {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // Fails only where there is nothing to take back.
        let _ = self.0.read();
    }

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
        let gate = Arc::new(Gate::default());
        let own = Arc::clone(&gate);
        let thread = Builder::new()
            .name("event-loop".to_owned())
            .spawn(move || {
                while own.pass(&(), || ()) {
                    match manager.run() {
                        Ok(_) => {}
                        Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {
                        }
                        Err(error) => {
                            exit.set(ExitReason::Monitor(format!("event loop: {error}")));
                            break;
                        }
                    }
                }
                own.end();
            })?;
        Ok(Self {
            gate,
            wake,
            thread: Some(thread),
        })
    }

    /// Asks the loop to stand still between two events. What comes meanwhile waits.
    pub fn ask_to_pause(&self) {
        self.want(Wanted::Pause);
    }

    /// Waits until the loop, which was asked to, stands still. Where that is not the case by `deadline`, it runs on.
    pub fn wait_paused(&self, deadline: Instant) -> Result<(), QuiesceError> {
        if self.gate.wait_parked(deadline) {
            return Ok(());
        }
        self.resume();
        Err(QuiesceError)
    }

    /// Has the thread of a loop that stands still do `task`, without waiting for its end. A loop that runs again, or has ended, drops the task undone.
    pub fn when_paused(&self, task: impl FnOnce() + Send + 'static) {
        self.gate.when_parked(|()| task());
    }

    /// Lets the loop go on. One that runs is left alone.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Asks the loop to end.
    pub fn stop(&self) {
        self.want(Wanted::Stop);
    }

    /// Whether its thread has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Leaves the thread to itself: it has been asked to end and cannot. It keeps what it works with.
    pub fn abandon(&mut self) {
        self.thread = None;
    }

    fn want(&self, wanted: Wanted) {
        self.gate.want(wanted, || ());
        if wanted != Wanted::Run {
            // It fails only where the counter is full, and then the loop wakes as well.
            let _ = self.wake.write(1);
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.want(Wanted::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    /// Says when an event begins, and ends it when it is told to.
    struct Slow {
        event: EventFd,
        begun: Sender<()>,
        end: Receiver<()>,
    }

    impl MutEventSubscriber for Slow {
        fn process(&mut self, _: Events, _: &mut EventOps) {
            let _ = self.event.read();
            let _ = self.begun.send(());
            let _ = self.end.recv();
        }

        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }
    }

    struct Running {
        event_loop: EventLoop,
        event: EventFd,
        begun: Receiver<()>,
        end: Sender<()>,
    }

    fn start() -> Running {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (tell, begun) = channel();
        let (end, wait) = channel();
        let slow = Slow {
            event: event.try_clone().unwrap(),
            begun: tell,
            end: wait,
        };
        let exit = ExitLatch::new().unwrap();
        Running {
            event_loop: EventLoop::start(vec![Arc::new(Mutex::new(slow))], exit).unwrap(),
            event,
            begun,
            end,
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    fn pause(event_loop: &EventLoop, deadline: Instant) -> Result<(), QuiesceError> {
        event_loop.ask_to_pause();
        event_loop.wait_paused(deadline)
    }

    fn soon() -> Instant {
        Instant::now() + LONG
    }

    #[test]
    fn a_paused_loop_serves_nothing_and_goes_on_after() {
        let running = start();
        for _ in 0..20 {
            pause(&running.event_loop, soon()).unwrap();
            pause(&running.event_loop, soon()).unwrap();
            running.event.write(1).unwrap();
            let early = running.begun.recv_timeout(Duration::from_millis(5));
            assert!(early.is_err(), "an event in the pause");
            running.event_loop.resume();
            running.begun.recv_timeout(LONG).unwrap();
            running.end.send(()).unwrap();
        }
        pause(&running.event_loop, soon()).unwrap();
        // A loop that stands still ends as well.
        drop(running.event_loop);
    }

    #[test]
    fn a_pause_waits_for_the_event_that_is_served_but_not_for_ever() {
        let running = start();
        running.event.write(1).unwrap();
        running.begun.recv_timeout(LONG).unwrap();
        assert!(pause(&running.event_loop, Instant::now()).is_err());
        running.end.send(()).unwrap();
        running.event.write(1).unwrap();
        running.begun.recv_timeout(LONG).unwrap();
        std::thread::scope(|scope| {
            let pause = scope.spawn(|| pause(&running.event_loop, soon()));
            assert!(!pause.is_finished());
            running.end.send(()).unwrap();
            pause.join().unwrap().unwrap();
        });
    }
}
