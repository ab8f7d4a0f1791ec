use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use block::{Access, Address, Connector, Listening, Opener};
use devices::StopError;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestRegionMmap, MmapRegion,
};

use super::peer::{FILL, Lie, Manner, Peer, Seen, request};
use super::*;
use crate::device::{Activation, ActiveQueue, StoppedQueue};
use crate::limit::RateGroups;
use crate::memory::{GuestMap, GuestMemory};
use crate::models::console::NoPorts;
use crate::models::{BuildContext, BuildError};
use crate::testing::{
    DATA, Driver, NoNetworks, Notice, PATIENCE, SEAM, notices, reset_reason, soon,
};

mod buffers;
mod calling;
mod idle;
mod record;

/// Bits 0 and 9: size_max and flush.
const FEATURES: u64 = 1 << 9 | 1;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const SIZE: u16 = 16;

#[derive(Debug)]
struct Plain(PathBuf);

impl Connector for Plain {
    fn connect(&self) -> io::Result<OwnedFd> {
        UnixStream::connect(&self.0).map(OwnedFd::from)
    }
}

struct PlainOpener;

impl Opener for PlainOpener {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        OpenOptions::new().read(true).write(access.write).open(path)
    }

    fn connector(&self, address: &Address) -> io::Result<Box<dyn Connector>> {
        match address {
            Address::Unix(path) => Ok(Box::new(Plain(path.clone()))),
            Address::Tcp { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn listen(&self, path: &Path) -> io::Result<Listening> {
        Ok(Listening {
            socket: UnixListener::bind(path)?,
            file: Box::new(()),
        })
    }
}

fn region(at: u64, len: u64) -> GuestRegionMmap<crate::memory::DirtyLog> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    let len = usize::try_from(len).unwrap();
    let mapped = MmapRegion::from_file(FileOffset::new(file, 0), len).unwrap();
    GuestRegionMmap::new(mapped, GuestAddress(at)).unwrap()
}

/// Memory that others can map.
pub fn shared() -> GuestMemory {
    let regions = vec![region(0, SEAM), region(SEAM, SEAM)];
    GuestMemory::new(GuestMap::from_regions(regions).unwrap())
}

struct Bench {
    peer: Peer,
    front: Front,
    memory: GuestMemory,
    driver: Driver,
    _directory: tempfile::TempDir,
}

pub fn context() -> BuildContext {
    BuildContext {
        id: "dut".to_owned(),
        opener: std::sync::Arc::new(PlainOpener),
        networks: std::sync::Arc::new(NoNetworks),
        cpus: 1,
        groups: RateGroups::default(),
        ports: std::sync::Arc::new(NoPorts),
        awaited: None,
    }
}

fn options(path: &Path, patience: Duration) -> PeerOptions {
    PeerOptions {
        path: path.to_owned(),
        listens: false,
        queues: 1,
        counted: 1,
        features: FEATURES,
        config_len: 60,
        patience,
        nature: Nature::Requests,
        epitaph: None,
        clock: std::sync::Arc::new(std::time::Instant::now),
    }
}

fn manner() -> Manner {
    let mut manner = Manner::default();
    manner.features |= FEATURES;
    manner
}

impl Bench {
    fn new(patience: Duration) -> Self {
        Self::with(patience, None)
    }

    fn with(patience: Duration, epitaph: Option<front::Epitaph>) -> Self {
        Self::of(PeerOptions {
            epitaph,
            ..options(Path::new(""), patience)
        })
    }

    /// For a device with these options, but for the socket's path.
    fn of(options: PeerOptions) -> Self {
        Self::with_peer(options, manner())
    }

    fn with_peer(options: PeerOptions, manner: Manner) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let peer = Peer::new(&path, manner);
        let options = PeerOptions { path, ..options };
        let front = Front::connect("disk", &context(), options).unwrap();
        let memory = shared();
        Self {
            driver: Driver::new(&memory, 0, SIZE),
            peer,
            front,
            memory,
            _directory: directory,
        }
    }

    fn start(&mut self) -> Receiver<Notice> {
        let queue = self.driver.activate();
        self.start_with(queue)
    }

    fn start_with(&mut self, queue: ActiveQueue) -> Receiver<Notice> {
        let (notifier, notices) = notices();
        self.front
            .start(Activation {
                features: FEATURES | VERSION_1 | EVENT_IDX,
                memory: self.memory.clone(),
                queues: vec![queue],
                notifier,
            })
            .unwrap();
        notices
    }

    fn stop(&mut self) -> StoppedQueue {
        let stopped = self.front.stop(soon()).unwrap();
        stopped.into_iter().next().unwrap()
    }

    /// Offers a request of 16 bytes to write and 32 to fill, and its number tells where.
    fn offer(&mut self, number: u64) -> u16 {
        let at = DATA + 0x100 * number;
        self.driver.offer(&[(at, 16, false), (at + 0x40, 32, true)])
    }

    fn is_filled(&self, number: u64) -> bool {
        let bytes = self.driver.bytes(DATA + 0x100 * number + 0x40, 32);
        bytes[..31] == [FILL; 31] && bytes[31] == 0
    }
}

