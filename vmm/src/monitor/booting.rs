//! A boot before there is a machine: what that is made from is being opened.
//!
//! The machine is booting then. Readers are answered as always. What ends a machine ends this, too, at
//! once: signals, the user at the console, and the commands `vm.shutdown`, `vm.reboot`, `vm.delete` and
//! `vmm.shutdown`. Other commands wait for the machine, and a command that came after one of them does so too,
//! unless that takes [`GRACE`] or ends the monitor.

use std::time::{Duration, Instant};

use api::{Answer, Command, ControlError, ErrorKind, EventKind, ExitReason, VmState};

use super::{After, Monitor};
use crate::config::{GuestAction, VmConfig};
use crate::machine::driver::{Ears, Outcome, ppoll, readable};
use crate::machine::inbox::Message;
use crate::machine::parts::{Parts, PendingParts};
use crate::machine::state::wrong_state;
use crate::machine::{MachineError, Signals};

/// How long opening may take before what ends the machine is preferred to commands that came before it.
const GRACE: Duration = Duration::from_secs(2);

/// What ends a boot before there is a machine.
pub(super) enum Cut {
    Signal,
    Console,
    Command(Command, Answer),
}

/// What came of opening.
pub(super) enum Opened {
    All(Box<Parts>),
    Cut(Cut),
}

impl Monitor {
    /// Opens what `config` names, and listens meanwhile. What nobody has looked at before is `unchecked`: that its
    /// files are its own is then seen to first.
    ///
    /// # Errors
    ///
    /// What could not be opened.
    pub(super) fn open(
        &self,
        ears: &mut Ears,
        config: &VmConfig,
        unchecked: bool,
    ) -> Result<Opened, MachineError> {
        let (models, mailbox) = (self.models, &self.mailbox);
        let own = unchecked.then(|| ears.consoles.reserved().clone());
        let mut pending =
            PendingParts::begin(config, models, &self.opener, &self.opening, mailbox, own)?;
        let late = Instant::now() + GRACE;
        loop {
            if ears.asked_to_end() {
                // The process ends, and all that is open with it.
                return Ok(Opened::Cut(Cut::Signal));
            }
            // Looked at before what came of it: who commands the end does not find a machine that runs.
            let grace = late.saturating_duration_since(Instant::now());
            if let Some(cut) = take_cut(ears, grace.is_zero()) {
                pending.give_up();
                return Ok(Opened::Cut(cut));
            }
            if let Some(opened) = pending.take() {
                // Commands may have been left in their places, whose wake-up is spent.
                ears.inbox.rouse();
                return opened.map(|parts| Opened::All(Box::new(parts)));
            }
            let signals = ears.signals.as_ref().map(Signals::raw_fd);
            let mut fds = [readable(Some(ears.inbox.wake_fd())), readable(signals)];
            let timeout = Some(grace).filter(|grace| !grace.is_zero());
            ppoll(&mut fds, timeout).map_err(MachineError::Wait)?;
        }
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

/// What ends the boot, if it has come. Who would boot again is answered.
fn take_cut(ears: &mut Ears, late: bool) -> Option<Cut> {
    let concerns = || {
        let mut others = false;
        move |message: &Message| match message {
            Message::ConsoleEnd => true,
            Message::Command(command, _) => match command {
                Command::Quit | Command::Boot | Command::BootOnce(_) | Command::Create(_) => true,
                Command::Delete | Command::Shutdown | Command::Reboot => late || !others,
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
            Message::Command(
                command @ (Command::Boot | Command::BootOnce(_) | Command::Create(_)),
                answer,
            ) => answer(Err(wrong_state(VmState::Booting, None, &command))),
            Message::Command(command, answer) => return Some(Cut::Command(command, answer)),
            _ => (),
        }
    }
    None
}
