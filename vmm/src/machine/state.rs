//! The machine's state, and what is possible in which.

use std::sync::{Arc, Mutex, PoisonError};

use api::{Command, ControlError, ErrorKind, EventKind, EventLog, PauseReason, Reason, VmState};

/// Whether `command` makes sense to a machine that is in `state`. Those that
/// end a machine are possible as long as it has not ended; those that need no
/// machine are no business of one.
#[must_use]
pub fn permits(state: VmState, pause: Option<PauseReason>, command: &Command) -> bool {
    use VmState::{Booting, Created, Paused, Running, ShuttingDown, Stopped};
    // What goes to another monitor, or has gone, is as it has been sent: it may only end.
    let gone = matches!(pause, Some(PauseReason::Migration | PauseReason::InDoubt));
    let alive = matches!(state, Running | Paused) && !gone;
    match command {
        // A failed disk is tried again by a signal, unless a command says that it stays as it is.
        Command::Pause => {
            state == Running || (state == Paused && pause == Some(PauseReason::DiskError))
        }
        Command::Resume => state == Paused && !gone && !pause.is_some_and(PauseReason::needs_reset),
        Command::PowerButton
        | Command::Nmi
        | Command::Agent(_)
        | Command::SendKey(_)
        | Command::Input(_) => state == Running,
        Command::Reset
        | Command::Resize(_)
        | Command::ResizeDisk(_)
        | Command::AddDevice(_)
        | Command::RemoveDevice(_)
        | Command::UpdateDisk(_)
        | Command::UpdateNet(_)
        | Command::UpdateRng(_)
        | Command::AddPort(_)
        | Command::RemovePort(_)
        | Command::Coredump(_)
        | Command::Untrack
        | Command::CopyIn
        | Command::DiskSnapshot(_)
        | Command::DiskStream(_)
        | Command::DiskCommit(_)
        | Command::DiskMirror(_)
        | Command::DiskBackup(_)
        | Command::DiskBitmap(_)
        | Command::DiskBitmaps
        | Command::DiskRevert(_)
        | Command::DiskLayers => alive,
        Command::Snapshot(_) => alive && pause != Some(PauseReason::MemoryLost),
        Command::SendMigration(..) => {
            let written = matches!(pause, Some(PauseReason::Coredump | PauseReason::Snapshot));
            alive && !written && !pause.is_some_and(PauseReason::needs_reset)
        }
        Command::Shutdown => matches!(state, Booting | Running | Paused),
        Command::Reboot => matches!(state, Booting | Running | Paused) && !gone,
        Command::Delete | Command::Quit => !matches!(state, ShuttingDown),
        Command::Console(_) | Command::ConsoleSize(_) | Command::Screenshot => true,
        Command::Create(_) | Command::Restore(..) | Command::ReceiveMigration(..) => false,
        Command::Boot | Command::BootOnce(_) => matches!(state, Created | Stopped),
    }
}

/// The answer to a command that [`permits`] does not allow.
#[must_use]
pub fn wrong_state(state: VmState, pause: Option<PauseReason>, command: &Command) -> ControlError {
    let reason = match (command, state) {
        (Command::Create(_) | Command::Restore(..) | Command::ReceiveMigration(..), _) => {
            Reason::AlreadyCreated
        }
        (Command::Boot | Command::BootOnce(_), _) => Reason::AlreadyRunning,
        (_, VmState::Paused) if pause == Some(PauseReason::Migration) => Reason::Migrating,
        (_, VmState::Paused) if pause == Some(PauseReason::InDoubt) => Reason::InDoubt,
        (Command::Pause, VmState::Paused) => Reason::AlreadyPaused,
        (Command::Resume, VmState::Running) => Reason::NotPaused,
        (_, VmState::Paused) => match pause {
            Some(PauseReason::Coredump) => Reason::CoreDump,
            Some(PauseReason::Snapshot) => Reason::Snapshot,
            Some(PauseReason::PowerOff) => Reason::PoweredOff,
            Some(PauseReason::Reset) => Reason::ResetAsked,
            Some(PauseReason::MemoryLost) => Reason::MemoryLost,
            _ => Reason::Paused,
        },
        (_, VmState::ShuttingDown) => Reason::ShuttingDown,
        _ => Reason::NotRunning,
    };
    ControlError::state(ErrorKind::Conflict, reason)
}

