use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::connection::BUFFER;
use super::super::spec::{
    OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RW, OP_SHUTDOWN,
    SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use super::super::testing::{CID, Host};
use super::*;
use crate::device::Counters;

/// Where a guest's buffer ends, behind the header.
const ROOM: usize = 4052;

struct Bench {
    hub: Hub,
    host: Host,
    now: Instant,
    /// What the guest says of its room.
    buf_alloc: u32,
    fwd_cnt: u32,
}

/// A packet for the guest: operation, ports of host and guest, bytes.
type Heard = (u16, u32, u32, Vec<u8>);

impl Bench {
    fn new() -> Self {
        let host = Host::new();
        let setup = Setup {
            id: "vsock0".to_owned(),
            guest_cid: CID,
            path: host.path(),
            opener: Arc::new(host.clone()),
            tally: Arc::default(),
        };
        let listening = host.listen(&host.path()).unwrap();
        Self {
            hub: Hub::new(setup, listening).unwrap(),
            host,
            now: Instant::now(),
            buf_alloc: 1 << 18,
            fwd_cnt: 0,
        }
    }

    fn header(&self, op: u16, host: u32, guest: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: spec::HOST_CID,
            src_port: guest,
            dst_port: host,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn say(&mut self, op: u16, host: u32, guest: u32) {
        let header = self.header(op, host, guest);
        self.hub.receive(&header, Some(&[]), self.now);
    }

    fn send(&mut self, host: u32, guest: u32, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).unwrap();
        let header = Header {
            len,
            ..self.header(OP_RW, host, guest)
        };
        self.hub.receive(&header, Some(bytes), self.now);
    }

    fn shut(&mut self, host: u32, guest: u32, flags: u32) {
        let header = Header {
            flags,
            ..self.header(OP_SHUTDOWN, host, guest)
        };
        self.hub.receive(&header, Some(&[]), self.now);
    }

    fn look(&mut self) {
        // Once more than there can be rounds of 64 events.
        for _ in 0..8 {
            self.hub.look(self.now).unwrap();
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.look();
    }

    fn packet(&mut self) -> Option<(Header, Vec<u8>)> {
        self.look();
        let mut packet = Vec::new();
        self.hub.next(ROOM, &mut packet, self.now)?;
        let (header, bytes) = packet.split_first_chunk().unwrap();
        let header = Header::read(header);
        assert_eq!((header.src_cid, header.dst_cid), (spec::HOST_CID, CID));
        assert_eq!(usize::try_from(header.len).unwrap(), bytes.len());
        Some((header, bytes.to_vec()))
    }

    fn hear(&mut self) -> Option<Heard> {
        let (header, bytes) = self.packet()?;
        Some((header.op, header.src_port, header.dst_port, bytes))
    }

    /// What is heard in all, until there is no more.
    fn hear_all(&mut self) -> Vec<Heard> {
        std::iter::from_fn(|| self.hear()).collect()
    }

    fn counted(&self) -> BTreeMap<&'static str, u64> {
        self.hub.setup.tally.read().into_iter().collect()
    }

    /// A connection that a client has made to port 52 of the guest, and the host's port.
    fn meet_client(&mut self) -> (UnixStream, u32) {
        let client = self.host.client("CONNECT 52\n");
        let (op, host, guest, _) = self.hear().unwrap();
        assert_eq!((op, guest), (OP_REQUEST, 52));
        self.say(OP_RESPONSE, host, guest);
        let line = format!("OK {host}\n");
        assert_eq!(read(&client, line.len()), line.as_bytes());
        (client, host)
    }

    /// A connection of port `guest` of the guest to a server, and the server's side of it.
    fn meet_server(&mut self, server: &UnixListener, host: u32, guest: u32) -> UnixStream {
        self.say(OP_REQUEST, host, guest);
        assert_eq!(self.hear(), Some((OP_RESPONSE, host, guest, vec![])));
        server.accept().unwrap().0
    }
}

fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Whether the other side has ended it.
fn ended(mut stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!(stream.read(&mut [0]), Ok(0))
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect()
}

#[test]
fn a_client_reaches_a_port_of_the_guest_and_bytes_go_both_ways() {
    let mut bench = Bench::new();
    let (mut client, host) = bench.meet_client();
    assert!(host >= FIRST_PORT);
    client.write_all(b"question").unwrap();
    assert_eq!(bench.hear(), Some((OP_RW, host, 52, b"question".to_vec())));
    bench.send(host, 52, b"answer");
    assert_eq!(read(&client, 6), b"answer");
    assert_eq!(bench.hear_all(), []);
    let counted = bench.counted();
    assert_eq!((counted["rx_bytes"], counted["tx_bytes"]), (8, 6));
    assert_eq!((counted["connected"], counted["connections"]), (1, 1));
    // Another has another port.
    assert_ne!(bench.meet_client().1, host);
}

#[test]
fn what_a_client_sends_with_its_line_comes_after_the_answer_is_there() {
    let mut bench = Bench::new();
    let client = bench.host.client("CONNECT 52\nearly");
    let (_, host, guest, _) = bench.hear().unwrap();
    assert_eq!(bench.hear_all(), []);
    bench.say(OP_RESPONSE, host, guest);
    assert_eq!(bench.hear(), Some((OP_RW, host, 52, b"early".to_vec())));
    drop(client);
}

#[test]
fn a_guest_reaches_a_server_and_bytes_go_both_ways() {
    let mut bench = Bench::new();
    let server = bench.host.server(1024);
    let mut theirs = bench.meet_server(&server, 1024, 7);
    bench.send(1024, 7, b"hello");
    assert_eq!(read(&theirs, 5), b"hello");
    let sent = bytes(3 * ROOM + 1);
    theirs.write_all(&sent).unwrap();
    let heard = bench.hear_all();
    assert!(
        heard
            .iter()
            .all(|(op, host, guest, _)| (*op, *host, *guest) == (OP_RW, 1024, 7))
    );
    let got: Vec<u8> = heard.into_iter().flat_map(|(.., bytes)| bytes).collect();
    assert_eq!(got, sent);
}

#[test]
fn connections_take_turns() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    let mut streams: Vec<_> = (0..3).map(|n| bench.meet_server(&server, 1, n)).collect();
    for stream in &mut streams {
        stream.write_all(&bytes(2 * ROOM)).unwrap();
    }
    let guests: Vec<u32> = bench
        .hear_all()
        .into_iter()
        .map(|(_, _, guest, _)| guest)
        .collect();
    let mut first = guests[..3].to_vec();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2]);
    assert_eq!(guests[..3], guests[3..]);
}

