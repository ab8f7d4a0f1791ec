//! What the guest itself asks for: its end, a restart, or that somebody looks at what became of it.

use api::{EventKind, ExitReason, PauseReason};
use devices::GuestRequest;

use super::Driver;
use crate::config::GuestAction;

impl Driver {
    /// The guest asks. Its vCPUs leave the guest by themselves at their next
    /// exit, and wait here for what becomes of them.
    pub(super) fn on_guest(&mut self, request: GuestRequest) {
        self.machine.vcpus().pause();
        if self.state().1.is_some_and(PauseReason::needs_reset) {
            // Another vCPU's, of a guest that has done its last.
            return;
        }
        match request {
            GuestRequest::PowerOff | GuestRequest::PvShutdown => {
                self.act(ExitReason::PowerOff);
            }
            GuestRequest::Reset => self.act(ExitReason::Reset),
            GuestRequest::Panicked => {
                self.ears.events.publish(EventKind::GuestPanic);
                self.act(ExitReason::GuestPanic);
            }
            GuestRequest::CrashLoaded => {
                self.ears.events.publish(EventKind::GuestPanic);
                self.go_on();
            }
            GuestRequest::Watchdog => {
                self.ears.events.publish(EventKind::Watchdog);
                self.act(ExitReason::Watchdog);
            }
        }
    }

    /// What is to be done about what the guest has done.
    fn action(&self, done: ExitReason) -> GuestAction {
        let description = self.ears.description.as_ref();
        let config = description.map(|description| &description.config);
        match done {
            ExitReason::Reset => config.map_or(GuestAction::Restart, |config| config.on_reboot),
            // Who has asked for the end gets it.
            _ if self.policy.deadline().is_some() => GuestAction::Exit,
            ExitReason::PowerOff => config.map_or(GuestAction::Exit, |config| config.on_poweroff),
            ExitReason::Watchdog => {
                config.map_or(GuestAction::Restart, |config| config.on_watchdog)
            }
            _ => config.map_or(GuestAction::Exit, |config| config.on_panic),
        }
    }

    /// Does what is to be done about what the guest has done, which must not run past it.
    fn act(&mut self, done: ExitReason) {
        let action = self.action(done);
        match action {
            GuestAction::Pause => {
                let reason = match done {
                    ExitReason::PowerOff => PauseReason::PowerOff,
                    ExitReason::Reset => PauseReason::Reset,
                    ExitReason::Watchdog => PauseReason::Watchdog,
                    _ => PauseReason::GuestPanic,
                };
                if let Err(error) = self.pause(reason) {
                    self.give_up_guest(done, "the guest could not be paused", &error);
                }
            }
            GuestAction::Restart if !self.once => {
                let told = match done {
                    ExitReason::Reset => EventKind::GuestReset,
                    _ => EventKind::Rebooting,
                };
                if let Err(error) = self.reset(told) {
                    self.give_up_guest(ExitReason::Stopped, "guest reset", &error);
                }
            }
            GuestAction::Restart | GuestAction::Stop | GuestAction::Exit => {
                if action == GuestAction::Restart {
                    self.ears.events.publish(EventKind::Rebooting);
                }
                self.finish(done, None);
                if let Some(outcome) = &mut self.outcome {
                    outcome.next = action;
                }
            }
        }
    }
}
