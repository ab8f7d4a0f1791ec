//! Peers that are given buffers, and keep them until there is something to put in.

use super::*;

fn bench() -> Bench {
    Bench::of(PeerOptions {
        nature: Nature::Buffers,
        ..options(Path::new(""), ANSWER)
    })
}

/// What is heard of the peer's presence: its report, then the change of configuration space.
fn presence(notices: &Receiver<Notice>) -> PeerReport {
    let mut report = None;
    loop {
        match (notices.recv_timeout(PATIENCE).unwrap(), report.take()) {
            (Notice::Peer(heard), None) => report = Some(heard),
            (Notice::Config, Some(report)) => return report,
            (Notice::Queue(_), before) => report = before,
            (other, _) => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_stop_does_not_wait_for_buffers_and_gives_them_back_in_order() {
    let mut bench = bench();
    let notices = bench.start();
    bench.peer.change(|manner| manner.hold = true);
    let heads: Vec<u16> = (0..5).map(|number| bench.offer(number)).collect();
    bench.driver.kick();
    bench.peer.until(|seen| seen.taken.len() == 5);
    let queue = bench.stop();
    drop(notices);
    assert_eq!(queue.parked, heads);
    assert_eq!(bench.driver.used_index(), 0);
    bench.peer.change(|manner| manner.hold = false);
    let notices = bench.start_with(Driver::reactivate(queue));
    for (number, head) in (0..5).zip(heads) {
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
        assert!(bench.is_filled(number));
    }
    assert_eq!(bench.peer.seen(|seen| seen.connections), 1);
}

#[test]
fn what_a_peer_fills_before_it_has_stopped_is_the_drivers() {
    let mut bench = bench();
    let notices = bench.start();
    let filled = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(filled));
    bench.peer.change(|manner| manner.hold = true);
    let kept = bench.offer(1);
    bench.driver.kick();
    bench.peer.until(|seen| seen.taken.len() == 2);
    let queue = bench.stop();
    assert_eq!(queue.parked, [kept]);
    assert_eq!(bench.driver.used_index(), 1);
}

#[test]
fn the_driver_is_told_when_the_peer_goes_and_comes() {
    let mut bench = bench();
    let notices = bench.start();
    bench
        .peer
        .until(|seen| seen.requests.contains(&request::SET_VRING_ENABLE));
    assert!(bench.front.is_connected());
    bench.peer.die();
    assert!(matches!(presence(&notices), PeerReport::Lost { .. }));
    assert!(!bench.front.is_connected());
    bench.peer.listen();
    assert_eq!(presence(&notices), PeerReport::Connected);
    assert!(bench.front.is_connected());
    let head = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
}

#[test]
fn a_peer_that_dies_lies_or_hangs_gets_its_buffers_again() {
    for (code, lie) in [
        (request::SET_MEM_TABLE, Lie::HangUp),
        (request::SET_VRING_ADDR, Lie::Silence),
        (
            request::SET_VRING_ENABLE,
            Lie::Bytes(reply(request::SET_VRING_ENABLE, &1_u64.to_ne_bytes())),
        ),
    ] {
        let mut bench = Bench::of(PeerOptions {
            nature: Nature::Buffers,
            ..options(Path::new(""), Duration::from_millis(300))
        });
        bench
            .peer
            .change(|manner| drop(manner.lies.insert(code, lie)));
        let notices = bench.start();
        let head = bench.offer(0);
        bench.driver.kick();
        assert!(matches!(presence(&notices), PeerReport::Lost { .. }));
        bench.peer.change(|manner| manner.lies.clear());
        assert_eq!(presence(&notices), PeerReport::Connected);
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    }
}

#[test]
fn a_peer_is_told_of_features_of_its_own_alone() {
    let mut bench = bench();
    let (notifier, notices) = notices();
    let own = 1 << 5;
    bench
        .front
        .start(Activation {
            features: FEATURES | VERSION_1 | EVENT_IDX | own,
            memory: bench.memory.clone(),
            queues: vec![bench.driver.activate()],
            notifier,
        })
        .unwrap();
    let head = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    let accepted = bench.peer.seen(|seen| seen.accepted);
    assert_eq!(accepted, FEATURES | VERSION_1 | 1 << 30);
}
