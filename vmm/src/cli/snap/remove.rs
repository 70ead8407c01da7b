//! `vmm snap rm` and `gc`.

use std::time::Duration;

use clap::Args;

use super::super::{CliError, print};
use super::failed;
use crate::logger::complain;
use crate::sandbox::record::now;
use crate::sizes::{bytes, duration, memory_mib};
use crate::store::remove::{GcLimits, Removed, size_of};
use crate::store::{Store, short};

/// Remove snapshots that no other rests on and that nobody uses
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Names, or beginnings of ids
    #[arg(required = true, value_name = "REF")]
    snapshots: Vec<String>,
    /// And those that rest on them
    #[arg(short, long)]
    recursive: bool,
}

/// Remove what killed processes have left, and snapshots by age and size: the oldest first, of those that no other rests on and nobody uses
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Remove snapshots that are older: seconds, or with ms, s, m, h, d
    #[arg(long, value_name = "TIME", value_parser = duration)]
    older_than: Option<Duration>,
    /// Remove snapshots until the rest fits in this: MiB, or with M, G, T
    #[arg(long, value_name = "SIZE", value_parser = memory_mib)]
    max_size: Option<u64>,
    /// Print what would be removed, and remove nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
}

/// Carries out `vmm snap rm`. One failure does not stop the others; the last is the command's.
pub fn rm(store: &Store, args: &RmArgs) -> Result<u8, CliError> {
    let mut failure = None;
    for reference in &args.snapshots {
        let removed = store
            .resolve(reference)
            .and_then(|id| store.remove(&id, args.recursive));
        if let Err(error) = removed
            && let Some(earlier) = failure.replace(failed(error))
        {
            complain(&earlier);
        }
    }
    failure.map_or(Ok(0), Err)
}

/// Carries out `vmm snap gc`.
pub fn gc(store: &Store, args: &GcArgs) -> Result<u8, CliError> {
    let limits = GcLimits {
        before: args
            .older_than
            .map(|age| now().saturating_sub(age.as_secs())),
        bytes: args.max_size.map(|mib| mib.saturating_mul(1 << 20)),
    };
    let removed = store.collect(&limits, args.dry_run).map_err(failed)?;
    let done = if args.dry_run {
        "would remove"
    } else {
        "removed"
    };
    let lines = removed.iter().map(|removed| match removed {
        Removed::Snapshot(manifest) => {
            let name = manifest.name.as_deref().unwrap_or("-");
            format!(
                "{done} {} {name}, {}\n",
                short(&manifest.id),
                bytes(size_of(manifest))
            )
        }
        Removed::Broken(id) => format!("{done} {}\n", short(id)),
        Removed::Remains(path) => format!("{done} {}\n", path.display()),
    });
    print(lines.collect::<String>().as_bytes())
}
