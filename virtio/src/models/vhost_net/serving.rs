//! A card with several pairs, its control queue, and a program that goes and comes.

use std::sync::mpsc::Receiver;

use migration::DynSnapshot;

use super::*;
use crate::device::DiskReport;
use crate::memory::GuestMemory;
use crate::testing::{DATA, Driver, Notice, PATIENCE, notices};
use crate::vhost::PeerReport;
use crate::vhost::peer::{ANNOUNCES, Lie, Manner, PROTOCOL, Peer, request};
use crate::vhost::tests::{context, shared};

const SIZE: u16 = 16;
const ALL: u64 = 1 << 32
    | bit(VIRTIO_NET_F_MQ)
    | bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_STATUS)
    | bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
const COMMAND: u64 = DATA + 0x1_0000;
const ANSWER_AT: u64 = DATA + 0x1_1000;
const UP: u8 = 1;
const ANNOUNCE: u8 = 2;

struct Rig {
    peer: Peer,
    card: VhostNet,
    memory: GuestMemory,
    drivers: Vec<Driver>,
    notices: Receiver<Notice>,
    control: usize,
    features: u64,
    _directory: tempfile::TempDir,
}

impl Rig {
    /// A card with two pairs, of which the driver has set up these queues.
    fn new(features: u64, queues: u16) -> Self {
        Self::with(features, queues, Manner::default())
    }

    fn with(features: u64, queues: u16, manner: Manner) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let peer = Peer::new(&path, manner);
        let config = serde_json::json!({
            "socket": path, "num_queues": 4, "queue_size": SIZE, "mac": "52:54:00:00:00:01",
        });
        let mut card = open(config, &context()).unwrap();
        let memory = shared();
        let drivers: Vec<_> = (0..queues)
            .map(|index| Driver::new(&memory, index, SIZE))
            .collect();
        let queues = drivers.iter().map(Driver::activate).collect();
        let notices = start(&mut card, features, &memory, queues);
        Self {
            peer,
            card,
            memory,
            control: drivers.len() - 1,
            drivers,
            notices,
            features,
            _directory: directory,
        }
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.card.read_config(6, &mut status);
        status[0]
    }

    /// Sends a command, and returns the answer.
    fn command(&mut self, class: u8, number: u8, data: &[u8]) -> u8 {
        let control = &mut self.drivers[self.control];
        control.put_bytes(COMMAND, &[&[class, number], data].concat());
        control.put_bytes(ANSWER_AT, &[0xee]);
        let len = u32::try_from(data.len()).unwrap();
        control.offer(&[
            (COMMAND, 2, false),
            (COMMAND + 2, len, false),
            (ANSWER_AT, 1, true),
        ]);
        control.kick();
        self.returned(self.control);
        self.drivers[self.control].get(ANSWER_AT)
    }

    /// Waits until a chain has come back by a queue, whatever else there is to hear.
    fn returned(&mut self, queue: usize) {
        while self.drivers[queue].returned().is_none() {
            self.notices.recv_timeout(PATIENCE).unwrap();
        }
    }

    fn offer(&mut self, queue: usize) {
        let at = DATA + 0x100 * u64::try_from(queue).unwrap();
        self.drivers[queue].offer(&[(at, 0x80, true)]);
        self.drivers[queue].kick();
    }

    fn serves(&self, wanted: [bool; 4]) {
        self.peer.until(|seen| {
            (0..4).zip(wanted).all(|(index, wanted)| {
                let enabled = seen.enabled.get(&index).copied();
                enabled.unwrap_or(false) == wanted
            })
        });
    }
}

fn start(
    card: &mut dyn VirtioDevice,
    features: u64,
    memory: &GuestMemory,
    queues: Vec<ActiveQueue>,
) -> Receiver<Notice> {
    let (notifier, heard) = notices();
    card.features_negotiated(features);
    card.start(Activation {
        features,
        memory: memory.clone(),
        queues,
        notifier,
    })
    .unwrap();
    heard
}

