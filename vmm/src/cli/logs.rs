//! `vmm logs`: what a sandbox's guest has printed on its console.

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;

use super::{CliError, find_failed, status};
use crate::console_log::ConsoleReader;
use crate::sandbox::list::find;

/// How often a console that is followed is looked at.
const PAUSE: Duration = Duration::from_millis(100);

/// Print what a sandbox's guest has printed on its console: the last 4 to 8 MiB
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Name, or beginning of an id
    #[arg(value_name = "NAME")]
    name: String,
    /// Go on as it prints more, until the sandbox ends
    #[arg(short, long)]
    follow: bool,
    /// Print what the monitor has logged, instead
    #[arg(long, conflicts_with = "follow")]
    monitor: bool,
}

/// Carries out `vmm logs`.
pub fn logs(args: &LogsArgs) -> Result<u8, CliError> {
    let sandbox = find(&args.name).map_err(find_failed)?;
    let path = if args.monitor {
        sandbox.paths.dir().join("monitor.log")
    } else {
        sandbox.paths.console()
    };
    if !sandbox.record.kept {
        let message = format!(
            "{} belongs to a `vmm run`, whose console goes where its --console says",
            args.name
        );
        return Err(CliError::BadInput(message));
    }
    let unreadable =
        |error: io::Error| CliError::Monitor(format!("cannot read {}: {error}", path.display()));
    let mut reader = ConsoleReader::open(&path).map_err(unreadable)?;
    let mut stdout = io::stdout();
    let mut buffer = [0; 16 << 10];
    loop {
        // Before the reading: what it printed last is read after its end was seen.
        let over = !args.follow || !find(&sandbox.record.id).is_ok_and(|now| now.alive);
        loop {
            let count = match reader.read(&mut buffer) {
                // Removed while it was followed.
                Err(error) if args.follow && error.kind() == io::ErrorKind::NotFound => 0,
                result => result.map_err(unreadable)?,
            };
            if count == 0 {
                break;
            }
            let written = stdout.write_all(&buffer[..count]);
            match written.and_then(|()| stdout.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(status::BROKEN_PIPE);
                }
                result => result.map_err(|error| {
                    CliError::Monitor(format!("cannot write standard output: {error}"))
                })?,
            }
        }
        if over {
            return Ok(0);
        }
        std::thread::sleep(PAUSE);
    }
}
