//! Which command is possible in which state.

use api::{Command, VmState};

/// Whether `command` makes sense while the machine is in `state`. Asking for
/// what already is (pausing a paused machine) does.
#[must_use]
pub fn permits(state: VmState, command: &Command) -> bool {
    use VmState::{Booting, Created, Paused, Running, ShuttingDown, Stopped};
    match command {
        Command::State => true,
        Command::Boot => state == Created,
        Command::ResizeDisk { .. } => matches!(state, Running | Paused),
        Command::Pause | Command::Resume | Command::Reset => matches!(state, Running | Paused),
        Command::PowerButton => state == Running,
        Command::Stop => match state {
            Created | Booting | Running | Paused => true,
            ShuttingDown | Stopped => false,
        },
    }
}

/// Whether the machine may go from one state to the other.
#[must_use]
pub fn follows(from: VmState, to: VmState) -> bool {
    use VmState::{Booting, Created, Paused, Running, ShuttingDown, Stopped};
    match from {
        Created => matches!(to, Booting | ShuttingDown),
        Booting => matches!(to, Running | Paused | ShuttingDown),
        Running => matches!(to, Paused | Booting | ShuttingDown),
        Paused => matches!(to, Running | Booting | ShuttingDown),
        ShuttingDown => to == Stopped,
        Stopped => false,
    }
}

#[cfg(test)]
mod tests {
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
    fn every_state_can_be_asked_for_and_only_an_end_forbids_stopping() {
        for state in STATES {
            assert!(permits(state, &Command::State));
            let ended = matches!(state, VmState::ShuttingDown | VmState::Stopped);
            assert_eq!(permits(state, &Command::Stop), !ended, "{state:?}");
        }
    }

    #[test]
    fn every_state_but_the_last_leads_to_the_end() {
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
        assert!(STATES.into_iter().all(|to| !follows(VmState::Stopped, to)));
    }
}
