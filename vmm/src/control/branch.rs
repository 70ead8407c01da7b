//! `POST /v1/branch`: makes children of the sandbox, which go on from one moment of it while it runs on.
//!
//! Each child is a process of its own that is handed the moment. It says when its guest's agent has become its own, and lives on
//! by itself when it is told that all of them have: there are all children of a call, or none.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::time::Instant;

use snapshot_fmt::chain::{Chain, DEPTH_MAX};

use super::routes::{Control, client_is_gone};
use super::snapshot::{code, programs};
use super::types::{BranchRequest, BranchView, ErrorBody, ErrorCode};
use crate::handover::{Handover, Unborn};
use crate::host;
use crate::message::FILES_MAX;
use crate::pool::{self, Taken, new_shell};
use crate::reaper::Reaper;
use crate::sandbox::{check_name, remove_dead, runtime_dir};
use crate::snapshot::branch::{PointMemory, freeze};
use crate::snapshot::restore::Base;
use crate::timings::{micros, monotonic_ns};

/// Most children of a call.
const COUNT_MAX: u32 = 1000;
/// How many children begin at once, per processor of the host: while one's process starts, others' guests use it. Where twice as many do, each gets so little of
/// it that, on a software KVM, its guest does nothing but serve its timer.
const AT_ONCE: usize = 4;
/// How many of a call, likewise, do not stand still until all are there: what they do meanwhile takes time from their siblings.
const RUN_ON: usize = 2;

/// The name of the child `number` of `count`, counted from 1.
fn name_of(base: Option<&str>, number: u32, count: u32) -> Option<String> {
    let base = base?;
    Some(match count {
        1 => base.to_owned(),
        _ => format!("{base}-{number}"),
    })
}

/// Refuses children that the host has no memory for, rather than have it end them, or others, later.
fn check_memory(count: u32, reserve_mib: u64) -> Result<(), ErrorBody> {
    let wanted = u64::from(count).saturating_mul(reserve_mib);
    let Some(available) = host::available_memory_bytes().map(|bytes| bytes >> 20) else {
        return Ok(());
    };
    if wanted <= available {
        return Ok(());
    }
    let message = format!(
        "{count} children that each come to have {reserve_mib} MiB for themselves need {wanted} MiB, and the host has {available} MiB: make fewer, end others, or reserve less (--reserve)"
    );
    Err(ErrorBody::new(ErrorCode::Conflict, message))
}

fn unwanted() -> ErrorBody {
    let message = "nobody waits for the children any more";
    ErrorBody::new(ErrorCode::Conflict, message)
}

fn internal(error: io::Error) -> ErrorBody {
    ErrorBody::new(
        ErrorCode::Internal,
        format!("cannot start a child: {error}"),
    )
}

/// Children that are ready.
pub(super) struct Conceived {
    /// They. Those that are dropped end.
    pub children: Vec<Unborn>,
    /// What is told of them.
    pub view: BranchView,
    /// Kept as long as they are to have the processors for themselves.
    pub taken: Taken,
}

/// What children are handed. A shell of the pool may have died since it was taken: then another process is started for the child.
struct Birth<'a> {
    handover: Handover,
    /// All but the newest layer of memory.
    files: Vec<&'a File>,
    reaper: &'a Reaper,
}

impl Birth<'_> {
    /// Hands over what there is while memory is being written.
    fn begin(&mut self, child: &mut Unborn) -> io::Result<()> {
        let sent = child.send(&mut self.handover, &self.files);
        sent.or_else(|_| self.begin_anew(child))
    }

    /// The same, with a process that is started for it.
    fn begin_anew(&mut self, child: &mut Unborn) -> io::Result<()> {
        child.replace(new_shell(self.reaper)?)?;
        child.send(&mut self.handover, &self.files)
    }

    /// Hands over the rest.
    fn complete(&mut self, child: &mut Unborn, layer: &File) -> io::Result<()> {
        if child.send_layer(layer).is_err() {
            self.begin_anew(child)?;
            child.send_layer(layer)?;
        }
        Ok(())
    }
}

impl Control {
    /// Makes the children that `request` asks for. `client` waits for them: without it there are none. `ask` is what the guest calls its request,
    /// if it is one of its own.
    pub(super) fn branch(
        &self,
        request: BranchRequest,
        ask: Option<u64>,
        client: &UnixStream,
    ) -> Result<BranchView, ErrorBody> {
        let Conceived {
            children,
            view,
            taken,
        } = self.conceive(request, ask, client)?;
        if client_is_gone(client) {
            return Err(unwanted());
        }
        if let Some(gone) = children.iter().find(|child| child.is_gone()) {
            return Err(ErrorBody::new(ErrorCode::Conflict, gone.why_gone()));
        }
        children
            .iter()
            .try_for_each(Unborn::release)
            .map_err(internal)?;
        children.iter().for_each(Unborn::settle);
        drop(taken);
        Ok(view)
    }

