//! What the API sends and takes (`openapi.json` has the same in words).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::machine::RunState;
use crate::sandbox::record::Record;

/// A sandbox that lives.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxView {
    /// What it is.
    #[serde(flatten)]
    pub record: Record,
    /// What it does.
    pub state: State,
    /// How long its process has lived, in milliseconds.
    pub uptime_ms: u64,
    /// Resident memory of its process, the guest's included, in bytes.
    pub resident_bytes: u64,
    /// What of that no other process has: what would be free without it.
    pub private_bytes: u64,
    /// Path of its vsock socket.
    pub vsock: String,
}

/// What a living sandbox does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its processors run.
    Running,
    /// Its processors wait.
    Paused,
    /// The guest has been asked to end.
    Stopping,
}

impl From<RunState> for State {
    fn from(state: RunState) -> Self {
        match state {
            RunState::Running => Self::Running,
            RunState::Paused => Self::Paused,
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
        })
    }
}

/// How to stop.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StopRequest {
    /// How long the guest may take to end by itself, in milliseconds; zero for not at all.
    pub deadline_ms: u64,
}

impl Default for StopRequest {
    fn default() -> Self {
        Self {
            deadline_ms: 10_000,
        }
    }
}

/// How it stopped.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StopView {
    /// The guest did not end in time.
    pub forced: bool,
}

/// What snapshot to take.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotRequest {
    /// What to call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// All of it, where the difference to an earlier one would do.
    pub full: bool,
    /// The next one is a difference to what this one is a difference to, as if this one had not been taken. Without a name it is removed once the process that asks
    /// for it has ended.
    pub aside: bool,
}

/// A snapshot that was taken.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotView {
    /// Its id, 64 hexadecimal digits.
    pub id: String,
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// The id of the snapshot that it is a difference to, if it is one.
    pub parent: Option<String>,
    /// What its own files take, in bytes.
    pub bytes: u64,
    /// Pages of memory, of 4096 bytes, that it stores.
    pub data_pages: u64,
    /// Pages of memory that became zero.
    pub zero_pages: u64,
    /// Microseconds from the beginning until the state of processors and devices was had.
    pub state_us: u64,
    /// Until memory was frozen, too.
    pub freeze_us: u64,
    /// Until the sandbox ran on: how long it stood still.
    pub pause_us: u64,
    /// Until all was on the disk.
    pub total_us: u64,
}

/// Where to go back to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RollbackRequest {
    /// A snapshot: its name, or the beginning of its id. Without it, what the sandbox began with: a snapshot, or the moment at which it branched off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}

/// A sandbox that was taken back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RollbackView {
    /// Pages of memory, of 4096 bytes, that were put back.
    pub pages: u64,
    /// How long it stood still, in microseconds.
    pub pause_us: u64,
    /// Until its agent had answered.
    pub total_us: u64,
}

/// What children to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BranchRequest {
    /// How many.
    pub count: u32,
    /// What to call it; where there are several, each has `-1`, `-2` and so on behind that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// After this time each is ended, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// Labels on top of the sandbox's own.
    pub labels: BTreeMap<String, String>,
    /// Memory that each is expected to come to have for itself, in MiB: where the host has less for all of them, none is made.
    pub reserve_mib: u64,
}

impl Default for BranchRequest {
    fn default() -> Self {
        Self {
            count: 1,
            name: None,
            ttl_ms: None,
            labels: BTreeMap::new(),
            reserve_mib: 16,
        }
    }
}

/// Children that were made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BranchView {
    /// They.
    pub children: Vec<ChildView>,
    /// Pages of 4096 bytes that they have in common beyond what the sandbox began with.
    pub data_pages: u64,
    /// Pages that became zero since then.
    pub zero_pages: u64,
    /// Microseconds from when the sandbox was to stand still until the state of its processors and devices was had.
    pub state_us: u64,
    /// Until memory was frozen, too.
    pub freeze_us: u64,
    /// Until it ran on: how long it stood still.
    pub pause_us: u64,
    /// Until its memory of that moment was written, while it ran.
    pub written_us: u64,
    /// Microseconds from the request until all children were ready.
    pub total_us: u64,
}

/// A child that was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChildView {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Microseconds from the request until its processors ran.
    pub running_us: u64,
    /// Until its agent had said that it is a guest of its own.
    pub answered_us: u64,
}