/// The reason why the peer was lost.
fn lost(notices: &Receiver<Notice>) -> String {
    loop {
        match notices.recv_timeout(PATIENCE).unwrap() {
            Notice::Peer(PeerReport::Lost { reason }) => return reason,
            // Of the connection before, which may be told of late.
            Notice::Queue(_) | Notice::Peer(PeerReport::Connected) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn refused(manner: Manner, patience: Duration) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _peer = Peer::new(&path, manner);
    match Front::connect("disk", &context(), options(&path, patience)) {
        Err(BuildError::Backend(error)) => error.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the peer was accepted"),
    }
}

#[test]
fn requests_go_to_the_peer_and_come_back() {
    let mut bench = Bench::new(ANSWER);
    assert_eq!(bench.front.features(), FEATURES);
    let notices = bench.start();
    for number in 0..40 {
        let head = bench.offer(number);
        bench.driver.kick();
        assert_eq!(bench.driver.wait(&notices), (head.into(), 32));
        assert!(bench.is_filled(number));
    }
    // What the rings of the peer are like is agreed on with the peer alone.
    let accepted = bench.peer.seen(|seen| seen.accepted);
    assert_eq!(accepted, FEATURES | VERSION_1 | 1 << 30);
    let counters = bench.front.counters().read();
    assert_eq!(
        counters,
        [("requests", 40), ("peer_connected", 1), ("peer_losses", 0)]
    );
}

#[test]
fn pages_that_the_peer_may_have_written_are_marked() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    let map = bench.memory.memory();
    let first = map.iter().next().unwrap();
    let log = (**first).bitmap();
    log.enable();
    bench
        .driver
        .offer(&[(DATA, 16, false), (DATA + 0x3000, 32, true)]);
    bench.driver.kick();
    bench.driver.wait(&notices);
    let dirty = |at: u64| log.dirty_at(usize::try_from(at).unwrap());
    assert!(dirty(DATA + 0x3000) && !dirty(DATA));
}

#[test]
fn one_connection_lasts_over_stops_and_starts() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    let head = bench.offer(0);
    bench.driver.kick();
    bench.driver.wait(&notices);
    let mut queue = bench.stop();
    for number in 1..4 {
        assert_eq!(queue.parked, [0_u16; 0]);
        // Offered while nobody looks.
        let next = bench.offer(number);
        assert_ne!(next, head);
        let notices = bench.start_with(Driver::reactivate(queue));
        bench.driver.kick();
        assert_eq!(bench.driver.wait(&notices).0, u32::from(next));
        queue = bench.stop();
    }
    assert_eq!(bench.peer.seen(|seen| seen.connections), 1);
    let stops = |seen: &Seen| {
        let all = seen.requests.iter();
        all.filter(|code| **code == request::GET_VRING_BASE).count()
    };
    assert_eq!(bench.peer.seen(stops), 4);
}

