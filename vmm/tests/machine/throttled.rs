//! Guests that stand part of their time.

use api::{Command as Ask, Reply};
use serde_json::json;

use crate::support::{Local, can_run, config, symbol, until};

/// How many rounds are looked at.
const ROUNDS: u64 = 50;

fn counting() -> (Local, u64) {
    let machine = Local::boot(&config("poke", "spin", json!({})));
    let count = symbol("poke", "spin_count");
    until("the guest's count", || {
        (machine.word(count) > 0).then_some(())
    });
    (machine, count)
}

fn throttle(machine: &Local, percent: u8) {
    machine.machine(move |machine| machine.vcpus().throttle(percent).unwrap());
}

fn rounds(machine: &Local) -> u64 {
    machine.machine(|machine| machine.vcpus().throttle_rounds())
}

/// How far the guest counts while there are so many rounds.
fn counted(machine: &Local, count: u64) -> u64 {
    let (before, first) = (machine.word(count), rounds(machine));
    until("rounds", || {
        (rounds(machine) >= first + ROUNDS).then_some(())
    });
    machine.word(count) - before
}

fn goes_on(machine: &Local, count: u64) {
    let before = machine.word(count);
    until("progress", || (machine.word(count) > before).then_some(()));
}

#[test]
fn a_guest_does_less_in_a_round_the_longer_it_stands_and_all_again_without() {
    if !can_run() {
        return;
    }
    let (machine, count) = counting();
    throttle(&machine, 10);
    let much = counted(&machine, count);
    throttle(&machine, 90);
    let little = counted(&machine, count);
    // A ninth, if nothing else took the host's time.
    assert!(little * 2 < much, "{little} and {much}");
    throttle(&machine, 0);
    assert_eq!(machine.machine(|machine| machine.vcpus().throttled()), 0);
    let ended = rounds(&machine);
    goes_on(&machine, count);
    assert_eq!(rounds(&machine), ended);
}

#[test]
fn a_guest_that_stands_is_paused_resumed_and_ended_as_any_other() {
    if !can_run() {
        return;
    }
    let (machine, count) = counting();
    throttle(&machine, 99);
    for _ in 0..20 {
        assert_eq!(machine.ask(Ask::Pause), Ok(Reply::Done));
        let stands = machine.word(count);
        let first = rounds(&machine);
        until("a round", || (rounds(&machine) > first).then_some(()));
        assert_eq!(machine.word(count), stands);
        assert_eq!(machine.ask(Ask::Resume), Ok(Reply::Done));
        goes_on(&machine, count);
    }
    let reset = machine.ask(Ask::Reset);
    assert_eq!(reset, Ok(Reply::Done));
    goes_on(&machine, count);
    assert_eq!(machine.machine(|machine| machine.vcpus().throttled()), 99);
}
