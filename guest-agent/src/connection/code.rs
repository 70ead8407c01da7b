//! A connection's requests to run code: in a copy of an interpreter that stands ready, or in a fresh one.

use guest_agent::proto::{self, Done, RunCode, from_agent::Kind};

use super::{Connection, Context, started};
use crate::failure::Failure;
use crate::identity::Identity;
use crate::program::Program;
use crate::runners;
use crate::warm::Begun;

impl Connection {
    pub(super) fn run_code(
        &mut self,
        id: u32,
        code: RunCode,
        output_window: u32,
        context: &mut Context<'_>,
    ) -> Result<(), Failure> {
        *context.source_files += 1;
        let identity = Identity::resolve(&code.user, context.is_init)?;
        let owner = identity.as_ref().map(Identity::ids);
        let source = context.warm.might_run(&code).then(|| code.source.clone());
        let draft = source
            .is_some()
            .then(|| context.warm.take_draft(identity.as_ref()));
        let number = *context.source_files;
        let (mut exec, file) = runners::prepare(code, number, owner, draft.flatten())?;
        if let Some(source) = source {
            self.check_room()?;
            let timeout_ms = exec.timeout_ms;
            match context
                .warm
                .begin(exec, &source, identity, context.cgroups)?
            {
                Begun::Warm(start, spawned, cgroup) => {
                    let program = Program::new(id, spawned, output_window, cgroup, file);
                    self.admit(program.through(start), timeout_ms);
                    self.hear(self.programs.len().saturating_sub(1));
                    return Ok(());
                }
                Begun::Fresh(it) => exec = it,
            }
        }
        self.exec(id, &exec, file, output_window, context)
    }

    pub(super) fn warm(
        &mut self,
        id: u32,
        request: &proto::Warm,
        context: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let outcome = context
            .warm
            .start(request, context.is_init, context.cgroups)?;
        self.warming.push((id, outcome));
        Ok(())
    }

    /// A copy of an interpreter has something to say about the program.
    pub fn hear_copy(&mut self, request_id: u32) {
        let mut programs = self.programs.iter();
        if let Some(index) = programs.position(|program| program.request_id == request_id) {
            self.hear(index);
        }
    }

    pub(super) fn hear(&mut self, index: usize) {
        let Some(program) = self.programs.get_mut(index) else {
            return;
        };
        let Some(start) = &mut program.start else {
            return program.hear();
        };
        if let Some(pid) = start.advance(program.cgroup.as_ref()) {
            program.begin(pid);
            self.output.push(program.request_id, started(pid));
        }
    }

    /// Starts the programs that could not run in a copy, in fresh interpreters; tells what became of interpreters.
    pub fn settle(&mut self) {
        let output = &mut self.output;
        let remains = &mut self.remains;
        self.programs.retain_mut(|program| {
            let Some(start) = program.start.as_ref().filter(|start| start.has_failed()) else {
                return true;
            };
            let kind = match start.start_fresh(program.cgroup.as_ref()) {
                Ok(pid) => {
                    program.begin(pid);
                    started(pid)
                }
                Err(failure) => Kind::Error(failure.into()),
            };
            let runs = program.start.is_none();
            output.push(program.request_id, kind);
            if !runs {
                remains.extend(program.cgroup.take());
            }
            runs
        });
        self.warming.retain(|(id, outcome)| {
            let result = outcome.borrow_mut().take();
            match result {
                Some(Ok(())) => output.push(*id, Kind::Done(Done {})),
                Some(Err(failure)) => output.push(*id, Kind::Error(failure.into())),
                None => return true,
            }
            false
        });
    }
}