#[test]
fn requests_of_a_peer_that_has_died_are_made_again_in_order() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    bench.peer.change(|manner| manner.hold = true);
    let heads: Vec<u16> = (0..5).map(|number| bench.offer(number)).collect();
    bench.driver.kick();
    bench.peer.until(|seen| seen.taken.len() == 5);
    bench.peer.die();
    assert_eq!(
        lost(&notices),
        "the program at the vhost-user socket has closed the connection"
    );
    bench.peer.change(|manner| {
        manner.hold = false;
        manner.backwards = true;
    });
    bench.peer.listen();
    let mut returned: Vec<u32> = (0..5).map(|_| bench.driver.wait(&notices).0).collect();
    returned.sort_unstable();
    assert_eq!(
        returned,
        heads.iter().copied().map(u32::from).collect::<Vec<_>>()
    );
    assert!((0..5).all(|number| bench.is_filled(number)));
    assert_eq!(bench.peer.seen(|seen| seen.taken[5..].to_vec()), heads);
    // As often as one likes, and nothing is made twice that was completed.
    bench.peer.hang_up();
    lost(&notices);
    let head = bench.offer(5);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    assert_eq!(bench.peer.seen(|seen| seen.taken.len()), 11);
}

#[test]
fn what_a_peer_has_done_before_it_is_sent_away_is_not_made_again() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    bench.peer.change(|manner| manner.hold = true);
    let head = bench.offer(0);
    bench.driver.kick();
    bench.peer.until(|seen| seen.taken.len() == 1);
    let code = request::SET_MEM_TABLE;
    bench.peer.change(|manner| {
        manner.hastes = Some(code);
        let refusal = Lie::Bytes(reply(code, &1_u64.to_ne_bytes()));
        manner.lies.insert(code, refusal);
    });
    let more = std::sync::Arc::new(region(16 * SEAM, SEAM));
    let map = bench.memory.memory().insert_region(more).unwrap();
    bench.memory.replace(map);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices), (head.into(), 32));
    bench.peer.change(|manner| {
        manner.lies.clear();
        manner.hold = false;
    });
    let next = bench.offer(1);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(next));
    assert_eq!(bench.peer.seen(|seen| seen.taken.clone()), [head, next]);
}

#[test]
fn requests_of_a_dead_peer_are_parked_by_a_stop() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    bench.peer.change(|manner| manner.hold = true);
    let heads: Vec<u16> = (0..3).map(|number| bench.offer(number)).collect();
    bench.driver.kick();
    bench.peer.until(|seen| seen.taken.len() == 3);
    bench.peer.die();
    lost(&notices);
    let queue = bench.stop();
    assert_eq!(queue.parked, heads);
    bench.peer.change(|manner| manner.hold = false);
    bench.peer.listen();
    let notices = bench.start_with(Driver::reactivate(queue));
    for head in heads {
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    }
}

#[test]
fn a_peer_that_keeps_its_requests_fails_the_stop_and_serves_on() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    bench.peer.change(|manner| manner.hold = true);
    let head = bench.offer(0);
    bench.driver.kick();
    bench.peer.until(|seen| seen.taken.len() == 1);
    let stopped = bench.front.stop(std::time::Instant::now());
    assert!(matches!(stopped, Err(StopError::Deadline { .. })));
    bench.peer.change(|manner| manner.hold = false);
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    assert_eq!(bench.stop().parked, [0_u16; 0]);
}

