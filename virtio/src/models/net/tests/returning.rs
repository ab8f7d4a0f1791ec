//! A network that goes, and what is made of its return.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::limits::Hands;
use super::worker::{LONGEST_RETRY, RETRY};
use super::*;
use crate::vhost::PeerReport;

/// What observers are told next.
fn told(notices: &Channel<Notice>) -> PeerReport {
    loop {
        match notices.recv_timeout(PATIENCE).unwrap() {
            Notice::Peer(report) => return report,
            Notice::Reset(reason) => panic!("{reason}"),
            _ => {}
        }
    }
}

/// A device at a server's socket, on a clock that stands.
struct Served {
    net: Net,
    rx: Driver,
    tx: Driver,
    notices: Channel<Notice>,
    listener: UnixListener,
    hands: Hands,
    _dir: tempfile::TempDir,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let stream = net::Stream::connect(&path, 1).unwrap();
        let mut net = Net::new("net0", Box::new(stream), settings(1));
        let hands = Hands::new();
        net.clock = hands.clock();
        let memory = memory();
        let [mut rx, tx] = [0, 1].map(|index| Driver::new(&memory, index, SIZE));
        // Whoever has room for a frame finds out that nobody sends any.
        for buffer in 1..6 {
            rx.offer(&[(DATA + buffer * 0x1000, 512, true)]);
        }
        let features = net.features();
        let notices = start(
            &mut net,
            features,
            &memory,
            vec![rx.activate(), tx.activate()],
        );
        Self {
            net,
            rx,
            tx,
            notices,
            listener,
            hands,
            _dir: dir,
        }
    }

    /// Has the worker look up, twice: the second time it has done all that the first one gave it to do.
    fn look(&self) {
        self.tx.kick_and_wait();
        self.tx.kick_and_wait();
    }

    /// The connection that there is now, if there is one that nobody has taken.
    fn connection(&self) -> Option<UnixStream> {
        self.listener.accept().map(|(server, _)| server).ok()
    }

    fn lost(&self) -> String {
        match told(&self.notices) {
            PeerReport::Lost { reason } => reason,
            PeerReport::Connected => panic!("it is there"),
        }
    }

    /// Time passes, and the device connects again; not before.
    fn returns_after(&self, time: Duration) -> UnixStream {
        let little = Duration::from_millis(1);
        self.hands.advance(time - little);
        self.look();
        assert!(self.connection().is_none(), "before {time:?}");
        self.hands.advance(little);
        self.look();
        assert_eq!(told(&self.notices), PeerReport::Connected);
        self.connection().unwrap()
    }
}

#[test]
fn a_server_that_takes_connections_and_ends_them_is_asked_ever_more_rarely() {
    let served = Served::new();
    // The one of the device's start, and the one that is made at once.
    drop(served.connection().unwrap());
    let reason = served.lost();
    assert!(reason.contains("socket ") && reason.contains("link is down until it is there"));
    assert_eq!(told(&served.notices), PeerReport::Connected);
    drop(served.connection().unwrap());
    served.lost();
    let mut gap = RETRY;
    while gap < LONGEST_RETRY {
        gap *= 2;
        drop(served.returns_after(gap));
        served.lost();
    }
    drop(served.returns_after(LONGEST_RETRY));
    served.lost();
}

#[test]
fn a_server_that_lies_is_asked_as_rarely_and_one_that_has_sent_a_frame_sooner() {
    let mut served = Served::new();
    let mut server = served.connection().unwrap();
    server.write_all(&[0xff; 4]).unwrap();
    served.lost();
    assert_eq!(told(&served.notices), PeerReport::Connected);
    let mut server = served.connection().unwrap();
    // No frame is so short.
    server.write_all(&[0, 0, 0, 5, 1, 2, 3, 4, 5]).unwrap();
    server.write_all(&[0; 4]).unwrap();
    served.lost();
    let mut server = served.returns_after(2 * RETRY);
    let sound = frame(MAC, 60);
    server.write_all(&60_u32.to_be_bytes()).unwrap();
    server.write_all(&sound[HEADER_LEN..]).unwrap();
    returned(&mut served.rx, &served.notices);
    drop(server);
    served.lost();
    drop(served.returns_after(RETRY));
    served.lost();
    served.net.stop(soon()).unwrap();
}

#[test]
fn a_network_that_is_deleted_without_a_word_from_its_port_is_asked_for_and_told() {
    let (wire, _peer) = Wire::new(1);
    let news = wire.tell();
    let deleted = Arc::clone(&wire.deleted);
    let mut net = Net::new("net0", Box::new(wire), settings(1));
    let memory = memory();
    let [rx, tx] = [0, 1].map(|index| Driver::new(&memory, index, SIZE));
    let queues = vec![rx.activate(), tx.activate()];
    let features = net.features();
    let notices = start(&mut net, features, &memory, queues);
    // Of another one.
    news.send(&[1]).unwrap();
    tx.kick_and_wait();
    assert!(net.shared.link());
    deleted.store(true, Ordering::SeqCst);
    news.send(&[1]).unwrap();
    let PeerReport::Lost { reason } = told(&notices) else {
        panic!("it is there");
    };
    assert!(reason.contains("a wire") && reason.contains("removed and added again"));
    assert!(!net.shared.link());
}