#[test]
fn pairs_are_served_as_the_driver_says() {
    let mut rig = Rig::new(ALL, 5);
    rig.offer(0);
    rig.returned(0);
    rig.serves([true, true, false, false]);
    rig.offer(2);
    assert_eq!(rig.command(4, 0, &[2, 0]), 0);
    rig.returned(2);
    rig.serves([true; 4]);
    for (class, number, data) in [
        (4, 0, &[0, 0][..]),
        (4, 0, &[3, 0]),
        (4, 0, &[2]),
        (4, 1, &[2, 0]),
        (0, 0, &[1]),
        (3, 0, &[1]),
        (9, 9, &[]),
    ] {
        assert_eq!(
            rig.command(class, number, data),
            1,
            "{class} {number} {data:?}"
        );
    }
    // As many after a stop.
    let stopped = rig.card.stop(Instant::now() + PATIENCE).unwrap();
    let mut queues: Vec<_> = stopped.into_iter().map(Driver::reactivate).collect();
    queues.sort_by_key(|queue| queue.index);
    assert_eq!(queues.len(), 5);
    rig.notices = start(&mut rig.card, rig.features, &rig.memory, queues);
    rig.offer(3);
    rig.returned(3);
    assert_eq!(rig.command(4, 0, &[1, 0]), 0);
    rig.serves([true, true, false, false]);
    rig.offer(1);
    rig.returned(1);
    assert_eq!(rig.peer.seen(|seen| seen.connections), 1);
}

#[test]
fn a_program_that_is_back_has_the_driver_announce_itself_until_it_has() {
    let mut rig = Rig::new(ALL, 5);
    rig.offer(0);
    rig.returned(0);
    assert_eq!(rig.status(), UP);
    rig.peer.die();
    while rig.status() != 0 {
        rig.notices.recv_timeout(PATIENCE).unwrap();
    }
    rig.peer.listen();
    while rig.status() == 0 {
        rig.notices.recv_timeout(PATIENCE).unwrap();
    }
    assert_eq!(rig.status(), UP | ANNOUNCE);
    assert_eq!(rig.command(3, 0, &[]), 0);
    assert_eq!(rig.status(), UP);
}

/// As a program gets it that announces what the driver does not.
const ADDRESS: u64 = 0x0100_0000_5452;

fn announcing() -> Manner {
    Manner {
        protocol: PROTOCOL | ANNOUNCES,
        ..Manner::default()
    }
}

#[test]
fn a_program_that_is_back_announces_a_driver_that_does_not() {
    for lacks in [VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_STATUS] {
        let mut rig = Rig::with(ALL & !bit(lacks), 5, announcing());
        rig.offer(0);
        rig.returned(0);
        for times in 1..3 {
            assert_eq!(rig.peer.seen(|seen| seen.announced.len()), times - 1);
            rig.peer.die();
            rig.peer.listen();
            rig.peer.until(|seen| seen.announced.len() == times);
            rig.offer(1);
            rig.returned(1);
        }
        assert_eq!(rig.peer.seen(|seen| seen.announced.clone()), [ADDRESS; 2]);
    }
}

#[test]
fn a_driver_that_announces_itself_is_not_announced() {
    let mut rig = Rig::with(ALL, 5, announcing());
    rig.offer(0);
    rig.returned(0);
    rig.peer.die();
    rig.peer.listen();
    rig.offer(1);
    rig.returned(1);
    assert_eq!(rig.status(), UP | ANNOUNCE);
    assert_eq!(rig.command(3, 0, &[]), 0);
    assert_eq!(rig.peer.seen(|seen| seen.announced.len()), 0);
}

#[test]
fn a_program_that_cannot_announce_is_not_asked_to() {
    let mut rig = Rig::new(ALL & !bit(VIRTIO_NET_F_GUEST_ANNOUNCE), 5);
    rig.offer(0);
    rig.returned(0);
    rig.peer.die();
    rig.peer.listen();
    rig.offer(1);
    rig.returned(1);
    assert_eq!(rig.command(0, 0, &[1]), 1);
    let asked = |seen: &crate::vhost::peer::Seen| seen.requests.contains(&request::SEND_RARP);
    assert!(!rig.peer.seen(asked));
}

