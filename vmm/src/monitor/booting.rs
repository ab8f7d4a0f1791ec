//! The control thread while no machine runs and files are being opened, read or looked at beside it
//! ([`crate::machine::beside`]): for a boot, or for a change of what is described.
//!
//! Readers are answered as always. What ends a machine ends a boot, too, at once: signals, the user at the console, and
//! the commands `vm.shutdown`, `vm.reboot`, `vm.delete` and `vmm.shutdown`. Signals and those commands, but for the
//! reboot, end the waiting for a change. Other commands wait their turn, and one of those that came after them does so too,
//! unless that takes [`GRACE`] or ends the monitor.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::wire::RestoreConfig;
use api::{
    Answer, Command, ControlError, ErrorKind, EventKind, ExitReason, Passed, Reply, VmState,
};

use super::{After, Description, Monitor};
use crate::config::{GuestAction, VmConfig};
use crate::machine::beside::put_away;
use crate::machine::build::{self, Built, Frame, Origin};
use crate::machine::driver::path_of;
use crate::machine::driver::{Ears, Outcome, ppoll, readable};
use crate::machine::inbox::Message;
use crate::machine::loading::{Loaded, Loading};
use crate::machine::parts::{Awaited, Parts, PendingParts};
use crate::machine::saved::{RestoreWay, Saved};
use crate::machine::state::wrong_state;
use crate::machine::{MachineError, Signals};

/// How long opening may take before what ends the machine is preferred to commands that came before it.
const GRACE: Duration = Duration::from_secs(2);

/// What is told of a change that does not come about.
const CHANGE_ENDED: &str =
    "the change was ended while its files were being looked at: nothing has changed";

/// What is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// A boot.
    Boot,
    /// A change of what is described.
    Change,
    /// A source, which may take for ever.
    Source,
}

/// What ends the waiting.
pub(super) enum Cut {
    Signal,
    Console,
    Command(Command, Answer),
}

/// What came of a boot's files.
pub(super) enum Made<T> {
    /// All of it.
    All(T),
    /// Nothing: the boot has been ended.
    Cut(Cut),
}

impl Monitor {
    /// Builds what `config` describes, and listens while files are opened, read and made for it. What nobody has
    /// looked at before is `unchecked`: that its files are its own is then seen to first. The machine is as `origin` says; of `awaited` disks
    /// the devices alone are made.
    ///
    /// # Errors
    ///
    /// What kept the machine from being built.
    pub(super) fn build(
        &self,
        ears: &mut Ears,
        config: &VmConfig,
        (unchecked, awaited): (bool, Awaited),
        origin: Origin,
    ) -> Result<Made<Built>, MachineError> {
        let parts = match self.open(ears, config, unchecked, awaited)? {
            Made::All(parts) => parts,
            Made::Cut(cut) => return Ok(Made::Cut(cut)),
        };
        let (frame, loading) = build::begin(config, *parts, &self.opener, &ears.consoles, origin)?;
        let (frame, loaded) = match self.load(ears, frame, loading)? {
            Made::All(loaded) => loaded,
            Made::Cut(cut) => return Ok(Made::Cut(cut)),
        };
        let (opener, mailbox) = (&self.opener, &self.mailbox);
        let whole = (*frame, loaded);
        let built = build::finish(config, whole, opener, mailbox, &ears.events, &ears.consoles);
        built.map(Made::All)
    }

    /// Opens what `config` names.
    fn open(
        &self,
        ears: &mut Ears,
        config: &VmConfig,
        unchecked: bool,
        awaited: Awaited,
    ) -> Result<Made<Box<Parts>>, MachineError> {
        let (models, mailbox) = (self.models, &self.mailbox);
        let own = unchecked.then(|| ears.consoles.reserved().clone());
        let mut pending = PendingParts::begin(
            config,
            models,
            &self.opener,
            &self.opening,
            mailbox,
            (own, awaited),
        )?;
        match attend(ears, Waiting::Boot, || pending.take())? {
            Ok(opened) => opened.map(|parts| Made::All(Box::new(parts))),
            Err(cut) => {
                pending.give_up();
                Ok(Made::Cut(cut))
            }
        }
    }

