//! What takes a machine as it is at one instant, into files: a core dump ([`super::coredump`]) or a snapshot ([`super::snapshot`]).
//!
//! The machine is paused meanwhile, or only until its memory is held still ([`crate::memory::still`]). What the guest has asked for just before or since (a reset, which gives its memory back, or a
//! power-off) waits until the capture has ended. The end of the machine ends the capture, and so does who
//! cancels its job: the machine is free at once, also where the file's storage does not answer. The thread that writes is
//! left to itself then. It holds the memory that it reads, which stays mapped, and files without names, which go when
//! they are closed; nothing is kept that is not of one instant.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use devices::GuestRequest;

use api::{Command, ControlError, ErrorKind, PauseReason, Reply, VmState};
use migration::pages::PageSet;

use super::{Driver, PATIENCE};
use crate::error::chain;
use crate::kvm::vcpu::Stop;
use crate::machine::MachineError;
use crate::machine::inbox::Message;
use crate::machine::state::{permits, wrong_state};
use crate::machine::tracking::Moment;
use crate::memory::still::{Held, Still};
use crate::monitor::JobHandle;
use crate::sandbox::{Builder, Kind};

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
    /// The machine goes on meanwhile, with its memory held still.
    held: Option<Held>,
    /// Who waits for the end, and hears of it.
    answer: Option<u64>,
    /// Closed when the job has ended and what it leaves is there or gone.
    ended: Receiver<()>,
    /// What the guest and its vCPUs have said before they were paused, to be looked at afterwards.
    said: Vec<Message>,
}

/// What a thread of its own does with the machine as it is: it makes the files, or says why not. It holds all that it needs.
pub(super) type Work = Box<dyn FnOnce(&mut JobHandle, Manner) -> Result<(), String> + Send>;

/// How a machine is captured.
#[derive(Default)]
pub(super) struct Manner {
    /// Its memory, where the guest goes on.
    pub still: Option<Arc<Still>>,
    /// When it was paused, if it ran.
    pub paused: Option<Instant>,
    /// How long vCPUs stood, as soon as they run again.
    pub pause: Arc<OnceLock<Duration>>,
    /// How much of it was waiting for devices.
    pub drain: Duration,
    /// Why the guest does not go on, where it could have been asked for.
    pub why: Option<String>,
}

/// What may hold memory still, or why nothing does (`None`: it was not asked for).
pub(super) type Hold = Result<Held, Option<String>>;

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
    /// What holds memory still, so that the guest goes on.
    pub hold: Hold,
    /// What is to be known of memory at the instant.
    pub look: Option<Look>,
}

/// Looks at memory while vCPUs and devices stand.
pub(super) type Look = Box<dyn FnOnce() -> Result<Moment, ControlError>>;

