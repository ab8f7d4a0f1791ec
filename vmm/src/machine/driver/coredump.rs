//! The command `vm.coredump`: a job that reads the memory of a machine that is paused meanwhile.
//!
//! The core is of one instant. What the guest has asked for just before it was paused (a reset, which gives
//! its memory back, or a power-off) waits until the dump has ended. The end of the machine ends the dump, and so does who
//! cancels its job: the machine is free at once, also where the file's storage does not answer. The thread that writes is
//! left to itself then. It holds the memory that it reads, which stays mapped, and a file without a name, which goes when
//! that is closed; no core is kept that is not of one instant.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::Builder;

use api::{Answer, Command, ControlError, ErrorKind, PauseReason, Reply, VmState, wire};

use super::{Driver, PATIENCE};
use crate::config::files;
use crate::error::chain;
use crate::machine::coredump::{CoredumpError, CpuRegisters, total, write};
use crate::machine::inbox::Message;
use crate::machine::state::{permits, wrong_state};
use crate::machine::{Machine, MachineError, fault};
use crate::monitor::JobHandle;
use crate::opener::NewFile;

const SCHEME: &str = "file://";

/// A dump that is being written.
pub(super) struct Dump {
    /// The job's id.
    id: String,
    /// The file that it becomes.
    path: PathBuf,
    /// The machine ran before, and goes on after it.
    resume: bool,
    /// Closed when the job has ended and what it leaves is there or gone.
    ended: Receiver<()>,
    /// What the guest and its vCPUs have said before they were paused, to be looked at afterwards.
    said: Vec<Message>,
}

