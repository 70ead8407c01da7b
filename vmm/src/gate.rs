//! Where a thread that serves a machine can be held: it passes here between two pieces of its work.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long to look for a thread that comes to rest, before it is slept for: to be woken takes as long.
const SPIN: Duration = Duration::from_micros(50);

/// What a thread is wanted to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Work.
    Run,
    /// Wait at the gate.
    Pause,
    /// End.
    Stop,
}

/// Something to do with what the thread works on, by the thread, while it waits.
type Task<T> = Box<dyn FnOnce(&T) + Send>;

struct State<T> {
    wanted: Wanted,
    /// The thread waits at the gate, and stays there until `wanted` changes.
    parked: bool,
    /// The thread has ended: it is at rest for good.
    ended: bool,
    task: Option<Task<T>>,
}

/// The gate of one thread, which works on a `T`.
pub struct Gate<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    /// What `parked` or `ended` last were, for who looks without the lock.
    at_rest: AtomicBool,
}

impl<T> Default for Gate<T> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                wanted: Wanted::Run,
                parked: false,
                ended: false,
                task: None,
            }),
            changed: Condvar::new(),
            at_rest: AtomicBool::new(false),
        }
    }
}

impl<T> Gate<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by the thread: waits while a pause is wanted, and does meanwhile with `subject` what it is given. False where it shall end;
    /// otherwise `going` happens before anybody can want something else.
    pub fn pass(&self, subject: &T, going: impl FnOnce()) -> bool {
        let mut state = self.lock();
        while state.wanted == Wanted::Pause {
            state.parked = true;
            if let Some(task) = state.task.take() {
                drop(state);
                task(subject);
                state = self.lock();
                continue;
            }
            self.at_rest.store(true, Ordering::Relaxed);
            self.changed.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = false;
        let goes = state.wanted == Wanted::Run;
        if goes {
            going();
        }
        goes
    }

    /// Called by the thread at its end. Whoever waits for a task learns that it will not be done.
    pub fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.task = None;
        self.at_rest.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Says what is wanted; `nudge` happens before the thread can pass.
    pub fn want(&self, wanted: Wanted, nudge: impl FnOnce()) {
        let mut state = self.lock();
        state.wanted = wanted;
        if wanted != Wanted::Pause {
            state.task = None;
        }
        if wanted == Wanted::Run {
            // A thread that still waits finds in `pass` that it may run on; the next pause must not take it for parked.
            state.parked = false;
            self.at_rest.store(state.ended, Ordering::Relaxed);
        }
        nudge();
        self.changed.notify_all();
    }

    /// Waits until a pause that is wanted is there, or the thread has ended. False where neither is by `deadline`.
    pub fn wait_parked(&self, deadline: Instant) -> bool {
        let spin_until = Instant::now() + SPIN;
        while !self.at_rest.load(Ordering::Relaxed) && Instant::now() < spin_until {
            std::hint::spin_loop();
        }
        let mut state = self.lock();
        while !state.parked && !state.ended {
            let Some(rest) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            let waited = self.changed.wait_timeout(state, rest);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Has the thread that waits do `task`, without waiting for its end. One that runs again, or has ended, drops it undone.
    pub fn when_parked(&self, task: impl FnOnce(&T) + Send + 'static) {
        let mut state = self.lock();
        if state.parked && !state.ended {
            state.task = Some(Box::new(task));
        }
        self.changed.notify_all();
    }
}