#[test]
fn an_epitaph_answers_what_the_peer_has_taken_to_the_grave() {
    let mut bench = Bench::with(
        ANSWER,
        Some(|said| said.iter().map(|byte| byte + 1).collect()),
    );
    let notices = bench.start();
    bench.peer.change(|manner| manner.hold = true);
    bench.driver.put_bytes(DATA, &[7; 16]);
    let head = bench.offer(0);
    bench.driver.kick();
    bench.peer.until(|seen| seen.taken.len() == 1);
    bench.peer.hang_up();
    assert_eq!(bench.driver.wait(&notices), (head.into(), 16));
    assert_eq!(bench.driver.bytes(DATA + 0x40, 16), [8; 16]);
}

#[test]
fn what_a_peer_lacks_is_named() {
    let without = |change: fn(&mut Manner)| {
        let mut manner = manner();
        change(&mut manner);
        refused(manner, ANSWER)
    };
    for (change, named) in [
        (
            (|m| m.features &= !(1 << 32)) as fn(&mut Manner),
            "Virtio 1",
        ),
        (|m| m.features &= !(1 << 30), "protocol features"),
        (|m| m.features &= !(1 << 28), "indirect descriptors"),
        (|m| m.protocol &= !(1 << 9), "a configuration space"),
        (|m| m.queues = 0, "has 0 queues"),
        (|m| m.queues = 1 << 40, "count its queues"),
    ] {
        let refusal = without(change);
        assert!(refusal.contains(named), "{refusal}");
    }
}

/// A reply to `code` with this body.
fn reply(code: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let words = [code, 1 | 1 << 2, size];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(body);
    bytes
}

#[test]
fn a_peer_that_lies_hangs_or_hangs_up_is_refused() {
    let soon = Duration::from_millis(100);
    for code in [
        request::GET_FEATURES,
        request::GET_PROTOCOL_FEATURES,
        request::GET_QUEUE_NUM,
        request::GET_CONFIG,
    ] {
        for lie in [
            Lie::HangUp,
            Lie::Silence,
            Lie::Bytes(vec![0xff; 64]),
            Lie::Bytes(reply(code + 1, &[0; 8])),
            Lie::Bytes(reply(code, &[])),
            // Longer than anything that is asked for.
            Lie::Bytes(reply(code, &[0; 5000])),
            Lie::Bytes(vec![1]),
        ] {
            let text = format!("{code} {lie:?}");
            let mut manner = manner();
            manner.lies.insert(code, lie);
            let refusal = refused(manner, soon);
            assert!(refusal.contains("vhost-user socket"), "{text}: {refusal}");
        }
    }
}

