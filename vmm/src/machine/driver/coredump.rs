//! The command `vm.coredump`: a job that reads the memory of a machine that is paused meanwhile.
//!
//! How that is paused, goes on and ends is of all captures ([`super::capture`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::{Answer, Command, ControlError, ErrorKind, PauseReason, Reply, wire};

use super::Driver;
use super::capture::{Plan, path_of};
use crate::config::files;
use crate::error::chain;
use crate::machine::coredump::{CoredumpError, CpuRegisters, total, write};
use crate::machine::{Machine, MachineError, fault};
use crate::monitor::JobHandle;
use crate::opener::NewFile;

impl Driver {
    /// Begins to write a core file, which a thread of its own makes, because that may take as long as the host does.
    pub(super) fn coredump(&mut self, request: wire::VmCoredumpData, answer: Answer) {
        let path = self.check_no_capture().and_then(|()| {
            path_of(
                &request.destination_url,
                "destination_url",
                "an absolute path",
            )
        });
        let path = match path {
            Ok(path) => path,
            Err(error) => return answer(Err(error)),
        };
        let (opener, place) = (Arc::clone(&self.tools.opener), path.clone());
        let (models, own) = (self.tools.models, self.ears.consoles.reserved().clone());
        let description = self.ears.description.as_ref();
        let config = description.map(|description| description.config.clone());
        let open = move || {
            if let Some(config) = config {
                files::check_new(&config, models, &opener, &own, (files::DUMP, &place))
                    .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            }
            opener
                .begin_file(&place)
                .map_err(|error| ControlError::from_error(fault::of(&error), &error))
        };
        let answer = self.asides.wait_with(answer);
        let started = self.beside("open", open, move |driver, file| {
            let begun = file.and_then(|file| driver.dump_into(file, path, request));
            driver.asides.answer(answer, begun);
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
        }
    }

    /// The second half of [`Driver::coredump`].
    fn dump_into(
        &mut self,
        file: NewFile,
        path: PathBuf,
        request: wire::VmCoredumpData,
    ) -> Result<Reply, ControlError> {
        let memory = self.machine.memory_map();
        let plan = Plan {
            kind: "coredump",
            reason: PauseReason::Coredump,
            path: path.clone(),
            total: total(&memory),
            answer: None,
            hold: Err(None),
            look: None,
        };
        self.capture(&Command::Coredump(request), plan, move |driver, _| {
            let cpus = driver.machine.cpu_registers();
            let cpus = cpus.map_err(|error| error.to_control())?;
            Ok(Box::new(move |job, _| {
                dump(job, file, &path, |file, step| {
                    write(file, &memory, &cpus, step)
                })
            }))
        })
    }
}

impl Machine {
    /// The registers of the vCPUs that the guest has. They are idle.
    fn cpu_registers(&self) -> Result<Vec<CpuRegisters>, MachineError> {
        let mut all = Vec::new();
        for index in self.vcpus.present() {
            let place = usize::try_from(index).unwrap_or(usize::MAX);
            let asked = self.vcpus.ask(place, move |vcpu| {
                Ok::<_, MachineError>(CpuRegisters {
                    index,
                    regs: vcpu.regs()?,
                    sregs: vcpu.sregs()?,
                    kernel_gs_base: vcpu.kernel_gs_base()?,
                })
            });
            all.push(asked.unwrap_or_else(|| {
                Err(MachineError::Host {
                    what: "a vCPU's thread",
                    source: std::io::ErrorKind::BrokenPipe.into(),
                })
            })?);
        }
        Ok(all)
    }
}

/// Does the job; the file is there when all is well, and nothing is otherwise.
fn dump(
    job: &mut JobHandle,
    file: NewFile,
    path: &Path,
    write: impl FnOnce(&std::fs::File, &mut dyn FnMut(u64) -> bool) -> Result<(), CoredumpError>,
) -> Result<(), String> {
    let total = job.info().total;
    let mut step = |done| {
        job.progress(done, total);
        !job.is_cancelled()
    };
    let written = write(file.file(), &mut step);
    written.map_err(|error| format!("{}: {}", path.display(), chain(&error)))?;
    file.sync().map_err(|error| chain(&error))?;
    if !job.commit() {
        return Err("it was cancelled".to_owned());
    }
    file.keep().map_err(|error| chain(&error))
}
