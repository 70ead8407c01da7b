//! What the subcommands that make a VM share: a process that is fit to be its monitor, its configuration, and what ends it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::vm_args::{installed_image, installed_kernel};
use super::vm_spec::VmSpec;
use super::{CliError, ending_status};
use crate::agent::Child;
use crate::boot_cache::BootCache;
use crate::builder::{self, Origin, Shell};
use crate::config::{ConsoleConfig, GUEST_CID, VmConfig, VsockConfig};
use crate::confinement;
use crate::host;
use crate::kvm::install_kick_handler;
use crate::machine::Machine;
use crate::sandbox::record::BranchPoint;
use crate::sandbox::{SandboxDir, SandboxPaths};
use crate::snapshot::restore::{Base, Saved};
use crate::supervisor::{Signals, Supervisor};
use crate::sys::{heap, slice};
use crate::timings::Timings;

/// The files that a VM boots from, each known to be there.
#[derive(Clone)]
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

/// What a machine begins with.
pub enum Source {
    /// A kernel and an image.
    Boot(BootFiles),
    /// What another guest of the same kind was when it had booted.
    Cached(Arc<Saved>),
    /// A snapshot of the user's, or a running parent's moment.
    Saved(Arc<Saved>),
}

impl Source {
    /// The snapshot that it is, if it is one.
    pub fn saved(&self) -> Option<&Arc<Saved>> {
        match self {
            Self::Boot(_) => None,
            Self::Cached(saved) | Self::Saved(saved) => Some(saved),
        }
    }

    /// What the machine's first snapshot is a difference to.
    pub fn base(&self) -> Option<Base> {
        match self {
            // A cache may be removed at any time: nothing rests on it.
            Self::Boot(_) | Self::Cached(_) => None,
            Self::Saved(saved) => saved.base.clone(),
        }
    }
}

/// A machine to be made, and what its user wants of it.
pub struct Launch {
    /// What is wanted. Of a snapshot's machine, only what does not concern the machine counts.
    pub spec: VmSpec,
    /// What it begins with.
    pub source: Source,
    /// A guest that has booted before may be taken, and one that boots be kept.
    pub cached: bool,
    /// Where it branches off another sandbox, if it does.
    pub branch: Option<BranchPoint>,
    /// What its parent's guest has asked, if that wanted it, and which of the children it is.
    pub ask: Option<(u64, u32)>,
    /// What was made ahead for it, if anything was.
    pub shell: Option<Shell>,
}

impl Launch {
    /// Which child it is, under its `name`, to a guest that has asked for it.
    pub fn child(&self, name: &str) -> Option<Child> {
        let (ask, index) = self.ask?;
        let name = name.to_owned();
        Some(Child { ask, index, name })
    }

    /// The machine's configuration in a sandbox.
    pub fn config(
        &self,
        paths: &SandboxPaths,
        console: ConsoleConfig,
    ) -> Result<VmConfig, CliError> {
        match &self.source {
            Source::Boot(files) => {
                let files = files.clone();
                Ok(self.spec.machine_config(files, Some(paths), console))
            }
            Source::Cached(saved) | Source::Saved(saved) => saved
                .config(Some(vsock(paths)), console)
                .map_err(|error| CliError::BadInput(error.to_string())),
        }
    }

    /// Makes the machine of `config` in the sandbox at `paths`, and lets it run. Where one that was to boot has booted before, that goes on. What comes with it is where
    /// the boot is to be kept, if it is.
    pub fn make(
        &mut self,
        config: &VmConfig,
        paths: &SandboxPaths,
        timings: &Arc<Timings>,
    ) -> Result<(Machine, Option<BootCache>), CliError> {
        let cache = self
            .cached
            .then(|| BootCache::of(config, self.spec.interpreter()))
            .flatten();
        if let Some(cache) = &cache
            && let Some(saved) = cache.find()
        {
            let cached = Source::Cached(Arc::new(saved));
            match build(config, paths, &cached, None, timings) {
                Ok(machine) => {
                    self.source = cached;
                    return Ok((machine, None));
                }
                Err(error) => cache.forget_unusable(&error),
            }
        }
        let shell = self.shell.take();
        Ok((build(config, paths, &self.source, shell, timings)?, cache))
    }
}

fn build(
    config: &VmConfig,
    paths: &SandboxPaths,
    source: &Source,
    shell: Option<Shell>,
    timings: &Arc<Timings>,
) -> Result<Machine, CliError> {
    let origin = match source.saved() {
        None => Origin::Boot,
        Some(saved) => Origin::Saved {
            state: &saved.state,
            pages: saved
                .pages()
                .map_err(|error| CliError::BadInput(error.to_string()))?,
            disks: saved.disks(paths.dir()),
            moment: saved.moment,
        },
    };
    Ok(builder::build(config, origin, shell, timings)?)
}

/// The vsock device of the sandbox at `paths`.
pub fn vsock(paths: &SandboxPaths) -> VsockConfig {
    VsockConfig {
        cid: GUEST_CID,
        socket: paths.vsock_socket(),
    }
}

/// Leaves this process no more of the host's kernel than a monitor needs.
pub fn confine() -> Result<(), CliError> {
    confinement::confine().map_err(|error| {
        let hint = "the host's kernel needs seccomp filters (CONFIG_SECCOMP_FILTER)";
        CliError::Monitor(format!("the monitor cannot be confined: {error}; {hint}"))
    })
}

/// Makes this process one that can run a VM, and confines it. From here on a signal does not end it: it is what is returned that tells of it.
pub fn become_monitor() -> Result<Arc<Signals>, CliError> {
    let failed = |error: std::io::Error| CliError::Monitor(error.to_string());
    confine()?;
    heap::share_among_threads();
    slice::shorten();
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
            vsock: sandbox.map(vsock),
            lane: self.lane && sandbox.is_some(),
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
            forces: true,
        }
    }
}