#[test]
fn a_peer_that_misbehaves_in_use_is_sent_away_and_taken_again() {
    let soon = Duration::from_millis(300);
    for code in [
        request::SET_FEATURES,
        request::SET_MEM_TABLE,
        request::SET_VRING_ADDR,
        request::SET_VRING_ENABLE,
    ] {
        for lie in [
            Lie::HangUp,
            Lie::Silence,
            Lie::Bytes(reply(code, &1_u64.to_ne_bytes())),
            Lie::Bytes(reply(code, &[0; 3])),
        ] {
            let mut bench = Bench::new(soon);
            bench
                .peer
                .change(|manner| drop(manner.lies.insert(code, lie)));
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
fn a_peer_that_returns_what_it_was_not_given_is_sent_away() {
    for wrong in [7, u32::from(SIZE), u32::MAX] {
        let mut bench = Bench::new(ANSWER);
        let notices = bench.start();
        bench.peer.change(|manner| manner.wrong_head = Some(wrong));
        let head = bench.offer(0);
        bench.driver.kick();
        let reason = lost(&notices);
        assert!(reason.contains("has returned chain"), "{reason}");
        assert_eq!(bench.driver.used_index(), 0);
        bench.peer.change(|manner| manner.wrong_head = None);
        assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    }
}

#[test]
fn a_peer_with_fewer_features_than_its_predecessor_is_not_taken() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    bench
        .peer
        .until(|seen| seen.requests.contains(&request::SET_VRING_ENABLE));
    bench.peer.change(|manner| manner.features &= !1);
    bench.peer.hang_up();
    lost(&notices);
    let head = bench.offer(0);
    bench.driver.kick();
    bench.peer.until(|seen| seen.connections >= 3);
    assert_eq!(bench.driver.used_index(), 0);
    bench.peer.change(|manner| manner.features |= 1);
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
}

fn note(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

#[test]
fn the_driver_is_told_when_the_peers_configuration_has_changed() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    bench
        .peer
        .change(|manner| manner.config[..8].copy_from_slice(&[9; 8]));
    // In two parts.
    let note = note(2, 1, 0);
    bench.peer.note(&note[..5]);
    bench.peer.note(&note[5..]);
    assert_eq!(notices.recv_timeout(PATIENCE).unwrap(), Notice::Config);
    let mut seen = [0; 10];
    bench.front.read_config(0, &mut seen);
    assert_eq!(seen, [9, 9, 9, 9, 9, 9, 9, 9, 0, 0]);
    bench.front.read_config(59, &mut seen);
    assert_eq!(seen, [0; 10]);
}

#[test]
fn notes_that_there_are_not_end_the_connection() {
    for bytes in [note(3, 1, 0), note(2, 1, 8), note(2, 5, 0), vec![0xff; 12]] {
        let mut bench = Bench::new(ANSWER);
        let notices = bench.start();
        bench.peer.note(&bytes);
        assert!(lost(&notices).contains("a note that there is not"));
    }
}

#[test]
fn memory_that_has_come_is_made_known_before_it_is_used() {
    let mut bench = Bench::new(ANSWER);
    let notices = bench.start();
    bench.peer.until(|seen| seen.memory.len() == 3);
    let at = 16 * SEAM;
    let more = std::sync::Arc::new(region(at, SEAM));
    let map = bench.memory.memory().insert_region(more).unwrap();
    bench.memory.replace(map);
    let head = bench.driver.offer(&[(at, 32, true)]);
    bench.driver.kick();
    assert_eq!(bench.driver.wait(&notices).0, u32::from(head));
    let expected = bench.driver.bytes(at, 32);
    assert_eq!(expected[..31], [FILL; 31]);
    assert_eq!(
        bench.peer.seen(|seen| seen.memory[..3].to_vec()),
        [0, SEAM, at]
    );
    assert_eq!(bench.peer.seen(|seen| seen.connections), 1);
}

#[test]
fn what_a_driver_may_not_do_breaks_its_device_and_not_the_peer() {
    let twice = |bench: &mut Bench| {
        bench.peer.change(|manner| manner.hold = true);
        let head = bench.offer(0);
        bench.driver.offer_head(head);
    };
    let outside = |bench: &mut Bench| {
        bench.driver.offer(&[(64 * SEAM, 32, true)]);
    };
    for (act, reason) in [
        (twice as fn(&mut Bench), "is offered while it is in use"),
        (outside, "has a buffer outside of memory"),
    ] {
        let mut bench = Bench::new(ANSWER);
        let notices = bench.start();
        act(&mut bench);
        bench.driver.kick();
        assert!(reset_reason(&notices).contains(reason));
        bench.peer.change(|manner| manner.hold = false);
        assert_eq!(bench.stop().parked, [0_u16; 0]);
        assert_eq!(bench.peer.seen(|seen| seen.connections), 1);
    }
}

#[test]
fn private_memory_is_refused_with_the_mend() {
    let mut bench = Bench::new(ANSWER);
    let memory = crate::testing::memory();
    let driver = Driver::new(&memory, 0, SIZE);
    let (notifier, _notices) = notices();
    let error = bench.front.start(Activation {
        features: FEATURES | VERSION_1,
        memory,
        queues: vec![driver.activate()],
        notifier,
    });
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("--memory shared=on")
    );
}
