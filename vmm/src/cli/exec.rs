//! `vmm exec`: runs a program or code in a sandbox that was started.

use std::time::{Duration, Instant};

use clap::Args;

use super::program::{ProgramArgs, failed, perform};
use super::{CliError, find_failed};
use crate::agent::{AGENT_PORT, Agent, EnvVar};
use crate::control::client::ask;
use crate::control::types::{SandboxView, State};
use crate::sandbox::list::{Sandbox, find};

/// How long the guest's agent may take to answer.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);

/// How long the monitor may take to say what state it is in.
const STATE_PATIENCE: Duration = Duration::from_secs(2);

/// Run a program or code in a sandbox, and end with its exit status
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Name of the sandbox, or beginning of its id
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    program: ProgramArgs,
}

/// A sandbox and a connection to its agent.
pub struct Connected {
    /// The sandbox.
    pub sandbox: Sandbox,
    /// The connection.
    pub agent: Agent,
}

/// Connects to the agent of a sandbox that runs.
pub fn connect(name: &str) -> Result<Connected, CliError> {
    let sandbox = find(name).map_err(find_failed)?;
    let name = &sandbox.record.name;
    if !sandbox.alive {
        let message = format!("{name} is not running: start it again with `vmm start {name}`");
        return Err(CliError::BadInput(message));
    }
    refuse_paused(&sandbox)?;
    let deadline = Some(Instant::now() + CONNECT_PATIENCE);
    let agent = Agent::connect(&sandbox.paths.vsock_socket(), AGENT_PORT, deadline);
    let agent = agent.map_err(|error| CliError::Monitor(format!("{name}: {error}")))?;
    agent.set_deadline(None);
    Ok(Connected { sandbox, agent })
}

/// Carries out `vmm exec`.
pub fn exec(args: &ExecArgs) -> Result<u8, CliError> {
    let Connected { sandbox, agent } = connect(&args.name)?;
    let record = &sandbox.record;
    let env: Vec<_> = record
        .env
        .iter()
        .map(|(name, value)| EnvVar {
            name: name.clone(),
            value: value.clone().into_bytes(),
        })
        .collect();
    let work = args
        .program
        .work(&env, record.cwd.as_deref(), record.user.as_deref())?;
    match perform(&agent, work, true) {
        Ok(ended) => Ok(ended.shell_status()),
        Err(error) => failed(&error, &format!("{}: ", record.name)),
    }
}

/// A paused guest would answer nobody. One that does not tell is tried.
fn refuse_paused(sandbox: &Sandbox) -> Result<(), CliError> {
    let socket = sandbox.paths.api_socket();
    let view = ask::<SandboxView>(&socket, "GET", "/v1/sandbox", &(), STATE_PATIENCE);
    match view {
        Ok(view) if view.state == State::Paused => {
            let name = &sandbox.record.name;
            let message = format!("{name} is paused: `vmm resume {name}` first");
            Err(CliError::BadInput(message))
        }
        _ => Ok(()),
    }
}