/// Why a capture is given up.
const ENDED: &str = "the machine has ended";

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

    /// Captures the machine, for `command`. One that runs is paused until that has ended, or until its memory is held still. `look` takes from the paused
    /// machine what `Work` needs besides its memory.
    pub(super) fn capture(
        &mut self,
        command: &Command,
        mut plan: Plan,
        look: impl FnOnce(&Self, Moment) -> Result<Work, ControlError>,
    ) -> Result<Reply, ControlError> {
        self.check_no_capture()?;
        if let Some(error) = self.refuse_while_moving(command) {
            return Err(error);
        }
        // Something else may have been done meanwhile.
        let (state, pause) = self.state();
        if !permits(state, pause, command) {
            return Err(wrong_state(state, pause, command));
        }
        let ran = state == VmState::Running;
        let mut manner = Manner::default();
        let mut held = std::mem::replace(&mut plan.hold, Err(None));
        if ran {
            manner.paused = Some(Instant::now());
            self.pause(plan.reason)
                .map_err(|error| error.to_control())?;
            manner.drain = self.drained;
        }
        let moment = plan
            .look
            .take()
            .map_or_else(|| Ok(Moment::default()), |look| look());
        if let (true, Ok(moment)) = (ran, &moment) {
            let chunks = moment.changed.as_ref().map(PageSet::chunks);
            let parts = self.machine.ram_parts();
            held = held.and_then(|held| match held.hold_some(&parts, chunks.as_deref()) {
                Ok(()) => Ok(held),
                Err(error) => Err(Some(chain(&error))),
            });
        }
        let work = moment.and_then(|moment| look(self, moment));
        if !ran || work.is_err() {
            // Nothing is protected any more before the guest goes on.
            held = Err(None);
        }
        let reason = plan.reason;
        let (held, why) = match held {
            Ok(held) => (Some(held), None),
            Err(why) => (None, why),
        };
        let live = held.is_some();
        manner.why = why;
        manner.still = held.as_ref().map(|held| Arc::clone(held.still()));
        let (paused, pause) = (manner.paused, Arc::clone(&manner.pause));
        let resume = ran && !live;
        let started = work.and_then(|work| self.start_capture(plan, (work, manner), resume, held));
        if ran && (live || started.is_err()) {
            // A device that starts may write guest memory, here: who copies that is there by now.
            self.resume_after(reason);
            // It is set here alone.
            let _ = paused.map(|paused| pause.set(paused.elapsed()));
        }
        started
    }

    fn start_capture(
        &mut self,
        plan: Plan,
        (work, manner): (Work, Manner),
        resume: bool,
        held: Option<Held>,
    ) -> Result<Reply, ControlError> {
        let slot = self.tools.opening.begin();
        let slot = slot.map_err(|error| error.to_control())?;
        let job = self.tools.jobs.begin(plan.kind, plan.total);
        let info = job.info();
        if let Some(still) = &manner.still {
            let cancelled = job.watch();
            still.heed(move || !cancelled());
        }
        // It reaches this machine alone: the next one has captures and answers of its own.
        let answer = plan.answer;
        let settle = self.errand(move |driver: &mut Self, result| {
            driver.settle_capture();
            driver.answer_captured(answer, result);
        });
        let (alive, ended) = channel();
        let run = move || {
            let mut job = job;
            let result = work(&mut job, manner);
            drop(slot);
            // Who knows of the job's end finds its files there or gone, and the machine free.
            drop(alive);
            job.finish(result.clone());
            settle(result);
        };
        let thread = Builder::new(Kind::Job)
            .name(plan.kind.to_owned())
            .spawn(run);
        thread.map_err(|source| {
            let what = "no thread for what writes the machine down";
            MachineError::Host { what, source }.to_control()
        })?;
        self.capture = Some(Capture {
            id: info.id.clone(),
            reason: plan.reason,
            path: plan.path,
            resume,
            held,
            answer,
            ended,
            said: Vec::new(),
        });
        Ok(Reply::Started(info))
    }

    /// Whether a capture is being written, or a snapshot begun.
    pub(super) fn is_capturing(&self) -> bool {
        self.capture.is_some() || self.snapshotting.strong_count() > 0
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
            Command::Resume if capture.held.is_some() && capture.said.is_empty() => None,
            // Memory stays as it is.
            Command::Resume | Command::Reset => Some(Err(capture.busy())),
            _ => None,
        }
    }

    /// Keeps what the guest has said for the end of a capture, while there is one. vCPUs are idle then, so it is
    /// little; any other message is given back.
    pub(super) fn keep_while_capturing(&mut self, message: Message) -> Option<Message> {
        let Some(capture) = &mut self.capture else {
            return Some(message);
        };
        let goes_on = capture.held.is_some();
        let kept = match &message {
            // After it the guest goes on.
            Message::Guest(GuestRequest::CrashLoaded) => !goes_on,
            Message::Guest(_) | Message::Vcpu(_, Stop::TripleFault(_)) => true,
            Message::Vcpu(..) | Message::SlotNews => !goes_on,
            _ => false,
        };
        if !kept {
            return Some(message);
        }
        capture.said.push(message);
        if goes_on {
            // Its end, or the end of what it was.
            self.machine.vcpus().pause();
        }
        None
    }

    /// Whether the guest has asked for something that waits for the end of a capture.
    pub(super) fn guest_waits(&self) -> bool {
        let capture = self.capture.as_ref();
        capture.is_some_and(|capture| !capture.said.is_empty())
    }

    /// Lets the machine go on when a capture has ended or been cancelled, after what the guest had asked for has been done;
    /// then comes what others have waited with.
    pub(crate) fn settle_capture(&mut self) {
        self.end_capture();
        self.do_later();
    }

    fn end_capture(&mut self) {
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
            held,
            ..
        } = capture;
        // Before anything gives memory back.
        let went_on = held.is_some();
        drop(held);
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
        if self.outcome.is_some() {
            return;
        }
        if resume && self.state() == paused {
            self.resume_after(reason);
        } else if went_on {
            self.go_on();
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

    /// Nobody who writes guest memory waits for a capture any more: the machine ends.
    pub(super) fn free_capture(&mut self) {
        if let Some(capture) = &mut self.capture
            && let Some(held) = capture.held.take()
        {
            // It may have ended by itself.
            let _ = self.tools.jobs.give_up(&capture.id, ENDED);
            drop(held);
        }
    }

    /// Ends a capture that nobody waits for any more. Where storage answers, its file is gone on return.
    pub(super) fn give_up_capture(&mut self) {
        if let Some(capture) = self.capture.take() {
            // It may have ended by itself.
            let _ = self.tools.jobs.give_up(&capture.id, ENDED);
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
