use super::*;

const MIB: u64 = 1 << 20;

/// A guest with so much memory that writes over so much of it, and a wire.
struct Guest {
    ram: u64,
    /// Bytes that it writes over and over.
    set: u64,
    /// Bytes a second that it dirties.
    writes: u64,
    /// Bytes a second of the wire.
    wire: u64,
}

/// Rounds until the decision is none to go on: that, when, how many rounds, and the throttle.
fn run(policy: &mut Policy, guest: &Guest) -> (Decision, Duration, u32, u8) {
    let mut now = Duration::ZERO;
    let mut rest = guest.ram;
    for number in 1..10_000 {
        let took = Duration::from_secs_f64(rest as f64 / guest.wire as f64);
        now += took;
        let speed = f64::from(100 - policy.throttle()) / 100.0;
        let written = whole(guest.writes as f64 * speed * took.as_secs_f64());
        let dirty = written.min(guest.set).div_ceil(4096);
        let round = Round {
            number,
            memory: rest,
            sent: rest,
            took,
            dirty,
            page: 4096,
            state: 64 << 10,
        };
        match policy.on_round(now, &round) {
            Decision::Continue | Decision::Throttle(_) => rest = dirty * 4096,
            decision => return (decision, now, number, policy.throttle()),
        }
    }
    panic!("it never ends");
}

fn guest(writes: u64) -> Guest {
    Guest {
        ram: 1024 * MIB,
        set: 512 * MIB,
        writes: writes * MIB,
        wire: 1000 * MIB,
    }
}

fn policy(parameters: Parameters) -> Policy {
    Policy::new(parameters, 1024 * MIB, Duration::ZERO)
}

#[test]
fn an_idle_guest_switches_after_one_round() {
    let mut policy = policy(Parameters::default());
    let (decision, _, rounds, throttle) = run(&mut policy, &guest(0));
    assert_eq!((decision, rounds, throttle), (Decision::SwitchOver, 1, 0));
}

#[test]
fn a_guest_that_writes_slowly_switches_within_the_limit_without_being_slowed() {
    let parameters = Parameters {
        downtime: Duration::from_millis(5),
        ..Parameters::default()
    };
    let mut policy = policy(parameters);
    let (decision, _, rounds, throttle) = run(&mut policy, &guest(50));
    assert_eq!((decision, throttle), (Decision::SwitchOver, 0));
    assert!(rounds <= 4, "{rounds}");
    assert!(policy.expected_downtime().unwrap() <= Duration::from_millis(5));
    assert!((990 * MIB..1010 * MIB).contains(&policy.rate()));
    assert!((49 * MIB..51 * MIB).contains(&policy.dirty_rate()));
}

#[test]
fn a_rest_that_fits_and_shrinks_goes_in_further_rounds_until_it_is_short() {
    // 52 ms of bytes are left of the first round, and 300 would do.
    let mut slow = policy(Parameters::default());
    let (decision, now, rounds, _) = run(&mut slow, &guest(50));
    assert_eq!((decision, rounds), (Decision::SwitchOver, 3));
    assert!(slow.expected_downtime().unwrap() <= FIXED + SHORT);
    assert!(now <= Duration::from_millis(1024 + 60));
    // One that does not shrink by half is not sent again and again.
    let mut fast = policy(Parameters::default());
    let guest = Guest {
        set: 250 * MIB,
        ..guest(900)
    };
    let (decision, _, rounds, throttle) = run(&mut fast, &guest);
    assert_eq!((decision, rounds, throttle), (Decision::SwitchOver, 2, 0));
}

#[test]
fn a_limit_close_to_what_a_switch_costs_is_tried_again_however_often_it_was_passed() {
    let parameters = Parameters {
        downtime: Duration::from_millis(5),
        ..Parameters::default()
    };
    let mut policy = policy(parameters);
    for _ in 0..20 {
        policy.pause_passed();
    }
    let quiet = guest(1);
    let (decision, _, rounds, _) = run(&mut policy, &quiet);
    assert_eq!(decision, Decision::SwitchOver);
    assert!(rounds <= 4, "{rounds}");
}