#[test]
fn what_belongs_to_no_connection_is_refused_and_what_is_for_others_dropped() {
    let mut bench = Bench::new();
    // Nobody listens there.
    bench.say(OP_REQUEST, 99, 5);
    assert_eq!(bench.hear(), Some((OP_RST, 99, 5, vec![])));
    for op in [
        OP_RESPONSE,
        OP_RW,
        OP_SHUTDOWN,
        OP_CREDIT_UPDATE,
        OP_CREDIT_REQUEST,
        0,
        8,
        u16::MAX,
    ] {
        bench.say(op, 99, 6);
        assert_eq!(bench.hear(), Some((OP_RST, 99, 6, vec![])), "{op}");
    }
    bench.say(OP_RST, 99, 6);
    assert_eq!(bench.hear_all(), []);
    let header = bench.header(OP_REQUEST, 99, 5);
    for kind in [0, 2, 3, u16::MAX] {
        let header = Header { kind, ..header };
        bench.hub.receive(&header, Some(&[]), bench.now);
        let (refusal, _) = bench.packet().unwrap();
        assert_eq!((refusal.op, refusal.kind), (OP_RST, kind));
    }
    let errors = bench.counted()["errors"];
    for (src_cid, dst_cid) in [
        (4, 2),
        (2, 2),
        (0, 2),
        (u64::MAX, 2),
        (3, 3),
        (3, 1),
        (3, 0),
    ] {
        let header = Header {
            src_cid,
            dst_cid,
            ..header
        };
        bench.hub.receive(&header, Some(&[]), bench.now);
    }
    assert_eq!(bench.hear_all(), []);
    assert_eq!(bench.counted()["errors"], errors + 7);
}

