//! Limits hold on a clock that the test moves.

use std::time::Duration;

use super::*;

/// A clock that stands until it is moved.
#[derive(Clone)]
pub(super) struct Hands(Arc<Mutex<Instant>>);

impl Hands {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    pub(super) fn clock(&self) -> Clock {
        let hands = self.clone();
        Arc::new(move || *hands.0.lock().unwrap())
    }

    pub(super) fn advance(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

const HOUR: u64 = 3_600_000;

#[test]
fn each_direction_has_limits_of_its_own_that_can_be_changed() {
    let hands = Hands::new();
    let mut rig = Rig::with(ALL, 1, Some(hands.clock()));
    let two = json!({ "ops": { "size": 2, "refill_time": HOUR } });
    rig.change(json!({ "tx_limits": two }));
    rig.tx.put_bytes(DATA, &frame(OTHER, 60));
    for _ in 0..3 {
        rig.tx.offer(&[(DATA, 72, false)]);
    }
    rig.tx.kick();
    for _ in 0..2 {
        returned(&mut rig.tx, &rig.notices);
    }
    // The other direction goes on.
    for buffer in 0..4 {
        rig.rx.offer(&[(DATA + 0x1000 * (buffer + 1), 512, true)]);
    }
    rig.rx.kick();
    for _ in 0..4 {
        rig.peer.send(&frame(MAC, 60)).unwrap();
        returned(&mut rig.rx, &rig.notices);
    }
    assert_eq!(rig.counters()["tx_frames"], 2);
    hands.advance(Duration::from_millis(HOUR / 2));
    rig.tx.kick();
    returned(&mut rig.tx, &rig.notices);
    rig.tx.offer(&[(DATA, 72, false)]);
    rig.change(json!({ "tx_limits": {} }));
    returned(&mut rig.tx, &rig.notices);
    assert_eq!(rig.counters()["tx_frames"], 4);
}

#[test]
fn a_frame_to_the_guest_waits_for_its_bytes_and_a_stop_does_not_lose_it() {
    let hands = Hands::new();
    let mut rig = Rig::with(ALL, 1, Some(hands.clock()));
    let limits = json!({ "bandwidth": { "size": 100, "refill_time": HOUR } });
    rig.change(json!({ "rx_limits": limits }));
    for buffer in 0..4 {
        rig.rx.offer(&[(DATA + 0x1000 * buffer, 512, true)]);
    }
    rig.rx.kick();
    for len in [100, 200, 300] {
        rig.peer.send(&frame(MAC, len)).unwrap();
    }
    assert_eq!(returned(&mut rig.rx, &rig.notices), (0, 112));
    rig.rx.kick_and_wait();
    assert_eq!(rig.rx.returned(), None);
    hands.advance(Duration::from_millis(HOUR));
    rig.rx.kick();
    assert_eq!(returned(&mut rig.rx, &rig.notices), (1, 212));
    rig.rx.kick_and_wait();
    assert_eq!(rig.rx.returned(), None);
    // The third one is in memory; the driver learns of it before the queue is given back.
    rig.stop();
    assert_eq!(rig.rx.returned(), Some((2, 312)));
    assert_eq!(rig.counters()["rx_frames"], 3);
}
