//! Peers that keep a record of the requests that they have, for who comes after them.

use super::super::peer::RECORDS;
use super::*;

/// For a device whose peer keeps a record, and holds what it is given.
fn bench() -> (Bench, Receiver<Notice>) {
    let manner = Manner {
        hold: true,
        protocol: manner().protocol | RECORDS,
        ..manner()
    };
    let mut bench = Bench::with_peer(options(Path::new(""), ANSWER), manner);
    let notices = bench.start();
    (bench, notices)
}

/// Offers requests, and waits until the peer has taken them.
fn offer(bench: &mut Bench, numbers: std::ops::Range<u64>) -> Vec<u16> {
    let before = bench.peer.seen(|seen| seen.taken.len());
    let heads: Vec<u16> = numbers.map(|number| bench.offer(number)).collect();
    bench.driver.kick();
    let all = before + heads.len();
    bench.peer.until(|seen| seen.taken.len() == all);
    heads
}

fn serve_on(bench: &mut Bench, notices: &Receiver<Notice>, heads: &[u16]) {
    bench.peer.change(|manner| manner.hold = false);
    let mut returned: Vec<u32> = heads.iter().map(|_| bench.driver.wait(notices).0).collect();
    returned.sort_unstable();
    let mut wanted: Vec<u32> = heads.iter().copied().map(u32::from).collect();
    wanted.sort_unstable();
    assert_eq!(returned, wanted);
}

/// How often the peer has been asked for a record, and given one.
fn records(seen: &Seen) -> (usize, usize) {
    let count = |code| seen.requests.iter().filter(|seen| **seen == code).count();
    (
        count(request::GET_INFLIGHT_FD),
        count(request::SET_INFLIGHT_FD),
    )
}

/// Whether the last peer was given all of that anew, in order.
fn taken_again(bench: &Bench, heads: &[u16]) -> bool {
    bench
        .peer
        .seen(|seen| seen.taken.ends_with(&[heads, heads].concat()))
}

#[test]
fn a_successor_goes_on_with_what_was_begun_and_makes_nothing_twice() {
    let (mut bench, notices) = bench();
    let heads = offer(&mut bench, 0..4);
    // The first is done, and nobody but the record knows.
    bench.peer.change(|manner| {
        manner.hold = false;
        manner.forgets = true;
    });
    lost(&notices);
    assert!(bench.is_filled(0));
    bench.driver.put_bytes(DATA + 0x40, &[0; 32]);
    bench.peer.until(|seen| !seen.found.0.is_empty());
    let found = bench.peer.seen(|seen| seen.found.clone());
    assert_eq!(found, (heads[1..].to_vec(), heads[..1].to_vec()));
    serve_on(&mut bench, &notices, &heads);
    let bytes = bench.driver.bytes(DATA + 0x40, 32);
    assert_eq!(bytes, [0; 32], "it was made twice");
    assert!((1..4).all(|number| bench.is_filled(number)));
    let more = offer(&mut bench, 4..8);
    serve_on(&mut bench, &notices, &more);
    // None was given to it anew.
    let all = [heads, more].concat();
    assert_eq!(bench.peer.seen(|seen| seen.taken.clone()), all);
    assert_eq!(bench.peer.seen(records), (1, 2));
    assert_eq!(bench.stop().parked, [0_u16; 0]);
}

#[test]
fn a_record_waits_for_a_successor_as_often_as_something_comes_of_it() {
    let (mut bench, notices) = bench();
    let mut all = Vec::new();
    for round in 1..4 {
        let heads = offer(&mut bench, 0..3);
        bench.peer.die();
        lost(&notices);
        // It is looked for meanwhile.
        let more = bench.offer(3);
        bench.driver.kick_and_wait();
        bench.peer.listen();
        bench.peer.until(|seen| seen.taken.len() == 4 * round);
        let found = bench.peer.seen(|seen| seen.found.0.clone());
        assert!(found.ends_with(&heads) && found.len() == 3 * round);
        all.extend([heads.as_slice(), &[more]].concat());
        serve_on(&mut bench, &notices, &all[4 * (round - 1)..]);
        bench.peer.change(|manner| manner.hold = true);
    }
    assert_eq!(bench.peer.seen(|seen| seen.taken.clone()), all);
    assert_eq!(bench.peer.seen(records), (1, 4));
}