#[test]
fn a_program_that_refuses_to_announce_is_taken_again() {
    for lie in [
        Lie::HangUp,
        Lie::Bytes(vec![0xff; 20]),
        Lie::Bytes(vec![0; 20]),
    ] {
        let features = ALL & !bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
        let mut rig = Rig::with(features, 5, announcing());
        rig.offer(0);
        rig.returned(0);
        rig.peer.die();
        rig.peer
            .change(|manner| drop(manner.lies.insert(request::SEND_RARP, lie)));
        rig.peer.listen();
        rig.peer.until(|seen| seen.connections >= 3);
        rig.peer.change(|manner| manner.lies.clear());
        rig.offer(1);
        rig.returned(1);
    }
}

#[test]
fn a_restored_card_is_announced_by_its_driver_or_by_the_program() {
    for own in [true, false] {
        let without = if own {
            0
        } else {
            bit(VIRTIO_NET_F_GUEST_ANNOUNCE)
        };
        let mut rig = Rig::with(ALL & !without, 5, announcing());
        let saved = rig.card.save_section("card").unwrap();
        let stopped = rig.card.stop(Instant::now() + PATIENCE).unwrap();
        rig.card.reset();
        rig.card.restore_section(&saved).unwrap();
        let mut queues: Vec<_> = stopped.into_iter().map(Driver::reactivate).collect();
        queues.sort_by_key(|queue| queue.index);
        rig.notices = start(&mut rig.card, rig.features, &rig.memory, queues);
        if own {
            while rig.notices.recv_timeout(PATIENCE).unwrap() != Notice::Config {}
            assert_eq!(rig.status(), UP | ANNOUNCE);
            assert_eq!(rig.command(3, 0, &[]), 0);
            assert_eq!(rig.status(), UP);
        } else {
            rig.peer.until(|seen| !seen.announced.is_empty());
        }
        let announced = rig.peer.seen(|seen| seen.announced.clone());
        assert_eq!(announced, vec![ADDRESS; usize::from(!own)]);
    }
}

/// Holds up whoever tells of the control queue, until it is opened.
struct Gate {
    inner: Arc<dyn Notifier>,
    /// Whether it is shut, and whether somebody stands before it.
    state: std::sync::Mutex<(bool, bool)>,
    changed: std::sync::Condvar,
}

impl Gate {
    fn open(&self) {
        self.state.lock().unwrap().0 = false;
        self.changed.notify_all();
    }

    fn until_reached(&self) {
        let state = self.state.lock().unwrap();
        let waited = self.changed.wait_timeout_while(state, PATIENCE, |s| !s.1);
        assert!(!waited.unwrap().1.timed_out());
    }
}

impl Notifier for Gate {
    fn queue(&self, queue: u16) {
        if queue == 4 {
            let mut state = self.state.lock().unwrap();
            state.1 = true;
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |state| state.0).unwrap());
        }
        self.inner.queue(queue);
    }

    fn config_changed(&self) {
        self.inner.config_changed();
    }

    fn needs_reset(&self, reason: &str) {
        self.inner.needs_reset(reason);
    }

    fn disk_report(&self, report: &DiskReport) {
        self.inner.disk_report(report);
    }

    fn peer_report(&self, report: &PeerReport) {
        self.inner.peer_report(report);
    }
}