    /// Makes children for `client`, each ready for work. Those that are dropped before they are released end.
    pub(super) fn conceive(
        &self,
        request: BranchRequest,
        ask: Option<u64>,
        client: &UnixStream,
    ) -> Result<Conceived, ErrorBody> {
        let (start, since) = (Instant::now(), monotonic_ns());
        let count = request.count;
        if !(1..=COUNT_MAX).contains(&count) {
            let message = format!("the number of children is 1 to {COUNT_MAX}, not {count}");
            return Err(ErrorBody::new(ErrorCode::BadBody, message));
        }
        // The last has the longest name.
        let longest = name_of(request.name.as_deref(), count, count);
        longest
            .as_deref()
            .map_or(Ok(()), check_name)
            .map_err(|error| ErrorBody::new(ErrorCode::BadBody, error.to_string()))?;
        check_memory(count, request.reserve_mib)?;
        remove_dead();
        let branch = self.record.branch_point();
        let fits = self.record.budget;
        // Until the children are listed, and count.
        let _alone = (!fits.is_unbounded()).then(|| {
            self.branching
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        });
        let fits = fits.check(&branch.root, count, request.reserve_mib);
        fits.map_err(|error| ErrorBody::new(ErrorCode::Internal, error.to_string()))?
            .map_err(|over| ErrorBody::new(ErrorCode::Conflict, over.to_string()))?;
        let machine = self.machine()?;
        let past = self.snapshots.past();
        let origin = past.origin();
        if origin.is_some_and(|origin| origin.layers().len() >= DEPTH_MAX) {
            let message = format!(
                "the sandbox's memory rests on {DEPTH_MAX} layers already: save it (vmm snapshot --full) and restore that"
            );
            return Err(ErrorBody::new(ErrorCode::Conflict, message));
        }
        let refused = |error| ErrorBody::new(code(&error), error.to_string());
        let at_once = host::processors() * AT_ONCE;
        let mut handover = Handover {
            name: None,
            timeout_ms: request.ttl_ms,
            labels: self.record.labels.clone(),
            budget: self.record.budget,
            guest_branch: 0,
            ask,
            number: 0,
            branch: Some(branch),
            machine: self.snapshots.machine.clone(),
            programs: programs(&self.record),
            warm: self.record.warm.clone(),
            base: past.base.as_ref().map(Base::place),
            disks: Vec::new(),
            is_late: true,
            stands_still: usize::try_from(count)
                .is_ok_and(|count| count > host::processors() * RUN_ON),
            since,
            moment: None,
        };
        handover.labels.extend(request.labels);

        let agent = self.agent();
        let (dir, name) = (self.paths.dir(), format!("branch-{since}"));
        let allowance = &self.drive_backup;
        let (point, freezing) =
            freeze(&machine, agent.as_ref(), origin, dir, &name, allowance).map_err(refused)?;
        drop(machine);
        let files = point.files(origin);
        // The newest layer comes behind them.
        if files.len() >= FILES_MAX {
            let message = "the sandbox's memory and drives rest on too many of those that it branched off: save it (vmm snapshot --full) and restore that";
            return Err(ErrorBody::new(ErrorCode::Conflict, message));
        }
        handover.moment = Some(point.moment);
        handover.disks = point.disks.iter().map(|disk| disk.parts).collect();
        // Their processes start while memory is written: before, they would have made the pause longer. What they need besides that they do meanwhile.
        let layers = origin.map_or(&[][..], Chain::layers);
        let mut taken = pool::take(&runtime_dir(), &handover.machine, layers, count);
        let mut shells = taken.shells.drain(..);
        let mut children = (1..=count)
            .map(|number| {
                let name = name_of(request.name.as_deref(), number, count);
                let shell = shells.next();
                let shell = shell.map_or_else(|| new_shell(&self.reaper), Ok)?;
                Unborn::new(name, number, shell)
            })
            .collect::<io::Result<Vec<_>>>()
            .map_err(internal)?;
        drop(shells);
        let mut birth = Birth {
            handover,
            files,
            reaper: &self.reaper,
        };
        for child in children.iter_mut().take(at_once) {
            birth.begin(child).map_err(internal)?;
        }
        let PointMemory {
            layer,
            summary,
            writer,
            times,
        } = freezing
            .finish(&|| client_is_gone(client))
            .map_err(refused)?;
        let mut writer = Some(writer);
        for child in children.iter_mut().take(at_once) {
            birth.complete(child, &layer).map_err(internal)?;
        }
        let mut views = Vec::with_capacity(children.len());
        for number in 0..children.len() {
            let view = children[number].ready();
            // Beside the answer, and not as long as the first children want the processors.
            if let Some(writer) = writer.take() {
                writer.end_aside();
            }
            views.push(view.map_err(|why| ErrorBody::new(ErrorCode::Conflict, why))?);
            if client_is_gone(client) {
                return Err(unwanted());
            }
            if let Some(next) = children.get_mut(number + at_once) {
                let begun = birth.begin(next);
                let completed = begun.and_then(|()| birth.complete(next, &layer));
                completed.map_err(internal)?;
            }
        }
        let view = BranchView {
            children: views,
            data_pages: summary.data_pages,
            zero_pages: summary.zero_pages,
            state_us: micros(times.state),
            freeze_us: micros(times.freeze),
            pause_us: micros(times.pause),
            written_us: micros(times.total),
            total_us: micros(start.elapsed()),
        };
        let phases = [
            ("state", view.state_us),
            ("freeze", view.freeze_us),
            ("pause", view.pause_us),
            ("written", view.written_us),
            ("total", view.total_us),
        ];
        self.metrics.took("branch", &phases);
        self.metrics.add_children(children.len());
        Ok(Conceived {
            children,
            view,
            taken,
        })
    }
}
