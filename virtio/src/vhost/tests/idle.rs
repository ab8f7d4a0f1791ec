//! Peers of devices that nobody uses, and when a peer that is gone is tried again.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::*;

/// A time that a test moves.
#[derive(Clone)]
struct Hands(Arc<Mutex<Instant>>);

impl Hands {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn clock(&self) -> crate::limit::Clock {
        let hands = Arc::clone(&self.0);
        Arc::new(move || *hands.lock().unwrap())
    }

    fn pass(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

fn back(notices: &Receiver<Notice>) {
    match notices.recv_timeout(PATIENCE).unwrap() {
        Notice::Peer(PeerReport::Connected) => {}
        other => panic!("{other:?}"),
    }
}

fn connected(bench: &Bench) -> u64 {
    let counters = bench.front.counters().read();
    let mut found = counters
        .iter()
        .filter(|(name, _)| *name == "peer_connected");
    found.next().unwrap().1
}

#[test]
fn a_peer_that_dies_before_the_device_is_used_is_told_of_and_had_again() {
    let mut bench = Bench::new(ANSWER);
    let (notifier, notices) = notices();
    bench.front.attached(&notifier);
    bench.peer.die();
    let reason = lost(&notices);
    assert!(reason.contains("closed the connection"), "{reason}");
    assert_eq!(connected(&bench), 0);
    bench.peer.listen();
    back(&notices);
    assert_eq!(connected(&bench), 1);
    // The connection that was made meanwhile is the one that is used.
    let notices = bench.start();
    let head = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    assert_eq!(bench.peer.seen(|seen| seen.connections), 2);
}

#[test]
fn a_peer_that_dies_between_a_stop_and_a_start_is_told_of_and_had_again() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    let head = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    let queue = bench.stop();
    bench.peer.hang_up();
    lost(&notices);
    back(&notices);
    let notices = bench.start_with(Driver::reactivate(queue));
    let head = bench.offer(1);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    assert_eq!(bench.peer.seen(|seen| seen.connections), 2);
}

#[test]
fn a_device_that_nobody_uses_hears_of_its_peers_configuration() {
    let mut bench = Bench::new(ANSWER);
    let (notifier, notices) = notices();
    bench.front.attached(&notifier);
    bench
        .peer
        .change(|manner| manner.config[..8].copy_from_slice(&[9; 8]));
    bench.peer.until_noted();
    bench.peer.note(&note(2, 1, 0));
    assert_eq!(notices.recv_timeout(PATIENCE).unwrap(), Notice::Config);
    let mut seen = [0; 8];
    bench.front.read_config(0, &mut seen);
    assert_eq!(seen, [9; 8]);
}

#[test]
fn a_device_that_nobody_uses_takes_no_peer_that_lacks_what_it_offers() {
    let mut bench = Bench::new(ANSWER);
    let (notifier, notices) = notices();
    bench.front.attached(&notifier);
    bench.peer.change(|manner| manner.features &= !1);
    bench.peer.hang_up();
    lost(&notices);
    bench.peer.until(|seen| seen.connections >= 3);
    assert_eq!(connected(&bench), 0);
    // A driver that does without takes it.
    let queue = bench.driver.activate();
    let (notifier, notices) = super::notices();
    bench
        .front
        .start(Activation {
            features: (FEATURES & !1) | VERSION_1,
            memory: bench.memory.clone(),
            queues: vec![queue],
            notifier,
        })
        .unwrap();
    let head = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    // It is kept while that driver may go on. The next one wants it all: what the peer lacks is not asked of it.
    let before = bench.peer.seen(|seen| seen.connections);
    bench.stop();
    assert_eq!(bench.peer.seen(|seen| seen.connections), before);
    let notices = bench.start();
    assert!(lost(&notices).contains("lacks features that the guest uses"));
}

#[test]
fn a_peer_that_is_gone_is_tried_again_when_its_time_has_come() {
    let hands = Hands::new();
    let mut bench = Bench::of(PeerOptions {
        clock: hands.clock(),
        ..options(Path::new(""), ANSWER)
    });
    let notices = bench.start();
    bench
        .peer
        .until(|seen| seen.requests.contains(&request::SET_VRING_ENABLE));
    let head = bench.offer(0);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    bench.peer.hang_up();
    lost(&notices);
    // Whatever makes it look up.
    for time in [0, 49] {
        hands.pass(Duration::from_millis(time));
        for _ in 0..20 {
            bench.driver.kick_and_wait();
        }
        assert_eq!(bench.peer.seen(|seen| seen.connections), 1);
    }
    hands.pass(Duration::from_millis(1));
    let head = bench.offer(1);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    assert_eq!(bench.peer.seen(|seen| seen.connections), 2);
}

#[test]
fn a_peer_is_silent_when_its_time_is_up_and_not_before() {
    let hands = Hands::new();
    let mut bench = Bench::of(PeerOptions {
        clock: hands.clock(),
        ..options(Path::new(""), ANSWER)
    });
    let code = request::SET_MEM_TABLE;
    bench
        .peer
        .change(|manner| drop(manner.lies.insert(code, Lie::Silence)));
    let notices = bench.start();
    bench.peer.until(|seen| seen.requests.contains(&code));
    // It sleeps by now, and has noted until when.
    bench.driver.kick_and_wait();
    hands.pass(ANSWER - Duration::from_millis(1));
    for _ in 0..20 {
        bench.driver.kick_and_wait();
    }
    assert!(notices.try_recv().is_err());
    hands.pass(Duration::from_millis(1));
    bench.driver.kick();
    assert!(lost(&notices).contains("has not answered within 5s"));
}

#[test]
fn events_that_a_peer_has_block_and_fills_hold_nobody_up() {
    let mut bench = Bench::new(ANSWER);
    bench.peer.change(|manner| manner.obstructs = true);
    let notices = bench.start();
    for number in 0..40 {
        let head = bench.offer(number);
        bench.driver.kick();
        assert_eq!(bench.driver.wait(&notices), (head.into(), 32));
    }
    assert_eq!(bench.peer.seen(|seen| seen.connections), 1);
    assert_eq!(bench.stop().parked, [0_u16; 0]);
}
