//! Waiting for a guest to be ready: its agent calls, or something cuts that short.

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};
use snapshot_fmt::state::agent::AgentState;

use super::CliError;
use super::launch::Launch;
use super::vm_spec::VmSpec;
use crate::agent::{AGENT_PORT, Agent, AgentError, Child, RestoredRequest};
use crate::boot_cache::BootCache;
use crate::logger::complain;
use crate::machine::Machine;
use crate::sandbox::SandboxPaths;
use crate::supervisor::{Ending, Supervisor, Watch};
use crate::timings::Timings;

/// A guest whose agent is not there by then never will be. Generous: on a software KVM a guest of 24 GiB takes a minute.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);
/// Random bytes for a restored guest: what its generator can hold twice over.
const ENTROPY: usize = 64;
/// Random bytes of a machine id (machine-id(5)).
const MACHINE_ID: usize = 16;
/// How long a guest that has closed the agent's connection may take to end.
const RESET_GRACE: Duration = Duration::from_secs(5);

/// Where the agent's first call will arrive.
pub fn listen_for_agent(paths: &SandboxPaths) -> Result<UnixListener, CliError> {
    let path = paths.vsock_listener(AGENT_PORT);
    UnixListener::bind(&path).map_err(|error| {
        let path = path.display();
        CliError::BadInput(format!(
            "cannot listen on {path}: {error}; XDG_RUNTIME_DIR can name another place"
        ))
    })
}

/// A machine that boots, and what watches over it.
pub struct Boot<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// What may cut its work short.
    pub supervisor: Supervisor,
    /// When the process began.
    pub start: Instant,
    /// Where its phases are noted.
    pub timings: &'a Timings,
}