#[test]
fn a_stop_that_the_control_queue_fails_leaves_everything_as_it_was() {
    let mut rig = Rig::new(ALL, 5);
    let stopped = rig.card.stop(Instant::now() + PATIENCE).unwrap();
    let mut queues: Vec<_> = stopped.into_iter().map(Driver::reactivate).collect();
    queues.sort_by_key(|queue| queue.index);
    let (inner, heard) = notices();
    let gate = Arc::new(Gate {
        inner,
        state: std::sync::Mutex::new((true, false)),
        changed: std::sync::Condvar::new(),
    });
    rig.notices = heard;
    let activation = Activation {
        features: rig.features,
        memory: rig.memory.clone(),
        queues,
        notifier: Arc::clone(&gate) as Arc<dyn Notifier>,
    };
    rig.card.start(activation).unwrap();
    let control = &mut rig.drivers[4];
    control.put_bytes(COMMAND, &[4, 0, 2, 0]);
    control.offer(&[(COMMAND, 4, false), (ANSWER_AT, 1, true)]);
    control.kick();
    gate.until_reached();
    rig.card.patience = Duration::ZERO;
    for queue in [0, 1] {
        let stopped = rig.card.stop(Instant::now() + PATIENCE);
        assert!(matches!(stopped, Err(StopError::Deadline { .. })));
        rig.offer(queue);
        rig.returned(queue);
    }
    gate.open();
    rig.returned(4);
    rig.card.patience = PATIENCE;
    let stopped = rig.card.stop(Instant::now() + PATIENCE).unwrap();
    let mut indexes: Vec<_> = stopped.iter().map(|queue| queue.index).collect();
    indexes.sort_unstable();
    assert_eq!(indexes, [0, 1, 2, 3, 4]);
}

#[test]
fn the_control_queue_of_a_driver_with_one_pair_follows_that() {
    let mut rig = Rig::new(ALL & !bit(VIRTIO_NET_F_MQ), 3);
    rig.offer(0);
    rig.returned(0);
    assert_eq!(rig.command(3, 0, &[]), 0);
    assert_eq!(rig.command(4, 0, &[1, 0]), 1);
    rig.serves([true, true, false, false]);
}

#[test]
fn queues_that_the_driver_has_no_use_for_are_given_back_as_they_were() {
    let mut rig = Rig::new(ALL & !bit(VIRTIO_NET_F_MQ), 5);
    for queue in [3, 4] {
        rig.offer(queue);
    }
    rig.offer(0);
    rig.returned(0);
    assert_eq!(rig.peer.seen(|seen| seen.connections), 1);
    let stopped = rig.card.stop(Instant::now() + PATIENCE).unwrap();
    let mut places: Vec<_> = stopped
        .iter()
        .map(|queue| (queue.index, virtio_queue::QueueT::next_avail(&queue.queue)))
        .collect();
    places.sort_unstable();
    assert_eq!(places, [(0, 1), (1, 0), (2, 0), (3, 0), (4, 0)]);
}

#[test]
fn a_program_that_counts_its_pairs_is_given_all_of_their_queues() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let manner = Manner {
        queues: 1,
        ..Manner::default()
    };
    let _peer = Peer::new(&path, manner);
    let config = serde_json::json!({ "socket": path, "queue_size": SIZE });
    let mut card = (MODEL.build)(config, &context()).unwrap();
    let memory = shared();
    let mut transmit = Driver::new(&memory, 1, SIZE);
    let features = ALL & !bit(VIRTIO_NET_F_MQ);
    let notices = start(&mut *card, features, &memory, vec![transmit.activate()]);
    transmit.offer(&[(DATA, 0x80, false)]);
    transmit.kick();
    while transmit.returned().is_none() {
        notices.recv_timeout(PATIENCE).unwrap();
    }
}

#[test]
fn what_is_saved_is_put_back_and_checked() {
    let mut rig = Rig::new(ALL, 5);
    assert_eq!(rig.command(4, 0, &[2, 0]), 0);
    let saved = rig.card.save_section("card").unwrap();
    let mut other = Rig::new(ALL, 5);
    other.card.restore_section(&saved).unwrap();
    let again = other.card.save_section("card").unwrap();
    let decode = |section: &migration::Section| section.decode::<VhostNetV2>().unwrap();
    assert_eq!(decode(&again), decode(&saved));
    assert_eq!(decode(&saved).registers.queues, 4);
    for queues in [0, 1, 3, 6] {
        let mut wrong = decode(&saved);
        wrong.registers.queues = queues;
        let wrong = migration::Section::encode("card", &wrong).unwrap();
        assert!(other.card.restore_section(&wrong).is_err());
    }
}

