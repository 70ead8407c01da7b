//! The arguments that describe a VM, shared by the subcommands that make one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::CliError;
use crate::config::DriveInterface;
use crate::sizes::{duration, memory_mib};

/// A VM.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// Virtual CPUs, 1 to 32
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u32,
    /// Guest memory in MiB, or with a unit: 512, 2G
    #[arg(long, default_value = "128", value_name = "SIZE", value_parser = memory_mib)]
    pub memory: u64,
    /// Kernel: an uncompressed vmlinux, or a bzImage [default: the one that tools/build-kernel made]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Words to add to the kernel's command line
    #[arg(long, default_value = "", value_name = "WORDS")]
    pub cmdline: String,
    /// Image with the root file system, which the guest may only read [default of run: the one that tools/build-image made; of boot: none]
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// What the image is to the guest: memory that needs no copies, or a disk, which more kernels can mount [default: pmem, or block where --kernel names a kernel]
    #[arg(long, value_enum, value_name = "DEVICE")]
    pub image_as: Option<ImageAs>,
    /// Stop after this time, boot included: seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Print how long each phase took
    #[arg(long)]
    pub timings: bool,
}

/// See [`DriveInterface`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageAs {
    /// virtio-pmem, with DAX if the image is EROFS
    Pmem,
    /// virtio-blk
    Block,
}

impl VmArgs {
    /// What the image is to the guest. A kernel that somebody else built may have no driver for persistent memory.
    pub fn image_interface(&self) -> DriveInterface {
        match self.image_as {
            Some(ImageAs::Pmem) => DriveInterface::Pmem,
            Some(ImageAs::Block) => DriveInterface::Block,
            None if self.kernel.is_some() => DriveInterface::Block,
            None => DriveInterface::Pmem,
        }
    }
}

/// The kernel that was named, or the installed one.
pub fn installed_kernel(given: Option<&Path>) -> Result<PathBuf, CliError> {
    installed(
        given,
        "vmlinux",
        "guest kernel",
        "./tools/build-kernel",
        "--kernel",
    )
}

/// The root image that was named, or the installed one.
pub fn installed_image(given: Option<&Path>) -> Result<PathBuf, CliError> {
    installed(
        given,
        "image",
        "guest image",
        "./tools/build-image",
        "--image",
    )
}

/// `given`, or the file `name` in Bough's data directory (`$XDG_DATA_HOME/bough`, by default `~/.local/share/bough`).
fn installed(
    given: Option<&Path>,
    name: &str,
    what: &str,
    tool: &str,
    flag: &str,
) -> Result<PathBuf, CliError> {
    if let Some(path) = given {
        return match path.try_exists() {
            Ok(true) => Ok(path.to_owned()),
            Ok(false) => Err(CliError::BadInput(format!(
                "no {what} at {}: give {flag} an existing file, or make one with {tool}",
                path.display()
            ))),
            Err(error) => Err(CliError::BadInput(format!(
                "cannot look at the {what} {}: {error}",
                path.display()
            ))),
        };
    }
    let path = data_dir().map(|dir| dir.join(name));
    match path {
        Some(path) if path.exists() => Ok(path),
        Some(path) => Err(CliError::BadInput(format!(
            "no {what} at {}: make it with {tool}, or name another with {flag}",
            path.display()
        ))),
        None => Err(CliError::BadInput(format!(
            "neither XDG_DATA_HOME nor HOME is set: name the {what} with {flag}"
        ))),
    }
}

fn data_dir() -> Option<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let base = var("XDG_DATA_HOME").or_else(|| Some(var("HOME")?.join(".local/share")))?;
    Some(base.join("bough"))
}