    /// Reads the kernel into the memory of `frame`, and makes the files that the machine is to have.
    fn load(
        &self,
        ears: &mut Ears,
        frame: Frame,
        loading: Loading,
    ) -> Result<Made<(Box<Frame>, Loaded)>, MachineError> {
        let frame = Box::new(frame);
        let awaited = Arc::new(());
        let needed = Arc::downgrade(&awaited);
        let work = move || loading.run(&|| needed.strong_count() > 0);
        let begun = self.opening.start("load", &self.mailbox, work);
        let failed = |frame, error| {
            // Files of disks are open there.
            put_away(frame);
            Err(error)
        };
        let pending = match begun {
            Ok(pending) => pending,
            Err(error) => return failed(frame, error.into()),
        };
        let loaded = match attend(ears, Waiting::Boot, || pending.take())? {
            Ok(loaded) => loaded,
            Err(cut) => {
                drop(awaited);
                pending.give_up(frame);
                return Ok(Made::Cut(cut));
            }
        };
        let what = "the thread that loads the kernel";
        let loaded = loaded.map_err(|source| MachineError::Host { what, source });
        match loaded.and_then(|loaded| loaded) {
            Ok(loaded) => Ok(Made::All((frame, loaded))),
            Err(error) => failed(frame, error),
        }
    }

    /// Changes what is described, in two steps: `work`, which may look at files and open them, on a thread of its own, and
    /// then `take_up` with what came of it, here. What ends the waiting is carried out instead; nothing has changed then.
    ///
    /// # Errors
    ///
    /// [`MachineError::Wait`] when the host lets it wait no more.
    pub(super) fn beside<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> Result<T, ControlError> + Send + 'static,
        take_up: impl FnOnce(&mut Self, T) -> Result<Reply, ControlError>,
        answer: Answer,
    ) -> Result<Option<After>, MachineError> {
        let cut = match self.look(work)? {
            Ok(done) => {
                answer(done.and_then(|done| take_up(self, done)));
                return Ok(None);
            }
            Err(cut) => cut,
        };
        self.leave_unchanged(CHANGE_ENDED, (cut, answer))
    }

    /// Opens the snapshot that `request` names, beside this thread, takes up its description with what is another, and has its
    /// machine built. The descriptors that came along are `passed`.
    ///
    /// # Errors
    ///
    /// [`MachineError::Wait`] when the host lets it wait no more.
    pub(super) fn restore(
        &mut self,
        request: Box<RestoreConfig>,
        passed: Passed,
        answer: Answer,
    ) -> Result<Option<After>, MachineError> {
        let wanted = "the absolute path of a snapshot's directory";
        let path = path_of(&request.source_url, "source_url", wanted);
        let path = match path {
            Ok(path) => path,
            Err(error) => {
                answer(Err(error));
                return Ok(None);
            }
        };
        let opener = Arc::clone(&self.opener);
        let resume = request.resume;
        let open = move || {
            let mut saved = Saved::open(&path, &opener).map_err(|error| error.to_control())?;
            let restored = Description::restored(&saved.config, &request, passed);
            let (description, renewal) = restored?;
            saved.ask(RestoreWay {
                memory: Some(request.memory_restore_mode),
                prefault: request.prefault,
                renewal,
                template: None,
            });
            // What excludes what is told while nothing has changed.
            let mode = saved.memory_mode(&description.config);
            mode.map_err(|error| error.to_control())?;
            Ok((saved, description))
        };
        match self.look(open)? {
            Ok(Ok((saved, description))) => {
                self.describe(description);
                self.restored = Some((saved, resume));
                self.unchecked = true;
                Ok(Some(After::Boot(Some(answer))))
            }
            Ok(Err(error)) => {
                answer(Err(error));
                Ok(None)
            }
            Err(cut) => self.leave_unchanged(CHANGE_ENDED, (cut, answer)),
        }
    }

    /// Has `work` done on a thread of its own, and listens meanwhile: what came of it, or what ended the waiting.
    fn look<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> Result<T, ControlError> + Send + 'static,
    ) -> Result<Result<Result<T, ControlError>, Cut>, MachineError> {
        self.look_while(Waiting::Change, work)
    }

    /// As [`Monitor::look`], for what waits for a source: who wants another machine is told so.
    pub(super) fn look_for_a_source<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> Result<T, ControlError> + Send + 'static,
    ) -> Result<Result<Result<T, ControlError>, Cut>, MachineError> {
        self.look_while(Waiting::Source, work)
    }

    fn look_while<T: Send + 'static>(
        &mut self,
        waiting: Waiting,
        work: impl FnOnce() -> Result<T, ControlError> + Send + 'static,
    ) -> Result<Result<Result<T, ControlError>, Cut>, MachineError> {
        let Some(ears) = &mut self.ears else {
            return Ok(Ok(Err(super::view::not_created())));
        };
        let pending = match self.opening.start("open", &self.mailbox, work) {
            Ok(pending) => pending,
            Err(error) => return Ok(Ok(Err(error.to_control()))),
        };
        let lost = |error| ControlError::from_error(ErrorKind::Failed, &error);
        let looked = attend(ears, waiting, || pending.take())?;
        Ok(looked.map(|done| done.map_err(lost).and_then(|done| done)))
    }

    pub(super) fn leave_unchanged(
        &mut self,
        message: &str,
        (cut, answer): (Cut, Answer),
    ) -> Result<Option<After>, MachineError> {
        answer(Err(ControlError::new(ErrorKind::Conflict, message)));
        Ok(match cut {
            Cut::Signal => Some(After::Exit(ExitReason::Stopped)),
            Cut::Command(command, answer) => self.on_command(command, answer)?,
            Cut::Console => None,
        })
    }

    /// Does what ended a boot before there was a machine.
    pub(super) fn cut(&mut self, ears: Ears, cut: Cut, booted: Option<Answer>) -> After {
        let reason = ExitReason::Stopped;
        let quit = matches!(cut, Cut::Signal);
        let mut then: Vec<(Command, Answer)> = Vec::new();
        if let Cut::Command(command, answer) = cut {
            if matches!(command, Command::Reboot) {
                ears.events.publish(EventKind::Rebooting);
            }
            then.push((command, answer));
        }
        ears.life.enter(VmState::ShuttingDown, None);
        ears.life.enter(VmState::Stopped, None);
        let detail = None;
        ears.events.publish(EventKind::Exit { reason, detail });
        if let Some(booted) = booted {
            let message = "the boot was ended while disks and other files were being opened";
            booted(Err(ControlError::new(ErrorKind::Conflict, message)));
        }
        // A command that came before the end finds no machine.
        ears.inbox.rouse();
        self.ears = Some(ears);
        let outcome = Outcome {
            reason,
            detail: None,
            quit,
            next: GuestAction::Exit,
            failed_to_boot: false,
        };
        let after = self.follow(&outcome, then);
        if let (After::Exit(_), Some(ears)) = (&after, &self.ears) {
            ears.finish_consoles(false);
        }
        after
    }
}

