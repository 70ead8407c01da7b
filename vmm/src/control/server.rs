//! Serves a sandbox's API: a thread that accepts, and one for each connection, of which there are few.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::http::{HttpError, read_request, write_answer};
use super::routes::{Control, Reply, route};
use super::types::{ErrorBody, ErrorCode, ErrorView};

/// Most requests at once.
const CONNECTIONS_MAX: usize = 32;
/// How long a client may take to send its request, and to take each piece of the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest body of a request, in bytes.
const BODY_MAX: usize = 1 << 20;
/// Stack of a connection's thread, in bytes.
const STACK_SIZE: usize = 256 << 10;

/// A server that runs. It ends with the process.
pub struct Server {
    busy: Arc<AtomicUsize>,
}

/// Counts a request for as long as it is served.
struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Server {
    /// Serves `control` at `socket`.
    pub fn start(socket: &Path, control: Arc<Control>) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let busy = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&busy);
        Builder::new()
            .name("api".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                loop {
                    match listener.accept() {
                        Ok((stream, _)) => serve(stream, &control, &counter),
                        Err(error) => {
                            log::warn!("API: cannot accept a connection: {error}");
                            std::thread::sleep(Duration::from_millis(100));
                        }
                    }
                }
            })?;
        Ok(Self { busy })
    }

    /// Waits until all requests are answered, at most this long.
    pub fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.busy.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Gives a connection a thread, or a refusal where there are too many.
fn serve(mut stream: UnixStream, control: &Arc<Control>, counter: &Arc<AtomicUsize>) {
    let count = counter.fetch_add(1, Ordering::SeqCst);
    let busy = Busy(Arc::clone(counter));
    let timeouts = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    if timeouts.is_err() {
        return;
    }
    if count >= CONNECTIONS_MAX {
        let message = format!("{CONNECTIONS_MAX} requests are being served; try again later");
        // The answer is short enough for the socket's buffer.
        let _ = refuse(&mut stream, ErrorBody::new(ErrorCode::Busy, message));
        return;
    }
    let control = Arc::clone(control);
    let spawned = Builder::new()
        .name("api-request".to_owned())
        .stack_size(STACK_SIZE)
        .spawn(move || {
            let _busy = busy;
            // It fails where the client is gone, who then learns nothing.
            let _ = answer(&mut stream, &control);
        });
    if let Err(error) = spawned {
        log::warn!("API: no thread for a request: {error}");
    }
}

fn answer(stream: &mut UnixStream, control: &Control) -> io::Result<()> {
    let request = match read_request(stream, BODY_MAX) {
        Ok(request) => request,
        Err(HttpError::Io(error)) => return Err(error),
        Err(error) => {
            let message = error.to_string();
            return refuse(stream, ErrorBody::new(ErrorCode::BadRequest, message));
        }
    };
    match route(control, &request, stream) {
        Ok(Reply::Json(json)) => write_answer(stream, 200, "application/json", &json),
        Ok(Reply::Text(kind, text)) => write_answer(stream, 200, kind, text.as_bytes()),
        Ok(Reply::Sent) => stream.flush(),
        Err(error) => refuse(stream, error),
    }
}

fn refuse(stream: &mut UnixStream, error: ErrorBody) -> io::Result<()> {
    let status = error.code.status();
    let json = serde_json::to_vec(&ErrorView { error })?;
    write_answer(stream, status, "application/json", &json)
}