/// The address of the machine that was saved.
const FORMER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];
const OWN: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

fn address(card: &VhostNet) -> [u8; 6] {
    let mut address = [0; 6];
    card.read_config(0, &mut address);
    address
}

/// Puts the state of a machine with another address into a card, which is a copy's, and starts it.
fn start_copy(rig: &mut Rig) {
    let mut saved = rig.card.save().unwrap();
    saved.registers.mac = FORMER;
    let stopped = rig.card.stop(Instant::now() + PATIENCE).unwrap();
    rig.card.reset();
    rig.card.restore(saved).unwrap();
    assert_eq!(address(&rig.card), FORMER);
    rig.card.renew();
    // Also where it is saved before it has run.
    let saved = rig.card.save().unwrap();
    assert!(saved.blinks);
    rig.card.reset();
    rig.card.restore(saved).unwrap();
    let mut queues: Vec<_> = stopped.into_iter().map(Driver::reactivate).collect();
    queues.sort_by_key(|queue| queue.index);
    rig.notices = start(&mut rig.card, rig.features, &rig.memory, queues);
}

#[test]
fn a_copy_has_its_own_address_and_its_driver_sees_the_link_go_down_and_up() {
    let mut rig = Rig::new(ALL, 5);
    start_copy(&mut rig);
    assert_eq!(address(&rig.card), OWN);
    let until_told =
        |rig: &Rig| while rig.notices.recv_timeout(PATIENCE).unwrap() != Notice::Config {};
    until_told(&rig);
    // What does not look at the link changes nothing.
    rig.card.read_config(0, &mut [0; 6]);
    rig.card.read_config(7, &mut [0; 1]);
    rig.card.read_config(u64::MAX, &mut [0; 1]);
    assert!(rig.card.save().unwrap().blinks, "it has not been seen yet");
    assert_eq!(rig.status(), ANNOUNCE, "down, and to be announced");
    assert!(!rig.card.save().unwrap().blinks);
    until_told(&rig);
    assert_eq!(rig.status(), UP | ANNOUNCE);
    assert_eq!(rig.command(3, 0, &[]), 0);
    assert_eq!(rig.status(), UP);
}

#[test]
fn a_program_announces_a_copy_by_its_own_address() {
    let mut rig = Rig::with(ALL & !bit(VIRTIO_NET_F_GUEST_ANNOUNCE), 5, announcing());
    start_copy(&mut rig);
    rig.peer.until(|seen| !seen.announced.is_empty());
    assert_eq!(rig.peer.seen(|seen| seen.announced.clone()), [ADDRESS]);
}

#[test]
fn the_next_driver_sees_the_address_that_was_configured() {
    let mut rig = Rig::new(ALL, 5);
    let mut saved = rig.card.save().unwrap();
    saved.registers.mac = FORMER;
    rig.card.stop(Instant::now() + PATIENCE).unwrap();
    rig.card.restore(saved).unwrap();
    assert_eq!(address(&rig.card), FORMER, "as the driver knows it");
    rig.card.renew();
    rig.card.reset();
    assert_eq!(address(&rig.card), OWN);
    assert!(!rig.card.save().unwrap().blinks);
}

#[test]
fn state_of_before_there_were_links_that_blink_is_read() {
    let rig = Rig::new(ALL, 5);
    let saved = rig.card.save().unwrap();
    let registers = migration::Section::encode("card", &saved).unwrap();
    // The registers come first, and were all.
    let mut old = migration::Section {
        version: 1,
        ..registers
    };
    assert_eq!(old.body.pop(), Some(0));
    assert_eq!(old.decode::<VhostNetV2>().unwrap(), saved);
    old.version = 3;
    assert!(old.decode::<VhostNetV2>().is_err());
}