/// Waits until `ready` has something, and listens meanwhile.
///
/// # Errors
///
/// [`MachineError::Wait`].
fn attend<T>(
    ears: &mut Ears,
    waiting: Waiting,
    mut ready: impl FnMut() -> Option<T>,
) -> Result<Result<T, Cut>, MachineError> {
    let late = Instant::now() + GRACE;
    loop {
        if ears.asked_to_end() {
            // The process ends, and all that is open with it.
            return Ok(Err(Cut::Signal));
        }
        // Looked at before what came of it: who commands the end does not find a machine that runs.
        let grace = late.saturating_duration_since(Instant::now());
        if let Some(cut) = take_cut(ears, waiting, grace.is_zero()) {
            ears.inbox.rouse();
            return Ok(Err(cut));
        }
        if let Some(done) = ready() {
            // Commands may have been left in their places, whose wake-up is spent.
            ears.inbox.rouse();
            return Ok(Ok(done));
        }
        let signals = ears.signals.as_ref().map(Signals::raw_fd);
        let mut fds = [readable(Some(ears.inbox.wake_fd())), readable(signals)];
        let timeout = Some(grace).filter(|grace| !grace.is_zero());
        ppoll(&mut fds, timeout).map_err(MachineError::Wait)?;
    }
}

/// What ends the waiting, if it has come. Who would boot during a boot is answered.
fn take_cut(ears: &mut Ears, waiting: Waiting, late: bool) -> Option<Cut> {
    let boots = waiting == Waiting::Boot;
    let concerns = || {
        let mut others = false;
        move |message: &Message| match message {
            Message::ConsoleEnd => boots,
            Message::Command(command, _) => match command {
                _ if waiting == Waiting::Source => true,
                Command::Quit => true,
                Command::Boot
                | Command::BootOnce(_)
                | Command::Create(_)
                | Command::Restore(..)
                | Command::ReceiveMigration(..)
                    if boots =>
                {
                    true
                }
                Command::Delete | Command::Shutdown => late || !others,
                Command::Reboot if boots => late || !others,
                _ => {
                    others = true;
                    false
                }
            },
            _ => false,
        }
    };
    while let Some(message) = ears.inbox.take_where(concerns()) {
        match message {
            Message::ConsoleEnd => return Some(Cut::Console),
            Message::Command(command, answer) if waiting == Waiting::Source && !ends(&command) => {
                let message = "a machine is waited for: wait for it, or end that ('vireo migrate-cancel', vm.migration-cancel)";
                answer(Err(ControlError::new(ErrorKind::Busy, message)));
            }
            Message::Command(
                command @ (Command::Boot
                | Command::BootOnce(_)
                | Command::Create(_)
                | Command::Restore(..)
                | Command::ReceiveMigration(..)),
                answer,
            ) => answer(Err(wrong_state(VmState::Booting, None, &command))),
            Message::Command(command, answer) => return Some(Cut::Command(command, answer)),
            _ => (),
        }
    }
    None
}

/// Whether a command ends the waiting for a source.
fn ends(command: &Command) -> bool {
    matches!(command, Command::Quit | Command::Delete | Command::Shutdown)
}