#[test]
fn a_successor_without_a_record_is_given_everything_anew() {
    let (mut bench, notices) = bench();
    let heads = offer(&mut bench, 0..3);
    bench.peer.die();
    lost(&notices);
    bench.peer.change(|manner| manner.protocol &= !RECORDS);
    bench.peer.listen();
    serve_on(&mut bench, &notices, &heads);
    assert!(taken_again(&bench, &heads));
    assert_eq!(bench.peer.seen(records), (1, 1));
}

#[test]
fn a_record_that_its_heir_ends_with_is_not_handed_on() {
    let (mut bench, notices) = bench();
    let heads = offer(&mut bench, 0..3);
    bench.peer.die();
    lost(&notices);
    bench.peer.change(|manner| manner.chokes = true);
    bench.peer.listen();
    serve_on(&mut bench, &notices, &heads);
    assert!(taken_again(&bench, &heads));
    assert_eq!(bench.peer.seen(|seen| seen.found.0.clone()), heads);
    assert_eq!(bench.peer.seen(records), (2, 3));
}

#[test]
fn a_record_of_a_peer_that_is_sent_away_is_not_handed_on() {
    let (mut bench, notices) = bench();
    let heads = offer(&mut bench, 0..3);
    bench.peer.until_noted();
    bench.peer.note(&[0xff; 12]);
    lost(&notices);
    bench.peer.until(|seen| seen.taken.len() == 6);
    serve_on(&mut bench, &notices, &heads);
    assert!(taken_again(&bench, &heads));
    assert_eq!(bench.peer.seen(|seen| seen.found.0.len()), 0);
}

#[test]
fn what_is_in_memory_that_has_changed_is_checked_and_given_anew() {
    let (mut bench, notices) = bench();
    let heads = offer(&mut bench, 0..3);
    bench.peer.die();
    lost(&notices);
    let more = std::sync::Arc::new(region(16 * SEAM, SEAM));
    let map = bench.memory.memory().insert_region(more).unwrap();
    bench.memory.replace(map);
    bench.peer.listen();
    serve_on(&mut bench, &notices, &heads);
    assert!(taken_again(&bench, &heads));
    assert_eq!(bench.peer.seen(|seen| seen.found.0.len()), 0);
}

#[test]
fn a_stop_takes_from_a_dead_peer_what_is_in_its_record() {
    let (mut bench, notices) = bench();
    let heads = offer(&mut bench, 0..3);
    bench.peer.die();
    lost(&notices);
    let queue = bench.stop();
    assert_eq!(queue.parked, heads);
    bench.peer.listen();
    let notices = bench.start_with(Driver::reactivate(queue));
    serve_on(&mut bench, &notices, &heads);
    assert!(taken_again(&bench, &heads));
    assert_eq!(bench.peer.seen(records), (2, 2));
}

#[test]
fn a_record_of_which_only_the_length_is_told_holds_what_was_asked_for() {
    let manner = Manner {
        hold: true,
        protocol: manner().protocol | RECORDS,
        describes: Some((64, 64, 0, 0)),
        ..manner()
    };
    let mut bench = Bench::with_peer(options(Path::new(""), ANSWER), manner);
    let notices = bench.start();
    let heads = offer(&mut bench, 0..3);
    bench.peer.die();
    lost(&notices);
    bench.peer.listen();
    bench.peer.until(|seen| seen.found.0.len() == 3);
    serve_on(&mut bench, &notices, &heads);
    assert_eq!(bench.peer.seen(|seen| seen.taken.clone()), heads);
}

#[test]
fn a_record_that_cannot_be_is_refused() {
    for described in [
        (0, 64, 1, SIZE),
        (64, 64, 2, SIZE),
        (64, 64, 0, SIZE),
        (64, 64, 1, 0),
        (0, 64, 0, 0),
        (64, 64, 1, SIZE + 1),
        (u64::MAX, 64, 1, SIZE),
        (64, u64::MAX, 1, SIZE),
        (64, 1 << 63, 1, SIZE),
    ] {
        let options = options(Path::new(""), ANSWER);
        let manner = Manner {
            protocol: manner().protocol | RECORDS,
            describes: Some(described),
            ..manner()
        };
        let mut bench = Bench::with_peer(options, manner);
        let notices = bench.start();
        let reason = lost(&notices);
        assert!(
            reason.contains("a record of its requests that cannot be"),
            "{reason}"
        );
        bench.peer.change(|manner| manner.describes = None);
        let head = bench.offer(0);
        bench.driver.kick();
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    }
}

