//! Peers that connect to a socket of this process.

use super::*;

fn front(path: &Path) -> Result<Front, BuildError> {
    let options = PeerOptions {
        listens: true,
        ..options(path, ANSWER)
    };
    Front::connect("disk", &context(), options)
}

#[test]
fn a_peer_that_calls_is_served_by_and_called_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut peer = Peer::calling(&path, manner());
    let memory = shared();
    let mut bench = Bench {
        front: front(&path).unwrap(),
        driver: Driver::new(&memory, 0, SIZE),
        memory,
        peer: Peer::new(&directory.path().join("other"), manner()),
        _directory: directory,
    };
    let notices = bench.start();
    for round in 1..4 {
        let head = bench.offer(round);
        bench.driver.kick();
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
        assert!(bench.is_filled(round));
        peer.change(|manner| manner.hold = true);
        let head = bench.offer(10 + round);
        bench.driver.kick();
        let all = usize::try_from(3 * round - 1).unwrap();
        peer.until(|seen| seen.taken.len() == all);
        peer.die();
        lost(&notices);
        peer.change(|manner| manner.hold = false);
        peer.call();
        // What the last one has not done is done by the next.
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
        let connections = usize::try_from(round).unwrap() + 1;
        assert_eq!(peer.seen(|seen| seen.connections), connections);
    }
    assert_eq!(bench.stop().parked, [0_u16; 0]);
    // Nor is it missed while nobody uses the device.
    peer.hang_up();
    lost(&notices);
}

#[test]
fn a_peer_that_never_calls_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let soon = PeerOptions {
        listens: true,
        ..options(&path, Duration::from_millis(5))
    };
    let refusal = Front::connect("disk", &context(), soon).err().unwrap();
    let refusal = refusal.to_string();
    assert!(refusal.contains("nobody has connected to"), "{refusal}");
    // The path is in use now.
    let refusal = front(&path).err().unwrap().to_string();
    assert!(refusal.contains("cannot listen at"), "{refusal}");
}