impl Driver {
    /// Begins to write a core file, which a thread of its own makes, because that may take as long as the host does.
    pub(super) fn coredump(&mut self, request: wire::VmCoredumpData, answer: Answer) {
        self.settle_dump();
        let path = match (&self.dump, destination(&request)) {
            (Some(dump), _) => return answer(Err(dump.busy())),
            (None, Err(error)) => return answer(Err(error)),
            (None, Ok(path)) => path,
        };
        let (opener, place) = (Arc::clone(&self.tools.opener), path.clone());
        let (models, own) = (self.tools.models, self.ears.consoles.reserved().clone());
        let description = self.ears.description.as_ref();
        let config = description.map(|description| description.config.clone());
        let open = move || {
            if let Some(config) = config {
                files::check_dump(&config, models, &opener, &own, &place)
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

    /// The second half of [`Driver::coredump`]. A machine that runs is paused until the file has been written.
    fn dump_into(
        &mut self,
        file: NewFile,
        path: PathBuf,
        request: wire::VmCoredumpData,
    ) -> Result<Reply, ControlError> {
        self.settle_dump();
        if let Some(dump) = &self.dump {
            return Err(dump.busy());
        }
        // Something else may have been done meanwhile.
        let (state, pause) = self.state();
        let command = Command::Coredump(request);
        if !permits(state, pause, &command) {
            return Err(wrong_state(state, pause, &command));
        }
        let resume = state == VmState::Running;
        if resume {
            self.pause(PauseReason::Coredump)
                .map_err(|error| error.to_control())?;
        }
        let started = self.start_dump(file, path, resume);
        if started.is_err() && resume {
            self.resume_after_dump();
        }
        started
    }

    fn start_dump(
        &mut self,
        file: NewFile,
        path: PathBuf,
        resume: bool,
    ) -> Result<Reply, ControlError> {
        let failed = |error: MachineError| error.to_control();
        let cpus = self.machine.cpu_registers().map_err(failed)?;
        let memory = self.machine.memory_map();
        let slot = self.tools.opening.begin();
        let slot = slot.map_err(|error| error.to_control())?;
        let job = self.tools.jobs.begin("coredump", total(&memory));
        let (info, mailbox) = (job.info(), self.tools.mailbox.clone());
        let (alive, ended) = channel();
        let becomes = path.clone();
        let work = move || {
            let mut job = job;
            let result = dump(&mut job, file, &path, |file, step| {
                write(file, &memory, &cpus, step)
            });
            drop((memory, slot));
            // Who knows of the job's end finds its file there or gone, and the machine free.
            drop(alive);
            job.finish(result);
            // Without a machine there is none to go on.
            mailbox.send(Message::Errand(Box::new(Self::settle_dump)));
        };
        let thread = Builder::new().name("coredump".to_owned()).spawn(work);
        thread.map_err(|source| {
            failed(MachineError::Host {
                what: "no thread for the core dump",
                source,
            })
        })?;
        self.dump = Some(Dump {
            id: info.id.clone(),
            path: becomes,
            resume,
            ended,
            said: Vec::new(),
        });
        Ok(Reply::Started(info))
    }

    /// The file that is being written.
    pub(super) fn dumping(&self) -> Option<&Path> {
        self.dump.as_ref().map(|dump| dump.path.as_path())
    }

    /// What becomes of a command while a dump is being written, if not the usual.
    pub(super) fn answer_while_dumping(
        &mut self,
        command: &Command,
    ) -> Option<Result<Reply, ControlError>> {
        self.settle_dump();
        let dump = self.dump.as_mut()?;
        match command {
            Command::Pause if dump.resume => {
                dump.resume = false;
                self.enter(VmState::Paused, Some(PauseReason::Command));
                Some(Ok(Reply::Done))
            }
            // Memory stays as it is.
            Command::Resume | Command::Reset => Some(Err(dump.busy())),
            _ => None,
        }
    }

    /// Keeps what the guest has said for the end of a dump, while there is one. vCPUs are idle, so it is
    /// little; any other message is given back.
    pub(super) fn keep_while_dumping(&mut self, message: Message) -> Option<Message> {
        match (&mut self.dump, message) {
            (Some(dump), message @ (Message::Guest(_) | Message::Vcpu(..) | Message::SlotNews)) => {
                dump.said.push(message);
                None
            }
            (_, message) => Some(message),
        }
    }

    /// Lets the machine go on when a dump has ended or been cancelled, after what the guest had asked for has been done.
    pub(crate) fn settle_dump(&mut self) {
        let jobs = &self.tools.jobs;
        let ended = |dump: &mut Dump| {
            let over = dump.ended.try_recv() == Err(TryRecvError::Disconnected);
            over || jobs.is_cancelled(&dump.id)
        };
        let Some(dump) = self.dump.take_if(ended) else {
            return;
        };
        let Dump { resume, said, .. } = dump;
        for message in said {
            if self.outcome.is_none() {
                self.on_message(message);
            }
        }
        let paused = (VmState::Paused, Some(PauseReason::Coredump));
        if resume && self.outcome.is_none() && self.state() == paused {
            self.resume_after_dump();
        }
    }

    fn resume_after_dump(&mut self) {
        if let Err(error) = self.resume() {
            tracing::error!(
                "the machine stays paused after a core dump: {}",
                chain(&error)
            );
        }
    }

    /// Ends a dump that nobody waits for any more. Where storage answers, its file is gone on return.
    pub(super) fn give_up_dump(&mut self) {
        if let Some(dump) = self.dump.take() {
            // It may have ended by itself.
            let _ = self.tools.jobs.give_up(&dump.id, "the machine has ended");
            self.outlast("coredump-end", move || {
                let _ = dump.ended.recv_timeout(PATIENCE);
            });
        }
    }
}

impl Dump {
    fn busy(&self) -> ControlError {
        let message = format!(
            "a core dump is being written: wait for the job {} or cancel it",
            self.id
        );
        ControlError::new(ErrorKind::Busy, message)
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
    file.keep().map_err(|error| chain(&error))
}

fn destination(request: &wire::VmCoredumpData) -> Result<PathBuf, ControlError> {
    let url = &request.destination_url;
    let invalid = |what: &str| {
        let message = format!("destination_url: {what}: give file:// and an absolute path");
        Err(ControlError::new(ErrorKind::Invalid, message))
    };
    match url.strip_prefix(SCHEME).map(Path::new) {
        None => invalid("it is no file"),
        Some(_) if url.contains('\0') => invalid("the path holds a zero byte"),
        Some(path) if !path.is_absolute() => invalid("the path is not absolute"),
        Some(path) if path.file_name().is_none() => invalid("the path names no file"),
        Some(path) => Ok(path.to_owned()),
    }
}
