//! The user's terminal while a program of the guest has one of its own: it passes keys on as they are, and tells its
//! size. And the signals that are meant for a program rather than for us.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::{Handle, Signals};

use crate::agent::{Controller, Pty};

/// After so many requests to end in a row the user means us.
const INSIST: usize = 3;

/// A terminal of the size of ours, if standard output or input is one.
pub fn pty() -> Pty {
    let (rows, columns) = size().unwrap_or((0, 0));
    Pty {
        rows: rows.into(),
        columns: columns.into(),
        term: std::env::var("TERM").unwrap_or_default(),
    }
}

fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin()));
    size.ok().map(|size| (size.ws_row, size.ws_col))
}

/// Standard input as a terminal that passes on every key. It is as it was before when this is dropped.
pub struct RawInput(Termios);

impl RawInput {
    /// Absent where standard input is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }

    fn restore(&self) {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

impl Drop for RawInput {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Passes signals and changes of the terminal's size on to a program, until it is dropped.
pub struct Forwarder {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Begins to. `sizes` are passed on where the program has a terminal, `signals` where they are not for us.
    pub fn start(controller: Controller, sizes: bool, signals: bool) -> io::Result<Self> {
        let mut wanted = Vec::new();
        if sizes {
            wanted.push(SIGWINCH);
        }
        if signals {
            wanted.extend([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2]);
        }
        let mut caught = Signals::new(wanted)?;
        let handle = caught.handle();
        let before = tcgetattr(io::stdin()).ok();
        let forward = move || {
            let mut ends = 0;
            for signal in caught.forever() {
                if signal == SIGWINCH {
                    if let Some((rows, columns)) = size() {
                        let _ = controller.resize(rows, columns);
                    }
                    continue;
                }
                ends += usize::from([SIGHUP, SIGINT, SIGQUIT, SIGTERM].contains(&signal));
                let number = u8::try_from(signal).unwrap_or(0);
                // A connection that is gone ends the program as well. One that hangs is left after a while.
                if controller.signal(number).is_err() || ends >= INSIST {
                    if let Some(before) = &before {
                        let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
                    }
                    signal_hook::low_level::exit(i32::from(number) + 128);
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(forward)?;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
