//! `POST /v1/explore`: tries several programs or pieces of code at once, each in a child of its own that goes on from the same moment.
//!
//! The children are released when it is known which of them live on; until then each ends with its parent. So nothing is left of an exploration that is cut
//! short, whoever is killed.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::branch::Conceived;
use super::client::Lines;
use super::exec::check;
use super::http::Chunks;
use super::routes::{Control, TRIAL, client_is_gone};
use super::types::{
    BranchRequest, BranchView, ChildView, EndedView, ErrorBody, ErrorCode, ExecBody, ExecEvent,
    ExploreBody, ExploreEvent, ExploreResult, Keep,
};
use crate::handover::Unborn;
use crate::host;
use crate::sandbox::{SandboxPaths, runtime_dir};
use crate::timings::micros;

/// How much of each output is told, in bytes.
const OUTPUT_MAX: usize = 256 << 10;
/// How much of its end is looked at for a score, in bytes.
const END_MAX: usize = 1024;
/// How often to look whether the client is still there.
const GONE_PAUSE: Duration = Duration::from_millis(100);
/// How long a child may take to take a request.
const PATIENCE: Duration = Duration::from_secs(30);
/// Stack of a thread that waits for a program, in bytes.
const STACK_SIZE: usize = 128 << 10;

/// The beginning of an output, and its last bytes; what lies between is thrown away.
#[derive(Default)]
struct Beginning {
    bytes: Vec<u8>,
    end: Vec<u8>,
    truncated: bool,
}

impl Beginning {
    fn add(&mut self, bytes: &[u8]) {
        let room = OUTPUT_MAX - self.bytes.len();
        self.bytes
            .extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.truncated |= bytes.len() > room;
        self.end.extend_from_slice(bytes);
        let old = self.end.len().saturating_sub(END_MAX);
        self.end.drain(..old);
    }
}

/// What those who run the programs have in common.
struct Trial<'a> {
    runs: &'a [ExecBody],
    children: &'a [ChildView],
    /// The next that nobody has begun.
    next: AtomicUsize,
    /// It is over: nothing more is begun.
    over: AtomicBool,
    /// What runs, to be cut short.
    running: Mutex<Vec<Option<UnixStream>>>,
}

