//! A machine's life through the control interface, in this process.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use api::{Command as Ask, ErrorKind, Event, EventKind, ExitReason, PauseReason, Reply, VmState};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use vmm::machine::inbox::Mailbox;

use crate::support::{Collected, Local, can_run, config, exit, symbol, until};

fn disk(mib: u64) -> tempfile::NamedTempFile {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(mib << 20).unwrap();
    disk
}

fn blk(disk: &tempfile::NamedTempFile, more: Value) -> Value {
    let mut whole = json!({ "path": disk.path() });
    whole
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    json!({ "kind": "blk", "config": whole })
}

fn state(state: VmState) -> EventKind {
    EventKind::State {
        state,
        pause: reason(state),
    }
}

/// Why a machine that only commands have paused is in this state.
fn reason(state: VmState) -> Option<PauseReason> {
    (state == VmState::Paused).then_some(PauseReason::Command)
}

/// A command of a random sequence.
#[derive(Clone, Copy, Debug)]
enum Step {
    Pause,
    Resume,
    Reset,
    PowerButton,
    Boot,
    Create,
}

impl Step {
    fn command(self) -> Ask {
        match self {
            Self::Pause => Ask::Pause,
            Self::Resume => Ask::Resume,
            Self::Reset => Ask::Reset,
            Self::PowerButton => Ask::PowerButton,
            Self::Boot => Ask::Boot,
            Self::Create => Ask::Create(Box::default()),
        }
    }