impl Boot<'_> {
    /// The error for what has cut the work short.
    pub fn cut_short(&self, ending: Ending) -> CliError {
        match ending {
            Ending::Vm(reason) => CliError::Vm {
                reason,
                console: self.machine.console().text(),
            },
            Ending::Signal(signal) => CliError::Signal(signal),
            Ending::TimedOut => CliError::Timeout(self.start.elapsed()),
        }
    }

    fn no_agent(&self) -> CliError {
        CliError::NoAgent {
            waited: BOOT_DEADLINE,
            console: self.machine.console().text(),
        }
    }

    /// The agent of the machine that `launch` has made, ready for work: that of a guest that boots has the interpreter stand ready that is
    /// wanted, and is kept in `cache`; that of a restored guest has been told so. The watch shuts its connection when something cuts the
    /// work short.
    pub fn agent(
        &self,
        ready: UnixListener,
        launch: &Launch,
        cache: Option<BootCache>,
        name: &str,
    ) -> Result<(Agent, Watch), CliError> {
        if let Some(saved) = launch.source.saved() {
            let child = launch.child(name);
            let name = launch.branch.as_ref().map(|_| name);
            return self.restored_agent(ready, saved.state.agent.as_ref(), name, child);
        }
        let (agent, watch) = self.wait_for_agent(ready)?;
        if let Some(interpreter) = launch.spec.interpreter() {
            if let Err(error) = agent.warm(interpreter) {
                return Err(self
                    .why(&error, watch)
                    .unwrap_or_else(|| CliError::BadInput(format!("--warm: {error}"))));
            }
            self.timings.mark("interpreter ready");
        }
        if let Some(cache) = cache {
            self.keep_boot(&cache, &launch.spec, &agent);
            self.timings.mark("boot kept");
        }
        Ok((agent, watch))
    }

    /// Keeps the boot of a guest that has not worked yet. Without it the next one boots as well.
    fn keep_boot(&self, cache: &BootCache, vm: &VmSpec, agent: &Agent) {
        // Its answer says that the agent is through with what it does at first.
        let kept = agent.ping().map_err(|error| error.to_string());
        let kept = kept.and_then(|_| {
            let warm = vm.warm.as_ref();
            let kept = cache.keep(self.machine, agent, warm);
            kept.map_err(|error| error.to_string())
        });
        if let Err(error) = kept {
            complain(format_args!("warning: the boot is not kept: {error}"));
        }
    }

    /// The agent of a guest that goes on from `state`, once that has become its own, under its `name` where it is to have one; as `child`, if a
    /// guest has asked for it.
    pub fn restored_agent(
        &self,
        ready: UnixListener,
        state: Option<&AgentState>,
        name: Option<&str>,
        child: Option<Child>,
    ) -> Result<(Agent, Watch), CliError> {
        let (agent, watch) = match (self.machine.take_agent_link(), state) {
            (Some(stream), Some(state)) => {
                drop(ready);
                self.greet(stream, |stream, deadline| {
                    Agent::resume(stream, state, deadline)
                })?
            }
            // It learns that its connection is gone, and calls again.
            _ => self.wait_for_agent(ready)?,
        };
        agent.set_deadline(Some(self.start + BOOT_DEADLINE));
        match agent.restored(own_identity(name, child)?) {
            Ok(()) => {
                agent.set_deadline(None);
                self.timings.mark("guest told");
                Ok((agent, watch))
            }
            Err(error) => Err(self.why(&error, watch).unwrap_or_else(|| {
                CliError::Monitor(format!(
                    "the restored guest cannot be made its own: {error}"
                ))
            })),
        }
    }

    /// Waits for the agent's call. The watch shuts its connection when something cuts the work short.
    fn wait_for_agent(&self, ready: UnixListener) -> Result<(Agent, Watch), CliError> {
        let deadline = self.start + BOOT_DEADLINE;
        let own = self.supervisor.deadline;
        let stream = match self.supervisor.accept(&ready, deadline) {
            Ok(stream) => stream,
            Err(Ending::TimedOut) if own.is_none_or(|own| own > deadline) => {
                return Err(self.no_agent());
            }
            Err(ending) => return Err(self.cut_short(ending)),
        };
        // The agent was the first to call, being the guest's first process. Nobody else in there shall.
        drop(ready);
        self.greet(stream, Agent::from_stream)
    }

    /// Makes the agent of its connection, and watches over that.
    fn greet(
        &self,
        stream: UnixStream,
        agent: impl FnOnce(UnixStream, Option<Instant>) -> Result<Agent, AgentError>,
    ) -> Result<(Agent, Watch), CliError> {
        let watch = self.supervisor.clone().watch(&stream);
        let watch = watch.map_err(|error| CliError::Monitor(error.to_string()))?;
        match agent(stream, Some(self.start + BOOT_DEADLINE)) {
            Ok(agent) => {
                self.timings.mark("agent ready");
                agent.set_deadline(None);
                Ok((agent, watch))
            }
            Err(error) => Err(match self.why(&error, watch) {
                Some(why) => why,
                None if matches!(error, AgentError::TimedOut) => self.no_agent(),
                None => CliError::Monitor(error.to_string()),
            }),
        }
    }

    /// What an error of the agent's connection really was, if it was the end of the VM, a signal or the time.
    pub fn why(&self, error: &AgentError, watch: Watch) -> Option<CliError> {
        if let Some(ending) = watch.end() {
            return Some(self.cut_short(ending));
        }
        // A guest that resets itself lets go of its connections first.
        if matches!(error, AgentError::Disconnected | AgentError::Socket(_)) {
            let deadline = Some(Instant::now() + RESET_GRACE);
            let ending = Supervisor {
                deadline,
                ..self.supervisor.clone()
            }
            .wait_for_end();
            if ending != Ending::TimedOut {
                return Some(self.cut_short(ending));
            }
        }
        None
    }
}

/// What a restored guest must not have in common with others of its snapshot: random numbers and the time; its machine id, and its `name` where it is to
/// have one; and which `child` it is.
fn own_identity(name: Option<&str>, child: Option<Child>) -> Result<RestoredRequest, CliError> {
    let mut random = [0; ENTROPY + MACHINE_ID];
    getrandom(&mut random[..], GetRandomFlags::empty()).map_err(|errno| {
        CliError::Monitor(format!("no random bytes: {}", std::io::Error::from(errno)))
    })?;
    let (entropy, id) = random.split_at(ENTROPY);
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(RestoredRequest {
        entropy: entropy.to_vec(),
        machine_id: id.iter().map(|byte| format!("{byte:02x}")).collect(),
        hostname: name.unwrap_or_default().to_owned(),
        child,
        realtime_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
    })
}