impl Trial<'_> {
    /// Runs one after the other until none is left.
    fn work(&self, results: &SyncSender<ExploreResult>) {
        loop {
            let index = self.next.fetch_add(1, Ordering::SeqCst);
            let (Some(run), Some(child)) = (self.runs.get(index), self.children.get(index)) else {
                return;
            };
            // Nobody listens any more only where it is over.
            let _ = results.send(self.run(index, run, child));
        }
    }

    fn run(&self, index: usize, run: &ExecBody, child: &ChildView) -> ExploreResult {
        let began = Instant::now();
        let (mut stdout, mut stderr) = (Beginning::default(), Beginning::default());
        let ended = self.outcome(index, run, child, &mut stdout, &mut stderr);
        let (ended, error) = match ended {
            Ok(ended) => (Some(ended), None),
            Err(error) => (None, Some(error)),
        };
        ExploreResult {
            index,
            name: child.name.clone(),
            error,
            score: ended
                .as_ref()
                .filter(|ended| ended.status == 0)
                .and_then(|_| score(&stdout.end)),
            ended,
            stdout: BASE64_STANDARD.encode(&stdout.bytes),
            stderr: BASE64_STANDARD.encode(&stderr.bytes),
            truncated: stdout.truncated || stderr.truncated,
            took_us: micros(began.elapsed()),
        }
    }

    fn outcome(
        &self,
        index: usize,
        run: &ExecBody,
        child: &ChildView,
        stdout: &mut Beginning,
        stderr: &mut Beginning,
    ) -> Result<EndedView, ErrorBody> {
        let given_up = || ErrorBody::new(ErrorCode::Conflict, "given up: another has won");
        let socket = SandboxPaths::new(runtime_dir().join(&child.id)).api_socket();
        let lines = Lines::ask(&socket, &format!("/v1/exec?{TRIAL}"), run, PATIENCE)?;
        let handle = lines.stream().try_clone().map_err(|error| {
            let message = format!("cannot follow the program: {error}");
            ErrorBody::new(ErrorCode::Internal, message)
        })?;
        {
            let mut all = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if self.over.load(Ordering::SeqCst) {
                return Err(given_up());
            }
            if let Some(place) = all.get_mut(index) {
                *place = Some(handle);
            }
        }
        let mut ended = None;
        let read = lines.read(|event| {
            match event {
                ExecEvent::Stdout(text) => stdout.add(&bytes(&text)?),
                ExecEvent::Stderr(text) => stderr.add(&bytes(&text)?),
                ExecEvent::Ended(view) => ended = Some(Ok(view)),
                ExecEvent::Error(error) => ended = Some(Err(error)),
            }
            Ok::<_, ErrorBody>(())
        });
        let mut all = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let was_cut_short = all
            .get_mut(index)
            .is_some_and(|place| place.take().is_none());
        match (was_cut_short, ended, read) {
            (_, Some(Ok(ended)), _) => Ok(ended),
            (true, ..) => Err(given_up()),
            (_, Some(Err(error)), _) => Err(error),
            (_, None, Err(error)) => Err(error),
            (_, None, Ok(())) => {
                let message = "the child ended before its program did";
                Err(ErrorBody::new(ErrorCode::Agent, message))
            }
        }
    }

    /// Begins nothing more, and cuts short what runs. The children that are not wanted must be gone already: a guest that does not read could
    /// hold this up.
    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.next.store(self.runs.len(), Ordering::SeqCst);
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in running.iter_mut().filter_map(Option::take) {
            // One that is gone has ended the program as well.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Output, as a child's monitor tells it.
fn bytes(text: &str) -> Result<Vec<u8>, ErrorBody> {
    BASE64_STANDARD.decode(text).map_err(|error| {
        let message = format!("the child's monitor told no output: {error}");
        ErrorBody::new(ErrorCode::Internal, message)
    })
}

/// The number that the last line is, of the end of an output.
fn score(end: &[u8]) -> Option<f64> {
    let line = end.trim_ascii_end().rsplit(|byte| *byte == b'\n').next()?;
    let number: f64 = std::str::from_utf8(line).ok()?.trim().parse().ok()?;
    number.is_finite().then_some(number)
}

/// Which children live on.
struct Choice {
    keep: Keep,
    kept: Vec<usize>,
    best: Option<f64>,
}

impl Choice {
    /// Takes a result into account. True where nothing can change any more.
    fn see(&mut self, result: &ExploreResult) -> bool {
        let success = result.ended.as_ref().is_some_and(|ended| ended.status == 0);
        match (self.keep, result.score) {
            (Keep::All, _) => self.kept.push(result.index),
            (Keep::FirstSuccess, _) if success && self.kept.is_empty() => {
                self.kept.push(result.index);
                return true;
            }
            (Keep::Score, Some(score)) => {
                let better = match (self.best, self.kept.first()) {
                    (Some(best), Some(&kept)) => {
                        score > best || (score == best && result.index < kept)
                    }
                    _ => true,
                };
                if better {
                    self.best = Some(score);
                    self.kept = vec![result.index];
                }
            }
            _ => {}
        }
        false
    }
}

impl Control {
    /// Carries it out, and sends what comes of it as it comes. An error is what was refused before anything was sent.
    pub(super) fn explore(&self, body: &ExploreBody, stream: &UnixStream) -> Result<(), ErrorBody> {
        body.runs.iter().try_for_each(check)?;
        if body.runs.is_empty() {
            let message = "runs is empty: give what is to be tried";
            return Err(ErrorBody::new(ErrorCode::BadBody, message));
        }
        let request = BranchRequest {
            count: u32::try_from(body.runs.len()).unwrap_or(u32::MAX),
            name: body.name.clone(),
            ..BranchRequest::default()
        };
        let Conceived {
            children,
            view,
            taken: _taken,
        } = self.conceive(request, None, stream)?;
        let started = stream
            .set_write_timeout(None)
            .and_then(|()| Chunks::start(stream, "application/x-ndjson"));
        // What fails from here on is the client's going; the children go with it.
        if let Ok(mut chunks) = started
            && self.try_all(body, children, view, &mut chunks).is_ok()
        {
            let _ = chunks.end();
        }
        Ok(())
    }

    fn try_all(
        &self,
        body: &ExploreBody,
        children: Vec<Unborn>,
        view: BranchView,
        chunks: &mut Chunks<&UnixStream>,
    ) -> io::Result<()> {
        let trial = Trial {
            runs: &body.runs,
            children: &view.children.clone(),
            next: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            running: Mutex::new(body.runs.iter().map(|_| None).collect()),
        };
        let mut children: Vec<_> = children.into_iter().map(Some).collect();
        let mut choice = Choice {
            keep: body.keep,
            kept: Vec::new(),
            best: None,
        };
        chunks.write_json(&ExploreEvent::Branched(view))?;

        let parallel = match usize::try_from(body.parallel) {
            Ok(0) => host::processors(),
            Ok(parallel) => parallel,
            Err(_) => usize::MAX,
        };
        // What nobody reads waits with its program, not here.
        let (sender, results) = sync_channel(1);
        std::thread::scope(|scope| {
            let trial = &trial;
            for _ in 0..parallel.min(body.runs.len()) {
                let sender = sender.clone();
                let spawned = Builder::new()
                    .name("explore".to_owned())
                    .stack_size(STACK_SIZE)
                    .spawn_scoped(scope, move || trial.work(&sender));
                if let Err(error) = spawned {
                    children.clear();
                    drop(results);
                    trial.end();
                    return Err(error);
                }
            }
            drop(sender);
            follow(trial, results, chunks, &mut children, &mut choice)
        })?;

        let mut kept = Vec::new();
        choice.kept.sort_unstable();
        for index in choice.kept {
            if let (Some(Some(child)), Some(view)) =
                (children.get(index), trial.children.get(index))
                // One whose guest has ended since is none.
                && !child.is_gone()
            {
                child.release()?;
                child.settle();
                kept.push(view.name.clone());
            }
        }
        chunks.write_json(&ExploreEvent::Kept(kept))
    }
}

/// Sends results until there are no more, and lets go of children that will not live on: of all of them where the client is gone.
fn follow(
    trial: &Trial<'_>,
    results: Receiver<ExploreResult>,
    chunks: &mut Chunks<&UnixStream>,
    children: &mut [Option<Unborn>],
    choice: &mut Choice,
) -> io::Result<()> {
    let mut ran = Vec::new();
    let mut next = || loop {
        match results.recv_timeout(GONE_PAUSE) {
            Ok(result) => {
                let decided = choice.see(&result);
                ran.push(result.index);
                for (index, child) in children.iter_mut().enumerate() {
                    if (decided || ran.contains(&index)) && !choice.kept.contains(&index) {
                        *child = None;
                    }
                }
                if decided {
                    trial.end();
                }
                chunks.write_json(&ExploreEvent::Result(result))?;
            }
            Err(RecvTimeoutError::Timeout) if client_is_gone(chunks.stream()) => {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    };
    let outcome = next();
    if outcome.is_err() {
        children.iter_mut().for_each(|child| *child = None);
    }
    drop(results);
    trial.end();
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(index: usize, status: u8, score: Option<f64>) -> ExploreResult {
        ExploreResult {
            index,
            name: String::new(),
            ended: Some(EndedView {
                status,
                timed_out: false,
                oom_killed: false,
                user_ms: 0,
                system_ms: 0,
                peak_memory_bytes: 0,
            }),
            error: None,
            stdout: String::new(),
            stderr: String::new(),
            truncated: false,
            score,
            took_us: 0,
        }
    }

    fn kept(keep: Keep, results: &[ExploreResult]) -> (Vec<usize>, usize) {
        let mut choice = Choice {
            keep,
            kept: Vec::new(),
            best: None,
        };
        let seen = results.iter().position(|result| choice.see(result));
        (choice.kept, seen.map_or(results.len(), |at| at + 1))
    }

    #[test]
    fn the_right_ones_are_kept() {
        let results = [
            result(2, 1, None),
            result(1, 0, Some(3.0)),
            result(0, 0, Some(3.0)),
            result(4, 0, None),
            result(3, 0, Some(-1.0)),
        ];
        assert_eq!(kept(Keep::None, &results), (vec![], 5));
        assert_eq!(kept(Keep::FirstSuccess, &results), (vec![1], 2));
        assert_eq!(kept(Keep::Score, &results), (vec![0], 5));
        assert_eq!(kept(Keep::All, &results), (vec![2, 1, 0, 4, 3], 5));
        assert_eq!(kept(Keep::FirstSuccess, &results[..1]), (vec![], 1));
    }

    #[test]
    fn a_score_is_the_last_line() {
        for (output, expected) in [
            ("1\n2.5\n", Some(2.5)),
            (" -3 ", Some(-3.0)),
            ("5\nfive", None),
            ("NaN", None),
            ("inf", None),
            ("", None),
        ] {
            assert_eq!(score(output.as_bytes()), expected, "{output:?}");
        }
        assert_eq!(score(&[0xff]), None);
        assert_eq!(score(b"\xff\n7\n"), Some(7.0));
    }

    #[test]
    fn long_output_is_cut() {
        let mut output = Beginning::default();
        output.add(&vec![1; OUTPUT_MAX - 1]);
        assert!(!output.truncated);
        output.add(&[2, 3]);
        assert_eq!((output.bytes.len(), output.truncated), (OUTPUT_MAX, true));
        assert_eq!(output.bytes.last(), Some(&2));
        output.add(b"\n5\n");
        assert_eq!((output.end.len(), score(&output.end)), (END_MAX, Some(5.0)));
    }
}
