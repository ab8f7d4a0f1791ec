//! The lives of machines in one monitor, through every command there is.

use std::sync::mpsc::channel;
use std::thread;

use api::wire::{VmConsole, VmCoredumpData, VmInfoState, VmRemoveDevice, VmResize};
use api::{Command as Ask, Control, ErrorKind, EventKind, Reply, VmState, wire};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;
use vmm::machine::state::follows;

use crate::support::{LIMIT, Local, can_run, config, symbol, until};

/// Where a monitor is between two commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nothing,
    Described,
    Running,
    Paused,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Create,
    Boot,
    Pause,
    Resume,
    Reset,
    Reboot,
    Shutdown,
    Delete,
    PowerButton,
    Nmi,
    ResizeToNothing,
    RemoveUnknownDevice,
    RemoveUnknownSink,
    CoredumpToNowhere,
}

const STEPS: [Step; 14] = [
    Step::Create,
    Step::Boot,
    Step::Pause,
    Step::Resume,
    Step::Reset,
    Step::Reboot,
    Step::Shutdown,
    Step::Delete,
    Step::PowerButton,
    Step::Nmi,
    Step::ResizeToNothing,
    Step::RemoveUnknownDevice,
    Step::RemoveUnknownSink,
    Step::CoredumpToNowhere,
];

impl Step {
    fn command(self, description: &wire::VmConfig) -> Ask {
        match self {
            Self::Create => Ask::Create(Box::new(description.clone())),
            Self::Boot => Ask::Boot,
            Self::Pause => Ask::Pause,
            Self::Resume => Ask::Resume,
            Self::Reset => Ask::Reset,
            Self::Reboot => Ask::Reboot,
            Self::Shutdown => Ask::Shutdown,
            Self::Delete => Ask::Delete,
            Self::PowerButton => Ask::PowerButton,
            Self::Nmi => Ask::Nmi,
            Self::ResizeToNothing => Ask::Resize(VmResize::default()),
            Self::RemoveUnknownDevice => Ask::RemoveDevice(VmRemoveDevice {
                id: "unknown".to_owned(),
            }),
            Self::RemoveUnknownSink => Ask::Console(VmConsole::Remove("sink999".to_owned())),
            Self::CoredumpToNowhere => Ask::Coredump(VmCoredumpData {
                destination_url: "nowhere".to_owned(),
            }),
        }
    }

    /// Where it leads, or why it is refused.
    fn expected(self, now: Place) -> Result<Place, ErrorKind> {
        use ErrorKind::{Conflict, Invalid, NotFound};
        use Place::{Described, Nothing, Paused, Running};
        match (self, now) {
            (Self::Delete, _) => Ok(Nothing),
            (Self::Create, Nothing) | (Self::Shutdown, Described | Running | Paused) => {
                Ok(Described)
            }
            (Self::Create, _) => Err(Conflict),
            (_, Nothing) => Err(NotFound),
            (Self::RemoveUnknownDevice | Self::RemoveUnknownSink, _) => Err(NotFound),
            (Self::CoredumpToNowhere, Running | Paused) => Err(Invalid),
            (Self::ResizeToNothing, now) => Ok(now),
            (Self::Boot, Described)
            | (Self::Resume, Paused)
            | (Self::Reboot, Running | Paused)
            | (Self::Reset | Self::PowerButton, Running) => Ok(Running),
            (Self::Pause, Running) | (Self::Reset, Paused) => Ok(Paused),
            _ => Err(Conflict),
        }
    }
}

fn place(monitor: &Local) -> Option<Place> {
    match monitor.handle.info() {
        Err(error) => (error.kind == ErrorKind::NotFound).then_some(Place::Nothing),
        Ok(info) => match info.state {
            VmInfoState::Created => Some(Place::Described),
            VmInfoState::Running => Some(Place::Running),
            VmInfoState::Paused => Some(Place::Paused),
            _ => None,
        },
    }
}

/// Every change of state that was told is one that may be; a new description begins anew.
fn check_states(monitor: &Local) -> Result<(), TestCaseError> {
    let mut now = VmState::Created;
    for event in monitor.events() {
        match event.kind {
            EventKind::Created | EventKind::Deleted => {
                let still = matches!(now, VmState::Created | VmState::Stopped);
                prop_assert!(still, "{:?} at {:?}", event.kind, now);
                now = VmState::Created;
            }
            EventKind::State { state, .. } => {
                prop_assert!(now == state || follows(now, state), "{now:?} to {state:?}");
                now = state;
            }
            _ => (),
        }
    }
    Ok(())
}