#[test]
fn a_guest_that_writes_faster_than_the_wire_is_slowed_by_steps_until_it_fits() {
    let mut policy = policy(Parameters::default());
    let round = Round {
        number: 1,
        memory: 1024 * MIB,
        sent: 1024 * MIB,
        took: Duration::from_secs(1),
        dirty: 512 * MIB / 4096,
        page: 4096,
        state: 0,
    };
    let mut seen = Vec::new();
    for second in 1..20 {
        match policy.on_round(Duration::from_secs(second), &round) {
            Decision::Throttle(percent) => seen.push(percent),
            decision => assert_eq!(decision, Decision::Continue),
        }
    }
    assert_eq!(seen, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
    let mut fresh = self::policy(Parameters::default());
    let (decision, _, _, throttle) = run(&mut fresh, &guest(3000));
    assert_eq!(decision, Decision::SwitchOver);
    assert!(throttle >= 50, "{throttle}");
}

#[test]
fn without_throttling_time_decides_as_the_strategy_says() {
    let mut parameters = Parameters {
        throttle: None,
        timeout: Some(Duration::from_secs(30)),
        ..Parameters::default()
    };
    let timeout = AbortReason::Timeout(Duration::from_secs(30));
    let cases = [
        (
            Strategy::Cancel,
            PostcopyRule::Never,
            Decision::Abort(timeout),
        ),
        (Strategy::Ignore, PostcopyRule::Never, Decision::SwitchOver),
        (
            Strategy::Cancel,
            PostcopyRule::AtTimeout,
            Decision::SwitchToPostcopy,
        ),
    ];
    for (strategy, postcopy, expected) in cases {
        (parameters.strategy, parameters.postcopy) = (strategy, postcopy);
        let (decision, now, _, _) = run(&mut policy(parameters.clone()), &guest(3000));
        assert_eq!(decision, expected);
        assert!(now >= Duration::from_secs(30) && now < Duration::from_secs(32));
    }
}

#[test]
fn post_copy_comes_after_its_rounds_or_when_it_is_asked_for() {
    let parameters = Parameters {
        postcopy: PostcopyRule::AfterRounds(3),
        ..Parameters::default()
    };
    let (decision, _, rounds, _) = run(&mut policy(parameters), &guest(3000));
    assert_eq!((decision, rounds), (Decision::SwitchToPostcopy, 3));
    let mut asked = policy(Parameters::default());
    asked.want_postcopy();
    let (decision, _, rounds, _) = run(&mut asked, &guest(3000));
    assert_eq!((decision, rounds), (Decision::SwitchToPostcopy, 1));
}

#[test]
fn the_preset_of_data_centres_has_their_figures() {
    let parameters = Parameters::preset("datacentre").unwrap();
    assert_eq!(parameters.bandwidth, Some(52 << 20));
    assert_eq!(parameters.total(GIB), Some(Duration::from_secs(64)));
    assert_eq!(parameters.total(8 * GIB), Some(Duration::from_secs(512)));
    assert_eq!(parameters.total(GIB / 4), Some(Duration::from_secs(64)));
    let mut policy = Policy::new(parameters, 64 * GIB, Duration::ZERO);
    let slow = Guest {
        ram: GIB,
        set: 900 * MIB,
        writes: 50_000 * MIB,
        wire: 52 * MIB,
    };
    // A guest that writes so much cannot be slowed enough.
    let (decision, now, _, throttle) = run(&mut policy, &slow);
    let stalled = AbortReason::Stalled(Duration::from_secs(240));
    assert_eq!((decision, throttle), (Decision::Abort(stalled), 99));
    assert!(now > Duration::from_secs(240));
    assert!(
        PRESETS
            .iter()
            .all(|(name, _)| Parameters::preset(name).is_some())
    );
    assert_eq!(Parameters::preset("slow"), None);
}

#[test]
fn time_decides_between_rounds_too() {
    let mut policy = policy(Parameters::preset("datacentre").unwrap());
    assert_eq!(policy.check(Duration::from_secs(63)), None);
    let timeout = AbortReason::Timeout(Duration::from_secs(64));
    assert_eq!(
        policy.check(Duration::from_secs(64)),
        Some(Decision::Abort(timeout))
    );
    policy.set(Parameters {
        timeout: Some(Duration::from_secs(100)),
        ..Parameters::default()
    });
    assert_eq!(policy.check(Duration::from_secs(64)), None);
}

#[test]
fn after_a_pause_that_was_too_long_less_has_to_be_left() {
    let mut policy = policy(Parameters::default());
    let round = |dirty: u64| Round {
        number: 2,
        memory: 100 * MIB,
        sent: 100 * MIB,
        took: Duration::from_millis(100),
        dirty: dirty * MIB / 4096,
        page: 4096,
        state: 0,
    };
    let now = Duration::from_secs(1);
    assert_eq!(policy.on_round(now, &round(200)), Decision::SwitchOver);
    policy.pause_passed();
    assert_ne!(policy.on_round(now, &round(200)), Decision::SwitchOver);
    assert_eq!(policy.on_round(now, &round(100)), Decision::SwitchOver);
}

#[test]
fn a_round_of_no_time_or_no_bytes_decides_nothing_wrong() {
    let mut policy = policy(Parameters::default());
    let round = Round {
        number: 1,
        memory: 0,
        sent: 0,
        took: Duration::ZERO,
        dirty: u64::MAX,
        page: u64::MAX,
        state: u64::MAX,
    };
    let decision = policy.on_round(Duration::ZERO, &round);
    assert_ne!(decision, Decision::SwitchOver);
    assert_eq!(policy.expected_downtime(), None);
    let slow = Round {
        memory: 1,
        took: Duration::MAX,
        ..round
    };
    assert_ne!(policy.on_round(Duration::ZERO, &slow), Decision::SwitchOver);
}

#[test]
fn rounds_of_nothing_neither_slow_the_wire_nor_go_on_for_ever() {
    let mut policy = policy(Parameters {
        downtime: Duration::from_millis(1),
        ..Parameters::default()
    });
    let second = Duration::from_secs(1);
    let round = |number, pages: u64, dirty| Round {
        number,
        memory: pages * 4096,
        // The end of a round.
        sent: pages * 4096 + 24,
        took: second / 20,
        dirty,
        page: 4096,
        state: 64 << 10,
    };
    policy.on_round(second, &round(1, 1 << 14, 1));
    let expected = policy.expected_downtime();
    policy.pause_passed();
    // The guest runs here again, and writes nothing: the limit is not kept by what was measured.
    for number in 2..10 {
        let decision = policy.on_round(second * number, &round(number, 0, 0));
        assert_eq!(decision, Decision::Continue);
        assert!(policy.expected_downtime() <= expected);
    }
    policy.set(Parameters::default());
    let decision = policy.on_round(second * 10, &round(10, 0, 0));
    assert_eq!(decision, Decision::SwitchOver);
    // Nor where little goes slowly.
    let mut slow = self::policy(Parameters::default());
    let some = Round {
        took: second * 60,
        ..round(1, 2, 0)
    };
    assert_eq!(slow.on_round(second * 60, &some), Decision::SwitchOver);
}
