//! What takes a machine as it is at one instant, into files: a core dump ([`super::coredump`]) or a snapshot ([`super::snapshot`]).
//!
//! The machine is paused meanwhile. What the guest has asked for just before (a reset, which gives its memory back, or a
//! power-off) waits until the capture has ended. The end of the machine ends the capture, and so does who
//! cancels its job: the machine is free at once, also where the file's storage does not answer. The thread that writes is
//! left to itself then. It holds the memory that it reads, which stays mapped, and files without names, which go when
//! they are closed; nothing is kept that is not of one instant.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::Builder;

use api::{Command, ControlError, ErrorKind, PauseReason, Reply, VmState};

use super::{Driver, PATIENCE};
use crate::error::chain;
use crate::machine::MachineError;
use crate::machine::inbox::Message;
use crate::machine::state::{permits, wrong_state};
use crate::monitor::JobHandle;

/// A capture that is being written.
pub(super) struct Capture {
    /// The job's id.
    id: String,
    /// Why the machine is paused.
    reason: PauseReason,
    /// The file or directory that it becomes.
    path: PathBuf,
    /// The machine ran before, and goes on after it.
    resume: bool,
    /// Who waits for the end, and hears of it.
    answer: Option<u64>,
    /// Closed when the job has ended and what it leaves is there or gone.
    ended: Receiver<()>,
    /// What the guest and its vCPUs have said before they were paused, to be looked at afterwards.
    said: Vec<Message>,
}

/// What a thread of its own does with the machine as it is: it makes the files, or says why not. It holds all that it needs.
pub(super) type Work = Box<dyn FnOnce(&mut JobHandle) -> Result<(), String> + Send>;

/// What is to be captured.
pub(super) struct Plan {
    /// The kind of job, which is the name of its thread too.
    pub kind: &'static str,
    /// Why the machine is paused.
    pub reason: PauseReason,
    /// The file or directory that it becomes.
    pub path: PathBuf,
    /// How much there is to be done, in bytes.
    pub total: u64,
    /// Who waits for the end, and hears of it.
    pub answer: Option<u64>,
}

impl Driver {
    /// Refuses while another capture is being written.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`].
    pub(super) fn check_no_capture(&mut self) -> Result<(), ControlError> {
        self.settle_capture();
        self.capture
            .as_ref()
            .map_or(Ok(()), |capture| Err(capture.busy()))
    }

    /// Captures the machine, for `command`. One that runs is paused until that has ended. `look` takes from the paused
    /// machine what `Work` needs besides its memory.
    pub(super) fn capture(
        &mut self,
        command: &Command,
        plan: Plan,
        look: impl FnOnce(&Self) -> Result<Work, ControlError>,
    ) -> Result<Reply, ControlError> {
        self.check_no_capture()?;
        // Something else may have been done meanwhile.
        let (state, pause) = self.state();
        if !permits(state, pause, command) {
            return Err(wrong_state(state, pause, command));
        }
        let resume = state == VmState::Running;
        if resume {
            self.pause(plan.reason)
                .map_err(|error| error.to_control())?;
        }
        let reason = plan.reason;
        let work = look(self);
        let started = work.and_then(|work| self.start_capture(plan, work, resume));
        if started.is_err() && resume {
            self.resume_after(reason);
        }
        started
    }

    fn start_capture(
        &mut self,
        plan: Plan,
        work: Work,
        resume: bool,
    ) -> Result<Reply, ControlError> {
        let Plan {
            kind,
            reason,
            path,
            total,
            answer,
        } = plan;
        let slot = self.tools.opening.begin();
        let slot = slot.map_err(|error| error.to_control())?;
        let job = self.tools.jobs.begin(kind, total);
        let info = job.info();
        // It reaches this machine alone: the next one has captures and answers of its own.
        let settle = self.errand(move |driver: &mut Self, result| {
            driver.settle_capture();
            driver.answer_captured(answer, result);
        });
        let (alive, ended) = channel();
        let run = move || {
            let mut job = job;
            let result = work(&mut job);
            drop(slot);
            // Who knows of the job's end finds its files there or gone, and the machine free.
            drop(alive);
            job.finish(result.clone());
            settle(result);
        };
        let thread = Builder::new().name(kind.to_owned()).spawn(run);
        thread.map_err(|source| {
            let what = "no thread for what writes the machine down";
            MachineError::Host { what, source }.to_control()
        })?;
        self.capture = Some(Capture {
            id: info.id.clone(),
            reason,
            path,
            resume,
            answer,
            ended,
            said: Vec::new(),
        });
        Ok(Reply::Started(info))
    }