fn live(description: &wire::VmConfig, count: u64, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut monitor = Local::idle();
    let mut now = Place::Nothing;
    for step in steps {
        if matches!((step, now), (Step::Nmi, Place::Running)) {
            // The guest would end of it.
            continue;
        }
        let expected = step.expected(now);
        let answer = monitor.ask(step.command(description));
        match &answer {
            Ok(reply) => prop_assert_eq!(reply, &Reply::Done),
            Err(error) => prop_assert!(!error.chain.is_empty()),
        }
        let kind = answer.map_err(|error| error.kind).map(|_| ());
        prop_assert_eq!(kind, expected.map(|_| ()), "{:?} at {:?}", step, now);
        now = expected.unwrap_or(now);
        prop_assert_eq!(place(&monitor), Some(now), "after {:?}", step);
        if now == Place::Running {
            let before = monitor.word(count);
            until("progress", || (monitor.word(count) != before).then_some(()));
        }
    }
    check_states(&monitor)?;
    prop_assert_eq!(monitor.ask(Ask::Quit), Ok(Reply::Done));
    monitor.outcome();
    prop_assert!(monitor.has_ended());
    Ok(())
}

fn description() -> wire::VmConfig {
    let more = json!({ "serial": "null", "devices": [{ "kind": "rng" }] });
    config("poke", "spin", more).to_wire()
}

#[test]
fn any_sequence_of_commands_is_answered_as_its_place_demands_and_leads_where_it_should() {
    if !can_run() {
        return;
    }
    let (description, count) = (description(), symbol("poke", "spin_count"));
    // Every step at every place once, whatever chance has to add.
    for way in [
        &[][..],
        &[Step::Create],
        &[Step::Create, Step::Boot],
        &[Step::Create, Step::Boot, Step::Pause],
    ] {
        for step in STEPS {
            live(&description, count, &[way, &[step]].concat()).unwrap();
        }
    }
    let steps = prop::collection::vec(prop::sample::select(&STEPS[..]), 1..24);
    let mut runner = TestRunner::new(Config {
        cases: 32,
        failure_persistence: None,
        ..Config::default()
    });
    // Of sequences that begin with nothing most never come to a machine.
    let result = runner.run(&steps, |steps| {
        live(
            &description,
            count,
            &[&[Step::Create, Step::Boot], &steps[..]].concat(),
        )
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn commanders_who_know_nothing_of_each_other_leave_a_known_state() {
    if !can_run() {
        return;
    }
    let description = description();
    let monitor = Local::idle();
    thread::scope(|scope| {
        for first in 0..4 {
            let (monitor, description) = (&monitor, &description);
            scope.spawn(move || {
                for n in 0..28 {
                    let step = STEPS[(first * 3 + n * (2 * first + 1)) % STEPS.len()];
                    if matches!(step, Step::Nmi) {
                        continue;
                    }
                    if let Err(error) = monitor.ask(step.command(description)) {
                        let known = [ErrorKind::NotFound, ErrorKind::Conflict, ErrorKind::Invalid];
                        assert!(known.contains(&error.kind), "{step:?}: {error:?}");
                    }
                }
            });
        }
    });
    assert!(place(&monitor).is_some());
    check_states(&monitor).unwrap();
    assert_eq!(monitor.ask(Ask::Delete), Ok(Reply::Done));
    assert_eq!(place(&monitor), Some(Place::Nothing));
}

#[test]
fn commands_that_came_before_a_boot_are_answered_after_it() {
    if !can_run() {
        return;
    }
    let description = description();
    let monitor = Local::idle();
    let steps = [
        Step::Create,
        Step::Boot,
        Step::Pause,
        Step::Reboot,
        Step::Pause,
        Step::Delete,
    ];
    for _ in 0..10 {
        let (sender, answers) = channel();
        for step in steps {
            let sender = sender.clone();
            let answer = Box::new(move |answer| sender.send(answer).unwrap());
            monitor.handle.submit(step.command(&description), answer);
        }
        for step in steps {
            let answer = answers.recv_timeout(LIMIT).unwrap();
            assert_eq!(answer, Ok(Reply::Done), "{step:?}");
        }
    }
}