/// Whether the machine may go from one state to the other.
#[must_use]
pub fn follows(from: VmState, to: VmState) -> bool {
    use VmState::{Booting, Created, Paused, Running, ShuttingDown, Stopped};
    match from {
        Created | Stopped => to == Booting,
        // Back to what it was, when there is nothing to boot after all.
        Booting => matches!(to, Running | Paused | ShuttingDown | Created | Stopped),
        Running => matches!(to, Paused | Booting | ShuttingDown),
        Paused => matches!(to, Running | Booting | ShuttingDown),
        ShuttingDown => to == Stopped,
    }
}

/// The state, to be read from any thread.
#[derive(Clone)]
pub struct StateView(Arc<Mutex<(VmState, Option<PauseReason>)>>);

impl StateView {
    /// The state now, and why while it is [`VmState::Paused`].
    #[must_use]
    pub fn get(&self) -> (VmState, Option<PauseReason>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state over the lives of all machines of a monitor: the only place where it changes.
pub struct Lifecycle {
    view: StateView,
    events: EventLog,
}

impl Lifecycle {
    /// [`VmState::Created`]; changes are published to `events`.
    #[must_use]
    pub fn new(events: EventLog) -> Self {
        Self {
            view: StateView(Arc::new(Mutex::new((VmState::Created, None)))),
            events,
        }
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> VmState {
        self.view.get().0
    }

    /// Why the machine is paused, while it is.
    #[must_use]
    pub fn pause(&self) -> Option<PauseReason> {
        self.view.get().1
    }

    /// The state for readers on other threads.
    #[must_use]
    pub fn view(&self) -> StateView {
        self.view.clone()
    }

    /// Goes into a state that [`follows`], and tells so.
    pub fn enter(&self, state: VmState, pause: Option<PauseReason>) {
        {
            let mut now = self.view.0.lock().unwrap_or_else(PoisonError::into_inner);
            if *now == (state, pause) {
                return;
            }
            debug_assert!(
                now.0 == state || follows(now.0, state),
                "{:?} to {state:?}",
                now.0
            );
            *now = (state, pause);
        }
        self.events.publish(EventKind::State { state, pause });
    }

    /// There is a new description, or none any more: nothing has run.
    pub fn renew(&self) {
        *self.view.0.lock().unwrap_or_else(PoisonError::into_inner) = (VmState::Created, None);
    }
}

#[cfg(test)]
mod tests {
    use api::Passed;

    use super::*;

    const STATES: [VmState; 6] = [
        VmState::Created,
        VmState::Booting,
        VmState::Running,
        VmState::Paused,
        VmState::ShuttingDown,
        VmState::Stopped,
    ];

    #[test]
    fn only_an_end_under_way_forbids_ending() {
        for state in STATES {
            let ending = state == VmState::ShuttingDown;
            assert_eq!(permits(state, None, &Command::Quit), !ending, "{state:?}");
            assert_eq!(permits(state, None, &Command::Delete), !ending, "{state:?}");
        }
    }

    #[test]
    fn a_machine_that_a_disk_paused_can_be_paused_by_command_and_only_then() {
        let permits = |pause| permits(VmState::Paused, Some(pause), &Command::Pause);
        assert!(permits(PauseReason::DiskError));
        for reason in [
            PauseReason::Command,
            PauseReason::Coredump,
            PauseReason::PowerOff,
            PauseReason::GuestPanic,
        ] {
            assert!(!permits(reason), "{reason:?}");
        }
    }

    #[test]
    fn a_guest_does_not_run_past_its_end_and_the_refusal_says_why() {
        let told = |pause, command| {
            let pause = Some(pause);
            let possible = permits(VmState::Paused, pause, &command);
            let refused = wrong_state(VmState::Paused, pause, &command);
            (!possible).then_some(refused.reason)
        };
        for (pause, why) in [
            (PauseReason::PowerOff, Reason::PoweredOff),
            (PauseReason::Reset, Reason::ResetAsked),
        ] {
            assert_eq!(told(pause, Command::Resume), Some(Some(why)));
            assert_eq!(told(pause, Command::PowerButton), Some(Some(why)));
            for possible in [Command::Reset, Command::Shutdown, Command::Quit] {
                assert_eq!(told(pause, possible), None);
            }
        }
        for pause in [
            PauseReason::Command,
            PauseReason::DiskError,
            PauseReason::GuestPanic,
            PauseReason::Watchdog,
        ] {
            assert_eq!(told(pause, Command::Resume), None, "{pause:?}");
        }
    }

    #[test]
    fn a_guest_that_another_monitor_may_run_goes_on_here_by_no_command() {
        let every = || {
            [
                Command::Pause,
                Command::Resume,
                Command::Reset,
                Command::Reboot,
                Command::Nmi,
                Command::CopyIn,
                Command::DiskLayers,
                Command::Snapshot(api::wire::VmSnapshotConfig::of(String::new())),
                Command::SendMigration(Box::default(), Passed::default()),
            ]
        };
        for (pause, why) in [
            (PauseReason::Migration, Reason::Migrating),
            (PauseReason::InDoubt, Reason::InDoubt),
        ] {
            let pause = Some(pause);
            for command in every() {
                assert!(!permits(VmState::Paused, pause, &command), "{command:?}");
                let told = wrong_state(VmState::Paused, pause, &command).reason;
                assert_eq!(told, Some(why), "{command:?}");
            }
            for command in [Command::Shutdown, Command::Delete, Command::Quit] {
                assert!(permits(VmState::Paused, pause, &command), "{command:?}");
            }
        }
    }

    #[test]
    fn a_machine_is_sent_that_could_go_on_and_received_where_there_is_none() {
        let send = || Command::SendMigration(Box::default(), Passed::default());
        for (state, pause, sent) in [
            (VmState::Created, None, false),
            (VmState::Booting, None, false),
            (VmState::Running, None, true),
            (VmState::Paused, Some(PauseReason::Command), true),
            (VmState::Paused, Some(PauseReason::DiskError), true),
            (VmState::Paused, Some(PauseReason::GuestPanic), true),
            (VmState::Paused, Some(PauseReason::Watchdog), true),
            (VmState::Paused, Some(PauseReason::Coredump), false),
            (VmState::Paused, Some(PauseReason::Snapshot), false),
            (VmState::Paused, Some(PauseReason::PowerOff), false),
            (VmState::Paused, Some(PauseReason::Reset), false),
            (VmState::Paused, Some(PauseReason::MemoryLost), false),
            (VmState::ShuttingDown, None, false),
            (VmState::Stopped, None, false),
        ] {
            assert_eq!(permits(state, pause, &send()), sent, "{state:?} {pause:?}");
        }
        for state in STATES {
            let receive = Command::ReceiveMigration(Box::default(), Passed::default());
            assert!(!permits(state, None, &receive), "{state:?}");
            let told = wrong_state(state, None, &receive).reason;
            assert_eq!(told, Some(Reason::AlreadyCreated));
        }
    }

    #[test]
    fn every_state_leads_to_the_end_and_the_end_to_a_new_boot_alone() {
        for state in STATES {
            let mut reached = vec![state];
            while let Some(next) = STATES
                .into_iter()
                .find(|to| !reached.contains(to) && reached.iter().any(|from| follows(*from, *to)))
            {
                reached.push(next);
            }
            assert!(reached.contains(&VmState::Stopped), "{state:?} never ends");
        }
        let after = |to: &VmState| follows(VmState::Stopped, *to);
        assert_eq!(
            STATES.into_iter().filter(after).collect::<Vec<_>>(),
            [VmState::Booting]
        );
    }
}