    /// The file that is being written.
    pub(super) fn capturing(&self) -> Option<&Path> {
        self.capture.as_ref().map(|capture| capture.path.as_path())
    }

    /// What becomes of a command while a capture is being written, if not the usual.
    pub(super) fn answer_while_capturing(
        &mut self,
        command: &Command,
    ) -> Option<Result<Reply, ControlError>> {
        self.settle_capture();
        let capture = self.capture.as_mut()?;
        match command {
            Command::Pause if capture.resume => {
                capture.resume = false;
                self.enter(VmState::Paused, Some(PauseReason::Command));
                Some(Ok(Reply::Done))
            }
            // Memory stays as it is.
            Command::Resume | Command::Reset => Some(Err(capture.busy())),
            _ => None,
        }
    }

    /// Keeps what the guest has said for the end of a capture, while there is one. vCPUs are idle, so it is
    /// little; any other message is given back.
    pub(super) fn keep_while_capturing(&mut self, message: Message) -> Option<Message> {
        match (&mut self.capture, message) {
            (
                Some(capture),
                message @ (Message::Guest(_) | Message::Vcpu(..) | Message::SlotNews),
            ) => {
                capture.said.push(message);
                None
            }
            (_, message) => Some(message),
        }
    }

    /// Lets the machine go on when a capture has ended or been cancelled, after what the guest had asked for has been done.
    pub(crate) fn settle_capture(&mut self) {
        let jobs = &self.tools.jobs;
        let ended = |capture: &mut Capture| {
            let over = capture.ended.try_recv() == Err(TryRecvError::Disconnected);
            over || jobs.is_cancelled(&capture.id)
        };
        let Some(capture) = self.capture.take_if(ended) else {
            return;
        };
        let Capture {
            resume,
            said,
            reason,
            answer,
            id,
            ..
        } = capture;
        if self.tools.jobs.is_cancelled(&id) {
            // Its thread may never come back.
            self.answer_captured(answer, Err(format!("{id} was cancelled")));
        }
        for message in said {
            if self.outcome.is_none() {
                self.on_message(message);
            }
        }
        let paused = (VmState::Paused, Some(reason));
        if resume && self.outcome.is_none() && self.state() == paused {
            self.resume_after(reason);
        }
    }

    fn answer_captured(&mut self, answer: Option<u64>, result: Result<(), String>) {
        if let Some(answer) = answer {
            let failed = |message| ControlError::new(ErrorKind::Failed, message);
            let reply = result.map(|()| Reply::Done).map_err(failed);
            self.asides.answer(answer, reply);
        }
    }

    fn resume_after(&mut self, reason: PauseReason) {
        if let Err(error) = self.resume() {
            tracing::error!(
                "the machine stays paused after {}: {}",
                named(reason),
                chain(&error)
            );
        }
    }

    /// Ends a capture that nobody waits for any more. Where storage answers, its file is gone on return.
    pub(super) fn give_up_capture(&mut self) {
        if let Some(capture) = self.capture.take() {
            // It may have ended by itself.
            let _ = self
                .tools
                .jobs
                .give_up(&capture.id, "the machine has ended");
            self.outlast("capture-end", move || {
                let _ = capture.ended.recv_timeout(PATIENCE);
            });
        }
    }
}

impl Capture {
    fn busy(&self) -> ControlError {
        let message = format!(
            "{} is being written: wait for the job {} or cancel it",
            named(self.reason),
            self.id
        );
        ControlError::new(ErrorKind::Busy, message)
    }
}

/// What is written while the machine is paused for `reason`.
fn named(reason: PauseReason) -> &'static str {
    match reason {
        PauseReason::Snapshot => "a snapshot",
        _ => "a core dump",
    }
}

/// The path behind `url`, the value of the field `name`; `wanted` says what is to be given.
///
/// # Errors
///
/// [`ErrorKind::Invalid`].
pub(crate) fn path_of(url: &str, name: &str, wanted: &str) -> Result<PathBuf, ControlError> {
    let invalid = |what: &str| {
        let message = format!("{name}: {what}: give file:// and {wanted}");
        Err(ControlError::new(ErrorKind::Invalid, message))
    };
    match url.strip_prefix("file://").map(Path::new) {
        None => invalid("it is no file"),
        Some(_) if url.contains('\0') => invalid("the path holds a zero byte"),
        Some(path) if !path.is_absolute() => invalid("the path is not absolute"),
        Some(path) if path.file_name().is_none() => invalid("the path names no file"),
        Some(path) => Ok(path.to_owned()),
    }
}