#[test]
fn a_client_whom_the_guest_refuses_or_who_says_something_else_is_closed() {
    let mut bench = Bench::new();
    let client = bench.host.client("CONNECT 52\n");
    let (_, host, guest, _) = bench.hear().unwrap();
    bench.say(OP_RST, host, guest);
    assert!(ended(&client));
    for words in ["GET / HTTP/1.0\r\n\r\n", "CONNECT\n", &"x".repeat(64)] {
        let client = bench.host.client(words);
        bench.look();
        assert!(
            matches!((&client).read(&mut [0]), Ok(0) | Err(_)),
            "{words}"
        );
    }
    drop(bench.host.client("CONN"));
    assert_eq!(bench.hear_all(), []);
    let counted = bench.counted();
    assert_eq!((counted["refused"], counted["connections"]), (5, 0));
    assert_eq!(bench.hub.places.len(), 0);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut bench = Bench::new();
    bench.buf_alloc = 10;
    let server = bench.host.server(1);
    let mut theirs = bench.meet_server(&server, 1, 7);
    theirs.write_all(&bytes(25)).unwrap();
    assert_eq!(bench.hear(), Some((OP_RW, 1, 7, bytes(10))));
    // It is asked once.
    assert_eq!(bench.hear(), Some((OP_CREDIT_REQUEST, 1, 7, vec![])));
    assert_eq!(bench.hear_all(), []);
    bench.fwd_cnt = 4;
    bench.say(OP_CREDIT_UPDATE, 1, 7);
    assert_eq!(bench.hear(), Some((OP_RW, 1, 7, bytes(14)[10..].to_vec())));
    assert_eq!(bench.hear(), Some((OP_CREDIT_REQUEST, 1, 7, vec![])));
    // More than was sent has left nobody's buffer, and nothing comes back into it.
    for count in [15, 1 << 20, 1 << 31, u32::MAX, 3] {
        bench.fwd_cnt = count;
        bench.say(OP_CREDIT_UPDATE, 1, 7);
        assert_eq!(bench.hear_all(), [], "{count}");
    }
    // It may have less room than before, and none.
    bench.fwd_cnt = 14;
    for room in [0, 1] {
        bench.buf_alloc = room;
        bench.say(OP_CREDIT_UPDATE, 1, 7);
    }
    assert_eq!(bench.hear(), Some((OP_RW, 1, 7, bytes(15)[14..].to_vec())));
    bench.hear().unwrap();
    bench.buf_alloc = u32::MAX;
    bench.say(OP_CREDIT_UPDATE, 1, 7);
    assert_eq!(bench.hear(), Some((OP_RW, 1, 7, bytes(25)[15..].to_vec())));
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_its_connection() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    // It never reads.
    let theirs = bench.meet_server(&server, 1, 7);
    let piece = bytes(32 << 10);
    let mut sent = 0;
    let heard = loop {
        bench.send(1, 7, &piece);
        sent += 1;
        assert!(sent < 100);
        let heard = bench.hear_all();
        if heard.iter().any(|(op, ..)| *op == OP_RST) {
            break heard;
        }
    };
    assert_eq!(heard, [(OP_RST, 1, 7, vec![])]);
    // What was taken before is there.
    let mut got = Vec::new();
    (&theirs).read_to_end(&mut got).unwrap();
    assert!(got.len() < sent * piece.len());
    assert!(
        got.chunks(piece.len())
            .all(|chunk| *chunk == piece[..chunk.len()])
    );
    bench.send(1, 7, &piece);
    assert_eq!(bench.hear(), Some((OP_RST, 1, 7, vec![])));
    assert_eq!(bench.counted()["connections"], 0);
}

#[test]
fn a_guest_that_keeps_to_its_room_loses_nothing_to_a_slow_reader() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    let theirs = bench.meet_server(&server, 1, 7);
    theirs.set_nonblocking(true).unwrap();
    let all = bytes(1 << 20);
    let (mut sent, mut taken, mut got) = (0_usize, 0_usize, Vec::<u8>::new());
    let room = usize::try_from(BUFFER).unwrap();
    let mut buffer = vec![0; 10_000];
    while got.len() < all.len() {
        let most = (taken + room - sent).min(all.len() - sent).min(30_000);
        if most > 0 {
            bench.send(1, 7, &all[sent..sent + most]);
            sent += most;
        } else if let Ok(read) = (&theirs).read(&mut buffer) {
            got.extend(&buffer[..read]);
        }
        while let Some((header, _)) = bench.packet() {
            assert_eq!(header.op, OP_CREDIT_UPDATE);
            assert_eq!(header.buf_alloc, BUFFER);
            taken = usize::try_from(header.fwd_cnt).unwrap();
            assert!(taken <= sent);
        }
    }
    assert_eq!(got, all);
    bench.say(OP_CREDIT_REQUEST, 1, 7);
    let (header, _) = bench.packet().unwrap();
    assert_eq!((header.op, header.fwd_cnt), (OP_CREDIT_UPDATE, 1 << 20));
}

