//! The arguments that describe a VM, shared by the subcommands that make one.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};

use super::CliError;
use crate::sizes::{duration, memory_mib};
use crate::user_dirs::data_dir;
use crate::warm::WarmRuntime;

/// A VM. What is not given here can be in the file of `--config`; [`VmArgs::resolve`] puts the two together.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// Describe the VM in a TOML or JSON file; flags count more than what it says
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Virtual CPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Guest memory in MiB, or with a unit: 512, 2G [default: 128]
    #[arg(long, value_name = "SIZE", value_parser = memory_mib)]
    pub memory: Option<u64>,
    /// Kernel: an uncompressed vmlinux, or a bzImage [default: the one that tools/build-kernel made]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS")]
    pub cmdline: Option<String>,
    /// Image with the root file system, which the guest may only read [default of run: the one that tools/build-image made; of boot: none]
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// What the image is to the guest: memory that needs no copies, or a disk, which more kernels can mount [default: pmem, or block where --kernel names a kernel]
    #[arg(long, value_enum, value_name = "DEVICE")]
    pub image_as: Option<ImageAs>,
    /// Give the guest another disk: a file or block device, for the guest alone, or shared and read-only with ,ro. /dev/vda and so on, after the image if that is a disk
    #[arg(long, value_name = "FILE[,ro]", value_parser = OsStringValueParser::new().try_map(drive))]
    pub drive: Vec<DriveArg>,
    /// Have an interpreter stand ready, with these modules imported: code of its language (--lang) then need not wait for one to start
    #[arg(long, value_name = "python[:MODULE,...]")]
    pub warm: Option<WarmRuntime>,
    /// Have the guest's agent call by vsock, not on the lane: to measure the two side by side
    #[arg(long, hide = true)]
    pub no_lane: bool,
    /// Stop after this time, boot included: seconds, or with ms, s, m, h, d
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Print how long each phase took
    #[arg(long)]
    pub timings: bool,
}

/// A disk besides the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveArg {
    /// The file that backs it.
    pub path: PathBuf,
    /// The guest may not write to it.
    pub read_only: bool,
}

fn drive(text: OsString) -> Result<DriveArg, &'static str> {
    let (path, read_only) = match text.as_bytes().strip_suffix(b",ro") {
        Some(path) => (OsString::from_vec(path.to_vec()), true),
        None => (text, false),
    };
    if path.is_empty() {
        return Err("give FILE, or FILE,ro");
    }
    let path = path.into();
    Ok(DriveArg { path, read_only })
}

/// See [`DriveInterface`](crate::config::DriveInterface).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageAs {
    /// virtio-pmem, with DAX if the image is EROFS
    Pmem,
    /// virtio-blk
    Block,
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

/// How a VM comes to be booted.
#[derive(Debug, Clone, Copy, Args)]
pub struct CacheArgs {
    /// Boot, even where a guest like this one has booted before and was kept; and do not keep this one
    #[arg(long)]
    pub cold: bool,
}

/// `given`, or the file `name` in Bough's data directory (`$XDG_DATA_HOME/bough`, by default `~/.local/share/bough`). That is a link, which
/// names another file once another was built: it is followed here, once, so that a snapshot says which file its guest has.
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
        Some(path) if path.exists() => Ok(fs::canonicalize(&path).unwrap_or(path)),
        Some(path) => Err(CliError::BadInput(format!(
            "no {what} at {}: make it with {tool}, or name another with {flag}",
            path.display()
        ))),
        None => Err(CliError::BadInput(format!(
            "neither XDG_DATA_HOME nor HOME is set: name the {what} with {flag}"
        ))),
    }
}
