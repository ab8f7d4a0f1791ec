//! Frames that are looked for.

use super::*;

/// A device whose worker looks: by a clock that stands the wait for its first kick was short, and no look is ever over.
fn looking() -> Rig {
    let now = Instant::now();
    let rig = Rig::with(ALL, 1, Some(Arc::new(move || now)));
    rig.tx.kick_and_wait();
    rig
}

#[test]
fn a_worker_that_looks_sends_without_being_kicked() {
    let mut rig = looking();
    rig.tx.put_bytes(DATA, &frame(OTHER, 60));
    for _ in 0..3 {
        rig.tx.offer(&[(DATA, 72, false)]);
        assert_eq!(rig.arrived(), frame(OTHER, 60));
        returned(&mut rig.tx, &rig.notices);
    }
}

#[test]
fn a_worker_that_looks_sees_frames_from_the_network_and_new_buffers() {
    let mut rig = looking();
    rig.peer.send(&frame(MAC, 60)).unwrap();
    rig.rx.offer(&[(DATA, 512, true)]);
    assert_eq!(returned(&mut rig.rx, &rig.notices), (0, 72));
    rig.rx.offer(&[(DATA, 512, true)]);
    rig.peer.send(&frame(MAC, 70)).unwrap();
    assert_eq!(returned(&mut rig.rx, &rig.notices), (1, 82));
}

#[test]
fn a_worker_that_looks_can_be_stopped_and_then_the_driver_kicks() {
    let mut rig = looking();
    let queues = rig.stop();
    assert_eq!(queues.len(), 3);
    assert!(rig.tx.invited(0, false));
}