#[test]
fn each_direction_ends_by_itself_when_the_guest_ends_it() {
    let mut bench = Bench::new();
    let (mut client, host) = bench.meet_client();
    bench.send(host, 52, b"last words");
    bench.shut(host, 52, SHUTDOWN_SEND);
    assert_eq!(read(&client, 10), b"last words");
    assert_eq!(read_end(&client), b"");
    client.write_all(b"not mine").unwrap();
    assert_eq!(bench.hear(), Some((OP_RW, host, 52, b"not mine".to_vec())));
    // It has said that it sends no more.
    bench.send(host, 52, b"but");
    assert_eq!(bench.hear(), Some((OP_RST, host, 52, vec![])));
    let (client, host) = bench.meet_client();
    bench.shut(host, 52, SHUTDOWN_RECEIVE);
    assert!((&client).write_all(b"x").is_err());
    bench.send(host, 52, b"still");
    assert_eq!(read(&client, 5), b"still");
    bench.shut(host, 52, SHUTDOWN_SEND);
    assert_eq!(bench.hear(), Some((OP_RST, host, 52, vec![])));
    assert_eq!(bench.counted()["connections"], 0);
}

fn read_end(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_the_host_sends_before_it_ends_comes_before_the_end() {
    let mut bench = Bench::new();
    let (mut client, host) = bench.meet_client();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.hear(), Some((OP_RW, host, 52, b"question".to_vec())));
    let (header, _) = bench.packet().unwrap();
    assert_eq!((header.op, header.flags), (OP_SHUTDOWN, SHUTDOWN_SEND));
    bench.send(host, 52, b"answer");
    assert_eq!(read(&client, 6), b"answer");
    client.write_all(b"x").unwrap_err();
    drop(client);
    let (header, _) = bench.packet().unwrap();
    assert_eq!((header.op, header.flags), (OP_SHUTDOWN, SHUTDOWN_BOTH));
    assert_eq!(bench.hear_all(), []);
    // The guest agrees, or it is given up.
    bench.pass(PATIENCE);
    assert_eq!(bench.hear(), Some((OP_RST, host, 52, vec![])));
    assert_eq!(bench.counted()["connections"], 0);
}

#[test]
fn a_client_that_is_gone_has_its_words_delivered_and_gets_no_more() {
    let mut bench = Bench::new();
    let (mut client, host) = bench.meet_client();
    client.write_all(b"bye").unwrap();
    drop(client);
    bench.send(host, 52, b"too late");
    assert_eq!(bench.hear(), Some((OP_RW, host, 52, b"bye".to_vec())));
    let (header, _) = bench.packet().unwrap();
    assert_eq!((header.op, header.flags), (OP_SHUTDOWN, SHUTDOWN_BOTH));
    bench.send(host, 52, b"even later");
    bench.say(OP_RST, host, 52);
    assert_eq!(bench.hear_all(), []);
    assert_eq!(bench.counted()["connections"], 0);
}

#[test]
fn who_takes_too_long_is_given_up() {
    let mut bench = Bench::new();
    let silent = bench.host.client("CONNECT 5");
    let asking = bench.host.client("CONNECT 52\n");
    let (op, host, ..) = bench.hear().unwrap();
    assert_eq!(op, OP_REQUEST);
    bench.pass(PATIENCE - Duration::from_millis(1));
    assert_eq!(bench.hear_all(), []);
    bench.pass(Duration::from_millis(1));
    assert_eq!(bench.hear_all(), [(OP_RST, host, 52, vec![])]);
    assert!(ended(&asking));
    (&silent).write_all(b"2").unwrap();
    bench.pass(greeting::PATIENCE);
    assert!((&silent).write_all(b"\n").is_err());
    assert_eq!(bench.hear_all(), []);
    assert_eq!(bench.hub.wake_at(), None);
    // An answer that comes after that is to no question.
    bench.say(OP_RESPONSE, host, 52);
    assert_eq!(bench.hear(), Some((OP_RST, host, 52, vec![])));
}