    /// Whether it succeeds, where it leads, and what is published then.
    fn expected(self, now: VmState) -> (bool, VmState, Vec<EventKind>) {
        use VmState::{Booting, Paused, Running};
        match (self, now) {
            (Self::Pause, Running) => (true, Paused, vec![state(Paused)]),
            (Self::Resume, Paused) => (true, Running, vec![state(Running)]),
            (Self::Reset, _) => (
                true,
                now,
                vec![EventKind::Reset, state(Booting), state(now)],
            ),
            (Self::PowerButton, Running) => (true, now, vec![EventKind::PowerButton]),
            _ => (false, now, vec![]),
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = prop_oneof![
        3 => Just(Step::Pause),
        3 => Just(Step::Resume),
        2 => Just(Step::Reset),
        1 => Just(Step::PowerButton),
        1 => Just(Step::Boot),
        1 => Just(Step::Create),
    ];
    prop::collection::vec(one, 1..16)
}

/// Events have numbers one after the other and rising times; their kinds are returned.
fn kinds(events: impl Iterator<Item = Event>) -> Vec<EventKind> {
    let mut before = 0;
    let mut last = None;
    events
        .map(|event| {
            assert_eq!(event.id, last.map_or(event.id, |last: u64| last + 1));
            last = Some(event.id);
            assert!(event.at_us >= before);
            before = event.at_us;
            event.kind
        })
        .collect()
}

#[test]
fn any_sequence_of_commands_leaves_a_machine_in_a_known_state() {
    if !can_run() {
        return;
    }
    let count = symbol("poke", "spin_count");
    let disk = disk(1);
    let plain =
        json!({ "cpus": { "boot": 2 }, "devices": [blk(&disk, json!({})), {"kind": "rng"}] });
    let configuration = config("poke", "spin", plain);
    let mut runner = TestRunner::new(Config {
        cases: 24,
        failure_persistence: None,
        ..Config::default()
    });
    let result = runner.run(&steps(), |steps| {
        let mut machine = Local::boot(&configuration);
        let mut now = VmState::Running;
        let mut published = vec![state(VmState::Booting), state(VmState::Running)];
        for step in steps {
            let (succeeds, next, events) = step.expected(now);
            match machine.ask(step.command()) {
                Ok(reply) => prop_assert!(succeeds && reply == Reply::Done, "{:?}", step),
                Err(error) => {
                    prop_assert!(!succeeds, "{:?}: {}", step, error);
                    prop_assert_eq!(error.kind, ErrorKind::Conflict);
                }
            }
            published.extend(events);
            now = next;
            prop_assert_eq!(machine.state(), (now, reason(now)));
            if now == VmState::Running {
                let before = machine.word(count);
                until("progress", || (machine.word(count) != before).then_some(()));
            } else {
                let before = machine.word(count);
                prop_assert_eq!(machine.word(count), before);
            }
        }
        prop_assert_eq!(machine.ask(Ask::Quit), Ok(Reply::Done));
        prop_assert_eq!(machine.outcome().reason, ExitReason::Stopped);
        let reason = ExitReason::Stopped;
        published.extend([
            state(VmState::ShuttingDown),
            state(VmState::Stopped),
            exit(reason),
        ]);
        prop_assert_eq!(kinds(machine.events().into_iter()), published);
        prop_assert!(machine.has_ended());
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Pauses and resumes (and resets, `resets` times) until told to stop; in
/// between, the guest gets some time.
fn disturb(machine: &Mailbox, resets: usize, enough: &AtomicBool) -> usize {
    let mut pauses = 0;
    let mut left = resets;
    while !enough.load(Ordering::Acquire) {
        let paused = machine.call(Ask::Pause);
        if left > 0 && pauses % 4 == 3 && paused == Ok(Reply::Done) {
            left -= 1;
            // The guest's own end may come first.
            let _ = machine.call(Ask::Reset);
        }
        match (paused, machine.call(Ask::Resume)) {
            (Ok(Reply::Done), Ok(Reply::Done)) => pauses += 1,
            // The guest has come to its end.
            (_, Err(_)) => return pauses,
            other => panic!("{other:?}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
    pauses
}

#[test]
fn a_disk_in_use_bears_pauses_and_resets() {
    if !can_run() {
        return;
    }
    let engines = [
        json!({ "aio": "io_uring", "num_queues": 2 }),
        json!({ "aio": "threads" }),
    ];
    for (engine, resets) in engines.into_iter().zip([2, 2]) {
        let disk = disk(16);
        let dir = tempfile::tempdir().unwrap();
        let serial = dir.path().join("serial");
        let more = json!({ "devices": [blk(&disk, engine)], "serial": { "file": serial } });
        let mut machine = Local::boot(&config("blk", "verify indirect event-idx", more));
        let enough = AtomicBool::new(false);
        let pauses = disturb(&machine.mailbox, resets, &enough);
        let outcome = machine.outcome();
        let text = std::fs::read_to_string(&serial).unwrap();
        assert_eq!(outcome.reason, ExitReason::PowerOff, "{text}");
        assert!(text.contains("verify=ok"), "{text}");
        assert!(!text.contains("error="), "{text}");
        assert!(pauses > 4, "{pauses} pauses are too few to tell");
    }
}

#[test]
fn nothing_typed_or_printed_is_lost_over_pauses() {
    if !can_run() {
        return;
    }
    for word in ["serial-echo", "serial-echo-irq"] {
        let machine = Local::boot(&config("poke", word, json!({ "serial": "pty" })));
        let pty = OpenOptions::new()
            .read(true)
            .write(true)
            .open(machine.pty())
            .unwrap();
        let mut screen = Collected::from(pty.try_clone().unwrap());
        screen.wait_for("echo=ready");
        let lines: Vec<String> = (0..300).map(|n| format!("{n:050}")).collect();
        let typed = format!("{}\rq\r", lines.join("\r"));
        let enough = AtomicBool::new(false);
        let text = thread::scope(|scope| {
            scope.spawn(|| (&pty).write_all(typed.as_bytes()).unwrap());
            let disturber = scope.spawn(|| disturb(&machine.mailbox, 0, &enough));
            let text = screen.wait_for("echo:q");
            enough.store(true, Ordering::Release);
            assert!(disturber.join().unwrap() > 0);
            text
        });
        let echoed: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim_end().strip_prefix("echo:"))
            .collect();
        assert!(
            echoed.iter().eq(lines.iter().chain([&"q".to_owned()])),
            "{word}"
        );
    }
}

#[test]
fn what_is_typed_at_a_paused_machine_waits() {
    if !can_run() {
        return;
    }
    let machine = Local::boot(&config("poke", "serial-echo", json!({ "serial": "pty" })));
    let pty = OpenOptions::new()
        .read(true)
        .write(true)
        .open(machine.pty())
        .unwrap();
    let mut screen = Collected::from(pty.try_clone().unwrap());
    screen.wait_for("echo=ready");
    machine.ask(Ask::Pause).unwrap();
    let before = machine.machine(|machine| machine.save_units().unwrap());
    (&pty).write_all(b"while paused\r").unwrap();
    let watched = Instant::now() + Duration::from_millis(300);
    while Instant::now() < watched {
        let after = machine.machine(|machine| machine.save_units().unwrap());
        assert_eq!(before, after);
    }
    machine.ask(Ask::Resume).unwrap();
    screen.wait_for("echo:while paused");
}

#[test]
fn many_commanders_all_get_their_answers() {
    if !can_run() {
        return;
    }
    let disk = disk(4);
    let more = json!({ "devices": [blk(&disk, json!({}))] });
    let cmdline = "bench=read count=1000000000 depth=8";
    let mut machine = Local::boot(&config("blk", cmdline, more));
    let steps = [Step::Pause, Step::Resume, Step::Reset, Step::PowerButton];
    thread::scope(|scope| {
        for first in 0..4 {
            let machine = &machine;
            let steps = &steps;
            scope.spawn(move || {
                for n in 0..20 {
                    // Others may just have done the same.
                    if let Err(error) = machine.ask(steps[(first + n) % 4].command()) {
                        assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
                    }
                }
            });
        }
    });
    // Those that come too late are told so.
    let answers: Vec<_> = thread::scope(|scope| {
        let callers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| machine.ask(Ask::Quit)))
            .collect();
        callers.into_iter().map(|c| c.join().unwrap()).collect()
    });
    assert!(answers.contains(&Ok(Reply::Done)), "{answers:?}");
    for answer in answers {
        if let Err(error) = answer {
            assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
        }
    }
    assert_eq!(machine.outcome().reason, ExitReason::Stopped);
}

#[test]
fn a_stop_is_answered_when_the_machine_has_stopped() {
    if !can_run() {
        return;
    }
    for first in [Step::PowerButton, Step::Pause] {
        let machine = Local::boot(&config("poke", "spin", json!({})));
        machine.ask(first.command()).unwrap();
        assert_eq!(machine.ask(Ask::Quit), Ok(Reply::Done));
        let last = kinds(machine.events().into_iter()).pop();
        let reason = ExitReason::Stopped;
        assert_eq!(last, Some(exit(reason)));
    }
}

#[test]
fn guests_that_reset_themselves_start_in_a_fresh_machine() {
    if !can_run() {
        return;
    }
    for way in ["i8042", "cf9", "triple"] {
        let dir = tempfile::tempdir().unwrap();
        let serial = dir.path().join("serial");
        let more = json!({ "serial": { "file": serial }, "cpus": { "boot": 3 } });
        let words = format!("reboot-count={way}");
        let mut machine = Local::boot(&config("poke", &words, more));
        let outcome = machine.outcome();
        let text = std::fs::read_to_string(&serial).unwrap();
        let mut events = kinds(machine.events().into_iter());
        events.retain(|event| !matches!(event, EventKind::ConsoleSinkAdded { .. }));
        if way == "triple" {
            assert_eq!(outcome.reason, ExitReason::TripleFault);
            continue;
        }
        assert_eq!(outcome.reason, ExitReason::PowerOff, "{text}");
        assert!(text.contains("rebooted=2"), "{text}");
        let round = [
            EventKind::GuestReset,
            state(VmState::Booting),
            state(VmState::Running),
        ];
        let reason = ExitReason::PowerOff;
        let end = [
            state(VmState::ShuttingDown),
            state(VmState::Stopped),
            exit(reason),
        ];
        let want: Vec<_> = [&round[1..], &round, &round, &end].concat();
        assert_eq!(events, want);
    }
}

#[test]
fn the_ways_in_which_guests_end_are_told() {
    if !can_run() {
        return;
    }
    for (word, reason, panicked) in [
        ("poweroff", ExitReason::PowerOff, false),
        ("panic", ExitReason::GuestPanic, true),
        ("triple", ExitReason::TripleFault, false),
    ] {
        let mut machine = Local::boot(&config("poke", word, json!({})));
        let outcome = machine.outcome();
        assert_eq!(outcome.reason, reason);
        let detail = outcome.detail;
        // A panic says no more than that it was one.
        assert_eq!(detail.is_some(), reason == ExitReason::TripleFault);
        let place =
            detail.is_some_and(|d| d.starts_with("vCPU 0 shut down after a triple fault ("));
        assert_eq!(place, reason == ExitReason::TripleFault);
        let events = kinds(machine.events().into_iter());
        assert_eq!(events.contains(&EventKind::GuestPanic), panicked);
        let ended = events
            .last()
            .is_some_and(|last| matches!(last, EventKind::Exit { reason: r, .. } if *r == reason));
        assert!(ended);
    }
}

/// The vCPU that reports a panic goes no further, however long the control
/// thread takes to hear of it: what it would have done next is not taken for
/// the cause.
#[test]
fn a_guest_that_reports_a_panic_does_not_get_to_its_triple_fault() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    // Reading the clock gives the control thread time to go deaf.
    let words = format!("{}panic triple", "rtc ".repeat(20));
    let mut machine = Local::boot(&config(
        "poke",
        &words,
        json!({ "serial": { "file": serial } }),
    ));
    machine.machine(|machine| {
        // Only idle vCPUs answer.
        until("the vCPU's wait", || machine.vcpus().ask(0, |_| ()));
    });
    assert_eq!(machine.outcome().reason, ExitReason::GuestPanic);
    let text = std::fs::read_to_string(&serial).unwrap();
    assert_eq!(text.lines().last(), Some("panic=event"), "{text}");
}

/// The guest is stopped between the two halves of accesses to devices again
/// and again, and each time restarted at its first instruction.
#[test]
fn a_reset_amid_accesses_to_devices_starts_at_the_first_instruction() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let more = json!({ "serial": { "file": serial } });
    // pci reads ECAM, which is memory; a finished guest stays.
    let mut machine = Local::boot(&config("pci", "stay", more));
    for _ in 0..60 {
        assert_eq!(machine.ask(Ask::Reset), Ok(Reply::Done));
        thread::sleep(Duration::from_micros(700));
    }
    until("a whole run of the guest", || {
        let text = std::fs::read_to_string(&serial).unwrap();
        text.contains("agree=yes").then_some(())
    });
    assert_eq!(machine.ask(Ask::Quit), Ok(Reply::Done));
    assert_eq!(machine.outcome().reason, ExitReason::Stopped);
}