#[test]
fn a_record_that_is_no_memory_or_longer_than_its_file_is_refused() {
    for (on_disk, described) in [
        (true, (64, 64, 1, SIZE)),
        (false, (65, 64, 1, SIZE)),
        (false, (64, 65, 1, SIZE)),
        (false, (1 << 20, 0, 1, SIZE)),
    ] {
        let manner = Manner {
            protocol: manner().protocol | RECORDS,
            describes: Some(described),
            on_disk,
            ..manner()
        };
        let mut bench = Bench::with_peer(options(Path::new(""), ANSWER), manner);
        let notices = bench.start();
        let reason = lost(&notices);
        assert!(reason.contains("which must be memory"), "{reason}");
        bench.peer.change(|manner| {
            manner.describes = None;
            manner.on_disk = false;
        });
        let head = bench.offer(0);
        bench.driver.kick();
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    }
}

#[test]
fn a_successor_is_kicked_for_queues_of_which_its_predecessor_had_nothing_and_wanted_no_kicks() {
    let (mut bench, notices) = bench();
    // The flags of the used ring.
    bench.peer.change(|manner| {
        manner.hold = false;
        manner.scribbles = Some((true, 0, 1));
    });
    let heads = offer(&mut bench, 0..1);
    serve_on(&mut bench, &notices, &heads);
    bench.peer.die();
    lost(&notices);
    bench.peer.change(|manner| manner.scribbles = None);
    bench.peer.listen();
    let code = request::SET_VRING_ENABLE;
    let enabled = |seen: &Seen| seen.requests.iter().filter(|seen| **seen == code).count();
    bench.peer.until(|seen| enabled(seen) == 2);
    bench.driver.kick_and_wait();
    let more = offer(&mut bench, 1..3);
    serve_on(&mut bench, &notices, &more);
    assert_eq!(bench.peer.seen(records), (1, 2));
}

#[test]
fn rings_that_a_dead_peer_has_scribbled_in_are_not_handed_on() {
    for scribbles in [
        // What is offered, and how much.
        (false, 4, 9),
        (false, 2, 40),
        (false, 2, 2),
    ] {
        let (mut bench, notices) = bench();
        bench
            .peer
            .change(|manner| manner.scribbles = Some(scribbles));
        let heads: Vec<u16> = (0..3).map(|number| bench.offer(number)).collect();
        bench.driver.kick();
        bench.peer.until(|seen| seen.taken.len() == 3);
        bench.peer.die();
        lost(&notices);
        bench.peer.change(|manner| manner.scribbles = None);
        bench.peer.listen();
        serve_on(&mut bench, &notices, &heads);
        assert!(taken_again(&bench, &heads), "{scribbles:?}");
        let found = bench.peer.seen(|seen| seen.found.0.len());
        assert_eq!(found, 0, "{scribbles:?}");
    }
}

#[test]
fn a_record_that_is_no_file_or_not_wanted_back_loses_the_peer() {
    for code in [request::GET_INFLIGHT_FD, request::SET_INFLIGHT_FD] {
        let numbers = [64_u64, 0, 1 | u64::from(SIZE) << 16];
        let numbers: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
        for lie in [
            Lie::HangUp,
            Lie::Silence,
            Lie::Bytes(reply(code, &numbers)),
            Lie::Bytes(reply(code, &1_u64.to_ne_bytes())),
        ] {
            let mut manner = manner();
            manner.protocol |= RECORDS;
            manner.lies.insert(code, lie);
            let options = options(Path::new(""), Duration::from_millis(300));
            let mut bench = Bench::with_peer(options, manner);
            let notices = bench.start();
            let head = bench.offer(0);
            bench.driver.kick();
            lost(&notices);
            bench.peer.change(|manner| manner.lies.clear());
            assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
        }
    }
}

#[test]
fn requests_that_are_answered_for_the_dead_are_not_recorded() {
    let options = PeerOptions {
        epitaph: Some(|said| said.to_vec()),
        ..options(Path::new(""), ANSWER)
    };
    let manner = Manner {
        protocol: manner().protocol | RECORDS,
        ..manner()
    };
    let mut bench = Bench::with_peer(options, manner);
    let notices = bench.start();
    let head = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    assert_eq!(bench.peer.seen(records), (0, 0));
}