#[test]
fn a_server_with_enough_waiting_is_tried_again_for_a_while() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    bench.host.busy.store(true, Ordering::SeqCst);
    for guest in [7, 8] {
        bench.say(OP_REQUEST, 1, guest);
    }
    bench.pass(RETRY);
    assert_eq!(bench.hear_all(), []);
    bench.say(OP_RST, 1, 8);
    bench.host.busy.store(false, Ordering::SeqCst);
    bench.pass(RETRY);
    assert_eq!(bench.hear_all(), [(OP_RESPONSE, 1, 7, vec![])]);
    let _theirs = server.accept().unwrap();
    bench.host.busy.store(true, Ordering::SeqCst);
    bench.say(OP_REQUEST, 1, 9);
    bench.pass(PATIENCE);
    assert_eq!(bench.hear_all(), [(OP_RST, 1, 9, vec![])]);
    assert_eq!(bench.counted()["connections"], 1);
}

#[test]
fn a_port_that_is_in_use_is_not_had_twice() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    let theirs = bench.meet_server(&server, 1, 7);
    bench.say(OP_REQUEST, 1, 7);
    assert!(ended(&theirs));
    // What comes before the guest knows changes nothing.
    bench.send(1, 7, b"x");
    bench.say(OP_REQUEST, 1, 7);
    assert_eq!(bench.hear_all(), [(OP_RST, 1, 7, vec![])]);
    bench.meet_server(&server, 1, 7);
    // A response to what was not asked for, and an operation that there is not.
    for op in [OP_RESPONSE, 0, 8] {
        bench.say(op, 1, 7);
        assert_eq!(bench.hear_all(), [(OP_RST, 1, 7, vec![])]);
        bench.meet_server(&server, 1, 7);
    }
}

#[test]
fn a_flood_of_requests_has_so_many_connections_and_no_more() {
    let mut bench = Bench::new();
    bench.host.busy.store(true, Ordering::SeqCst);
    for guest in 0..2000 {
        bench.say(OP_REQUEST, 1, guest);
    }
    assert_eq!(bench.hub.connections.len(), MAX_CONNECTIONS);
    assert!(!bench.hub.takes());
    assert_eq!(bench.hub.refusals.len(), MAX_REFUSALS);
    assert_eq!(bench.hear_all().len(), MAX_REFUSALS);
    assert!(bench.hub.takes());
    // A client is not let in either, and then it is.
    let client = bench.host.client("CONNECT 52\n");
    bench.look();
    assert!(ended(&client));
    bench.say(OP_RST, 1, 0);
    bench.meet_client();
}

#[test]
fn a_crowd_of_silent_clients_makes_others_wait_and_nothing_else() {
    let mut bench = Bench::new();
    let (mut old, host) = bench.meet_client();
    let mut silent: Vec<_> = (0..MAX_GREETINGS).map(|_| bench.host.client("")).collect();
    bench.look();
    let late = bench.host.client("CONNECT 52\n");
    bench.look();
    assert_eq!(bench.hub.greetings, MAX_GREETINGS);
    old.write_all(b"x").unwrap();
    assert_eq!(bench.hear_all(), [(OP_RW, host, 52, b"x".to_vec())]);
    drop(silent.pop());
    assert_eq!(bench.hear().unwrap().0, OP_REQUEST);
    drop(late);
    // The others are gone in time.
    let later = bench.host.client("CONNECT 53\n");
    bench.pass(greeting::PATIENCE);
    assert_eq!(bench.hub.greetings, 0);
    assert!(
        bench
            .hear_all()
            .iter()
            .any(|(op, _, guest, _)| (*op, *guest) == (OP_REQUEST, 53))
    );
    drop(later);
}

