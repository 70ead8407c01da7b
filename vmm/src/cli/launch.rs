//! What the subcommands that make a VM share: a process that is fit to be its monitor, its configuration, and what ends it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::vm_args::{installed_image, installed_kernel};
use super::vm_spec::VmSpec;
use super::{CliError, ending_status};
use crate::config::{ConsoleConfig, GUEST_CID, VmConfig, VsockConfig};
use crate::host;
use crate::kvm::install_kick_handler;
use crate::machine::Machine;
use crate::sandbox::{SandboxDir, SandboxPaths};
use crate::supervisor::{Signals, Supervisor};

/// The files that a VM boots from, each known to be there.
pub struct BootFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// The root image, where there is one.
    pub image: Option<PathBuf>,
}

impl BootFiles {
    /// Those that were named, or the installed ones.
    pub fn find(vm: &VmSpec) -> Result<Self, CliError> {
        Ok(Self {
            kernel: installed_kernel(vm.kernel.as_deref())?,
            image: Some(installed_image(vm.image.as_deref())?),
        })
    }
}

/// Makes this process one that can run a VM. From here on a signal does not end it: it is what is returned that tells of it.
pub fn become_monitor() -> Result<Arc<Signals>, CliError> {
    let failed = |error: std::io::Error| CliError::Monitor(error.to_string());
    let signals = Arc::new(Signals::catch().map_err(failed)?);
    install_kick_handler().map_err(failed)?;
    host::raise_open_files_limit();
    Ok(signals)
}

impl VmSpec {
    /// The machine that this describes. It has a vsock device where it has a sandbox, which is where that device's sockets are.
    pub fn machine_config(
        &self,
        files: BootFiles,
        sandbox: Option<&SandboxPaths>,
        console: ConsoleConfig,
    ) -> VmConfig {
        VmConfig {
            cpus: self.cpus,
            memory_mib: self.memory,
            kernel: files.kernel,
            cmdline: self.cmdline.clone(),
            drives: self.drives(files.image),
            vsock: sandbox.map(|paths| VsockConfig {
                cid: GUEST_CID,
                socket: paths.vsock_socket(),
            }),
            console,
        }
    }

    /// What may end the `machine`, whose time has run since `start`.
    pub fn supervisor(
        &self,
        machine: &Machine,
        signals: Arc<Signals>,
        start: Instant,
        sandbox: Option<&SandboxDir>,
    ) -> Supervisor {
        Supervisor {
            exit: machine.exit().clone(),
            signals,
            deadline: self.timeout.and_then(|timeout| start.checked_add(timeout)),
            leftover: sandbox.map(|sandbox| sandbox.path().to_owned()),
            status: ending_status,
        }
    }
}