/// A program to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExecBody {
    /// The program and its arguments; with `code`, what the code sees as its arguments.
    pub argv: Vec<String>,
    /// Code to run instead of a program.
    pub code: String,
    /// What it is written in.
    pub lang: CodeLanguage,
    /// Variables on top of the sandbox's own.
    pub env: BTreeMap<String, String>,
    /// The directory it starts in; empty for the sandbox's choice.
    pub cwd: String,
    /// Who runs it: a name, or UID[:GID]; empty for the unprivileged user.
    pub user: String,
    /// What it reads on standard input.
    pub stdin: String,
    /// After this time it is killed with all that it has started, in milliseconds; 0 for never.
    pub timeout_ms: u64,
    /// Memory that it and all that it starts may use together, in bytes; 0 for no limit.
    pub memory_bytes: u64,
    /// Processors that they may use, in thousandths; 0 for no limit.
    pub cpu_millis: u32,
    /// Processes and threads that they may be; 0 for no limit.
    pub processes: u32,
}

/// A language that code may be in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodeLanguage {
    /// Python. Where an interpreter stands ready, that runs it.
    #[default]
    Python,
    /// POSIX shell.
    Shell,
}

/// What to try, each in a child of its own.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExploreBody {
    /// The programs or pieces of code.
    pub runs: Vec<ExecBody>,
    /// How many run at once; 0 for as many as the host has processors.
    pub parallel: u32,
    /// Which child lives on.
    pub keep: Keep,
    /// What to call the children, as in [`BranchRequest`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Which child lives on after all have run. The others end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// None.
    #[default]
    None,
    /// The first whose program ends with status 0; what still runs is then given up.
    FirstSuccess,
    /// Of those whose programs end with status 0, the one whose last line of output is the greatest number; of several, the first of the list.
    Score,
    /// All.
    All,
}

/// One line of the answer to [`ExploreBody`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExploreEvent {
    /// The children are there.
    Branched(BranchView),
    /// One has run: they come as they end.
    Result(ExploreResult),
    /// Names of those that live on: the last line.
    Kept(Vec<String>),
}

/// What one of the runs came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExploreResult {
    /// Its place in the list, from 0.
    pub index: usize,
    /// Its child's name.
    pub name: String,
    /// How it ended; absent where it did not come to an end.
    pub ended: Option<EndedView>,
    /// Why it did not.
    pub error: Option<ErrorBody>,
    /// The beginning of its standard output, in Base64.
    pub stdout: String,
    /// The beginning of its standard error, in Base64.
    pub stderr: String,
    /// There was more output than is told.
    pub truncated: bool,
    /// Its score, where that was asked for and it has one.
    pub score: Option<f64>,
    /// Microseconds from when its child was asked until it had ended.
    pub took_us: u64,
}

/// One line of the answer to [`ExecBody`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecEvent {
    /// Bytes of standard output, in Base64.
    Stdout(String),
    /// Bytes of standard error, in Base64.
    Stderr(String),
    /// The program has ended: the last line.
    Ended(EndedView),
    /// The program did not start, or its end is not known: the last line.
    Error(ErrorBody),
}

/// How a program ended, and what it used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedView {
    /// Its exit status; 128 and the number of the signal that killed it.
    pub status: u8,
    /// Its time was over.
    pub timed_out: bool,
    /// A process was killed for going over the limit on memory.
    pub oom_killed: bool,
    /// Processor time in user mode, in milliseconds.
    pub user_ms: u64,
    /// Processor time in the kernel, in milliseconds.
    pub system_ms: u64,
    /// The most memory that it used, in bytes.
    pub peak_memory_bytes: u64,
}

/// An error, as `{"error": …}` and with a 4xx or 5xx status.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorView {
    /// What went wrong.
    pub error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

/// Kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is no HTTP, or too long.
    BadRequest,
    /// The body is not what this path takes.
    BadBody,
    /// There is no such path.
    NotFound,
    /// The path is there, but not with this method.
    MethodNotAllowed,
    /// The sandbox is not in a state for that.
    Conflict,
    /// Too many requests at once.
    Busy,
    /// The guest's agent refused, or cannot be reached.
    Agent,
    /// The monitor failed.
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest | Self::BadBody => 400,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::Conflict => 409,
            Self::Busy => 503,
            Self::Agent => 502,
            Self::Internal => 500,
        }
    }
}

impl ErrorBody {
    /// An error of this kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}