#[test]
fn a_packet_that_is_not_all_there_ends_its_connection() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    let theirs = bench.meet_server(&server, 1, 7);
    let header = Header {
        len: 1 << 30,
        ..bench.header(OP_RW, 1, 7)
    };
    bench.hub.receive(&header, None, bench.now);
    assert_eq!(bench.hear_all(), [(OP_RST, 1, 7, vec![])]);
    assert!(ended(&theirs));
    // And so does one that the guest could not take.
    let mut theirs = bench.meet_server(&server, 1, 7);
    theirs.write_all(b"x").unwrap();
    bench.look();
    let sent = bench.hub.next(ROOM, &mut Vec::new(), bench.now).unwrap();
    bench.hub.lost(&sent);
    assert_eq!(bench.hear_all(), [(OP_RST, 1, 7, vec![])]);
}

#[test]
fn forgetting_ends_everything_and_leaves_the_socket() {
    let mut bench = Bench::new();
    let (client, _) = bench.meet_client();
    let asking = bench.host.client("CONNECT 1\n");
    let silent = bench.host.client("");
    bench.look();
    bench.hub.forget();
    assert!(ended(&client) && ended(&asking) && ended(&silent));
    assert_eq!(bench.hear_all(), []);
    assert_eq!(bench.counted()["connections"], 0);
    bench.meet_client();
}

/// Has the guest send as much as there is room for, so that some of it is kept. What it has sent.
fn fill(bench: &mut Bench, host: u32, guest: u32) -> Vec<u8> {
    let room = usize::try_from(BUFFER).unwrap();
    let (mut sent, mut taken) = (Vec::new(), 0);
    while sent.len() < taken + room {
        let piece = bytes((taken + room - sent.len()).min(30_000));
        bench.send(host, guest, &piece);
        sent.extend(piece);
        while let Some((header, _)) = bench.packet() {
            assert_eq!(header.op, OP_CREDIT_UPDATE);
            taken = usize::try_from(header.fwd_cnt).unwrap();
        }
    }
    sent
}

/// What a slow reader gets until there is no more.
fn read_slowly(bench: &mut Bench, mut stream: &UnixStream) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let (mut got, mut piece) = (Vec::new(), vec![0; 10_000]);
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return got,
            Ok(len) => got.extend(&piece[..len]),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                let before = bench.hub.departing;
                assert_eq!(before, 1, "all has been given, and there is no end");
            }
        }
        bench.look();
    }
}

#[test]
fn what_a_guest_sent_before_it_closed_reaches_a_slow_reader() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    for flags in [SHUTDOWN_SEND, SHUTDOWN_BOTH] {
        let theirs = bench.meet_server(&server, 1, 7);
        let sent = fill(&mut bench, 1, 7);
        bench.shut(1, 7, flags);
        // It does not wait for the host any longer.
        bench.say(OP_RST, 1, 7);
        assert_eq!(bench.hear_all(), []);
        assert_eq!(bench.counted()["connections"], 1);
        // The guest may use the port anew.
        let other = bench.meet_server(&server, 1, 7);
        bench.send(1, 7, b"other");
        assert_eq!(read(&other, 5), b"other");
        bench.say(OP_RST, 1, 7);
        let got = read_slowly(&mut bench, &theirs);
        assert_eq!((got.len(), got == sent), (sent.len(), true));
        assert_eq!(bench.counted()["connections"], 0);
        assert!(bench.hub.places.is_empty());
    }
}

#[test]
fn what_a_guest_sent_before_it_broke_off_is_dropped() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    for flags in [0, SHUTDOWN_RECEIVE] {
        let theirs = bench.meet_server(&server, 1, 7);
        let sent = fill(&mut bench, 1, 7);
        bench.shut(1, 7, flags);
        bench.say(OP_RST, 1, 7);
        assert_eq!(bench.counted()["connections"], 0);
        assert!(read_end(&theirs).len() < sent.len());
    }
}

#[test]
fn connections_that_only_the_host_has_count_until_it_is_gone_or_the_driver_begins_anew() {
    let mut bench = Bench::new();
    let server = bench.host.server(1);
    let depart = |bench: &mut Bench| {
        let theirs = bench.meet_server(&server, 1, 7);
        fill(bench, 1, 7);
        bench.shut(1, 7, SHUTDOWN_BOTH);
        bench.say(OP_RST, 1, 7);
        assert_eq!(bench.hub.departing, 1);
        theirs
    };
    let theirs = depart(&mut bench);
    bench.host.busy.store(true, Ordering::SeqCst);
    for guest in 100..2000 {
        bench.say(OP_REQUEST, 1, guest);
    }
    assert_eq!(bench.hub.connections.len(), MAX_CONNECTIONS - 1);
    drop(theirs);
    bench.look();
    assert_eq!(bench.hub.departing, 0);
    bench.hub.forget();
    bench.host.busy.store(false, Ordering::SeqCst);
    let theirs = depart(&mut bench);
    bench.hub.forget();
    assert_eq!(bench.hub.departing, 0);
    read_end(&theirs);
    assert_eq!(bench.counted()["connections"], 0);
}

/// What a hostile guest and its hosts do.
#[derive(Clone, Debug)]
enum Move {
    Packet {
        op: u16,
        host: u32,
        guest: u32,
        len: u32,
        flags: u32,
        buf_alloc: u32,
        fwd_cnt: u32,
        there: bool,
    },
    Client(String),
    Write(usize),
    Close(usize),
    Look,
    Take(usize),
    Pass(u64),
}

fn moves() -> impl Strategy<Value = Move> {
    let numbers = || prop_oneof![Just(0), Just(u32::MAX), Just(1 << 31), 0..300_u32];
    let packet = (
        (
            0..10_u16,
            prop_oneof![Just(1), Just(2), Just(FIRST_PORT)],
            0..4_u32,
        ),
        (
            0..200_000_u32,
            0..5_u32,
            numbers(),
            numbers(),
            any::<bool>(),
        ),
    );
    prop_oneof![
        8 => packet.prop_map(|((op, host, guest), (len, flags, buf_alloc, fwd_cnt, there))| Move::Packet {
            op, host, guest, len, flags, buf_alloc, fwd_cnt, there,
        }),
        1 => "(CONNECT [0-3]\n?|.{0,70})".prop_map(Move::Client),
        1 => any::<usize>().prop_map(Move::Write),
        1 => any::<usize>().prop_map(Move::Close),
        2 => Just(Move::Look),
        2 => (0..ROOM).prop_map(Move::Take),
        1 => (0..20_000_u64).prop_map(Move::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_comes_all_is_bounded_and_a_new_connection_works(
        moves in proptest::collection::vec(moves(), 0..200)
    ) {
        let mut bench = Bench::new();
        let server = bench.host.server(1);
        server.set_nonblocking(true).unwrap();
        let mut streams = Vec::new();
        for step in moves {
            if let Ok((stream, _)) = server.accept() {
                streams.push(stream);
            }
            let count = streams.len().max(1);
            match step {
                Move::Packet { op, host, guest, len, flags, buf_alloc, fwd_cnt, there } => {
                    (bench.buf_alloc, bench.fwd_cnt) = (buf_alloc, fwd_cnt);
                    let header = Header { len, flags, ..bench.header(op, host, guest) };
                    let body = vec![0; usize::try_from(len).unwrap()];
                    bench.hub.receive(&header, there.then_some(&body), bench.now);
                }
                Move::Client(words) => streams.push(bench.host.client(&words)),
                Move::Write(which) => if let Some(mut stream) = streams.get(which % count) {
                    stream.set_nonblocking(true).unwrap();
                    // It may be closed, or full.
                    let _ = stream.write(&[7; 5000]);
                },
                Move::Close(which) => if which % count < streams.len() {
                    drop(streams.swap_remove(which % count));
                },
                Move::Look => bench.look(),
                Move::Take(room) => {
                    let mut packet = Vec::new();
                    if bench.hub.next(room, &mut packet, bench.now).is_some() {
                        prop_assert!(packet.len() <= HEADER_LEN + room);
                    }
                }
                Move::Pass(millis) => bench.pass(Duration::from_millis(millis)),
            }
            prop_assert!(bench.hub.connections.len() <= MAX_CONNECTIONS);
            prop_assert!(bench.hub.refusals.len() <= MAX_REFUSALS);
            prop_assert!(bench.hub.due.len() <= bench.hub.connections.len());
        }
        drop(streams);
        bench.hear_all();
        (bench.buf_alloc, bench.fwd_cnt) = (100, 0);
        while server.accept().is_ok() {}
        let theirs = bench.meet_server(&server, 1, 77);
        bench.send(1, 77, b"whole");
        prop_assert_eq!(read(&theirs, 5), b"whole");
    }
}
