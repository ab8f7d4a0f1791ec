//! The control queue and what it changes.

use super::*;
use crate::models::net::spec::TAGGED_LEN;

const COMMAND: u64 = DATA + 0x10_000;
const ANSWER: u64 = DATA + 0x18_000;
const UNSET: u8 = 0xee;

/// Sends a command and returns the answer.
fn command(rig: &mut Rig, class: u8, number: u8, data: &[u8]) -> u8 {
    let bytes = [&[class, number], data].concat();
    rig.control.put_bytes(COMMAND, &bytes);
    rig.control.put_bytes(ANSWER, &[UNSET]);
    let len = u32::try_from(data.len()).unwrap();
    rig.control.offer(&[
        (COMMAND, 2, false),
        (COMMAND + 2, len, false),
        (ANSWER, 1, true),
    ]);
    rig.control.kick();
    assert_eq!(returned(&mut rig.control, &rig.notices).1, 1);
    rig.control.get(ANSWER)
}

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Of frames to these, sent in this order, which come: to itself, another, all.
fn wanted(rig: &mut Rig) -> Vec<[u8; 6]> {
    let all = [0xff; 6];
    for to in [MAC, OTHER, all, [0, 0, 0, 0, 0, 0x33]] {
        rig.peer.send(&frame(to, 60)).unwrap();
    }
    let mut come = Vec::new();
    loop {
        rig.post(DATA, 512);
        returned(&mut rig.rx, &rig.notices);
        let to: [u8; 6] = rig.rx.get(DATA + 12);
        // Unless it is promiscuous the last one is let through by the table that the test has set.
        if to == [0, 0, 0, 0, 0, 0x33] {
            return come;
        }
        come.push(to);
    }
}

fn table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    let count = |list: &[[u8; 6]]| u32::try_from(list.len()).unwrap().to_le_bytes();
    [
        &count(unicast)[..],
        &unicast.concat(),
        &count(multicast),
        &multicast.concat(),
    ]
    .concat()
}

#[test]
fn frames_come_as_the_driver_has_said() {
    let mut rig = Rig::new();
    let all = [0xff; 6];
    let last = [0, 0, 0, 0, 0, 0x33];
    assert_eq!(wanted(&mut rig), [MAC, OTHER, all]);
    assert_eq!(command(&mut rig, 1, 0, &table(&[last], &[])), OK);
    assert_eq!(command(&mut rig, 0, 0, &[0]), OK);
    assert_eq!(wanted(&mut rig), [MAC, all]);
    assert_eq!(command(&mut rig, 0, 5, &[1]), OK);
    assert_eq!(wanted(&mut rig), [MAC]);
    assert_eq!(command(&mut rig, 1, 1, &OTHER), OK);
    assert_eq!(wanted(&mut rig), [OTHER]);
    let mut mac = [0; 6];
    rig.net.read_config(0, &mut mac);
    assert_eq!(mac, OTHER);
    assert_eq!(command(&mut rig, 0, 2, &[1]), OK);
    assert_eq!(wanted(&mut rig), [MAC, OTHER]);
    assert_eq!(rig.counters()["rx_dropped"], 2 + 3 - 1 + 2 + 1 - 1);
}

#[test]
fn commands_that_make_no_sense_are_answered_so_and_change_nothing() {
    let mut rig = Rig::with(ALL, 2, None);
    let before = rig.net.save().unwrap();
    let mut cut = table(&[MAC], &[OTHER]);
    cut.pop();
    let mut long = table(&[], &[]);
    long.push(0);
    let endless = [u32::MAX.to_le_bytes().as_slice(), &[0; 40]].concat();
    let cases: [(u8, u8, &[u8]); 22] = [
        (0, 0, &[]),
        (0, 0, &[2]),
        (0, 0, &[1, 1]),
        (0, 6, &[1]),
        (1, 0, &[]),
        (1, 0, &cut),
        (1, 0, &long),
        (1, 0, &endless),
        (1, 1, &[2, 0, 0, 0, 0]),
        (1, 1, &[1, 0, 0, 0, 0, 1]),
        (1, 1, &[0; 6]),
        (1, 2, &[]),
        (2, 0, &[0, 0x10]),
        (2, 0, &[1]),
        (2, 2, &[1, 0]),
        (3, 1, &[]),
        (4, 0, &[0, 0]),
        (4, 0, &[3, 0]),
        (4, 1, &[1, 0]),
        (5, 0, &[0xff; 8]),
        (5, 0, &[0; 7]),
        (9, 0, &[]),
    ];
    for (class, number, data) in cases {
        let answer = command(&mut rig, class, number, data);
        assert_eq!(answer, ERROR, "{class} {number} {data:?}");
    }
    assert_eq!(rig.net.save().unwrap(), before);
    // Without room for an answer nothing is done; nor without a command.
    rig.control.put_bytes(COMMAND, &[0, 0, 0]);
    rig.control.offer(&[(COMMAND, 3, false)]);
    rig.control.kick();
    assert_eq!(returned(&mut rig.control, &rig.notices).1, 0);
    rig.control.put_bytes(ANSWER, &[UNSET]);
    rig.control.offer(&[(COMMAND, 1, false), (ANSWER, 1, true)]);
    rig.control.kick();
    assert_eq!(returned(&mut rig.control, &rig.notices).1, 1);
    assert_eq!(rig.control.get::<u8>(ANSWER), ERROR);
    assert_eq!(rig.net.save().unwrap(), before);
}

#[test]
fn commands_that_were_not_negotiated_are_refused() {
    let mut rig = Rig::with(bit(VIRTIO_NET_F_CTRL_VQ), 1, None);
    let cases: [(u8, u8, &[u8]); 7] = [
        (0, 0, &[0]),
        (1, 0, &table(&[], &[])),
        (1, 1, &OTHER),
        (2, 0, &[1, 0]),
        (3, 0, &[]),
        (4, 0, &[1, 0]),
        (5, 0, &[0; 8]),
    ];
    for (class, number, data) in cases {
        assert_eq!(
            command(&mut rig, class, number, data),
            ERROR,
            "{class} {number}"
        );
    }
}

#[test]
fn pairs_are_attached_as_the_driver_uses_them() {
    let mut rig = Rig::with(ALL, 2, None);
    assert_eq!(command(&mut rig, 4, 0, &[2, 0]), OK);
    assert_eq!(command(&mut rig, 4, 0, &[1, 0]), OK);
    let told = std::mem::take(&mut *rig.told.lock().unwrap());
    assert_eq!(
        told,
        ["1 pairs", "CSUM+TSO4+TSO6+ECN+USO", "2 pairs", "1 pairs"]
    );
    assert_eq!(command(&mut rig, 4, 0, &[2, 0]), OK);
    rig.stop();
    rig.net.reset();
    assert_eq!(rig.told.lock().unwrap().as_slice(), ["2 pairs", "1 pairs"]);
}

#[test]
fn offloads_are_switched_off_and_on() {
    let mut rig = Rig::new();
    assert_eq!(command(&mut rig, 5, 0, &[0; 8]), OK);
    let both = bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_TSO6);
    assert_eq!(command(&mut rig, 5, 0, &both.to_le_bytes()), OK);
    let alone = bit(VIRTIO_NET_F_GUEST_TSO6) | bit(VIRTIO_NET_F_GUEST_USO4);
    assert_eq!(command(&mut rig, 5, 0, &alone.to_le_bytes()), OK);
    let told = rig.told.lock().unwrap();
    assert_eq!(told[2..], ["", "CSUM+TSO6", ""]);
}

#[test]
fn what_the_driver_has_said_goes_on_elsewhere_and_is_announced() {
    let mut rig = Rig::with(ALL, 2, None);
    let group = [1, 0, 0x5e, 0, 0, 9];
    let say: [(u8, u8, &[u8]); 7] = [
        (0, 0, &[0]),
        (0, 1, &[1]),
        (1, 0, &table(&[OTHER], &[group])),
        (1, 1, &[2, 0, 0, 0, 0, 7]),
        (2, 0, &[100, 0]),
        (4, 0, &[2, 0]),
        (5, 0, &bit(VIRTIO_NET_F_GUEST_CSUM).to_le_bytes()),
    ];
    for (class, number, data) in say {
        assert_eq!(command(&mut rig, class, number, data), OK);
    }
    rig.change(json!({ "link": "down" }));
    let queues = rig.stop();
    let saved = rig.net.save().unwrap();
    let registers = &saved.registers;
    assert_eq!(registers.multicast.as_deref(), Some(&[group][..]));
    assert_eq!(
        (registers.pairs, registers.link, registers.promiscuous),
        (2, false, false)
    );
    let (mut other, _peer, told) = device(2);
    other.restore(saved).unwrap();
    assert_eq!(other.save().unwrap(), rig.net.save().unwrap());
    let features = rig.net.features();
    let (notifier, notices) = crate::testing::notices();
    other
        .start(Activation {
            features,
            memory: rig.memory.clone(),
            queues,
            notifier,
        })
        .unwrap();
    assert_eq!(*told.lock().unwrap(), ["2 pairs", "CSUM"]);
    assert_eq!(notices.recv_timeout(PATIENCE).unwrap(), Notice::Config);
    (rig.net, rig.notices) = (other, notices);
    assert_eq!(rig.status(), 2);
    assert_eq!(command(&mut rig, 3, 0, &[]), OK);
    assert_eq!(rig.status(), 0);
}

#[test]
fn a_copy_has_its_own_address_and_its_driver_sees_the_link_go_down_and_up() {
    let mut rig = Rig::new();
    // The driver wants its own frames alone.
    assert_eq!(command(&mut rig, 0, 0, &[0]), OK);
    let queues = rig.stop();
    let mut saved = rig.net.save().unwrap();
    saved.registers.mac = OTHER;
    let (mut other, _peer, _) = device(1);
    other.restore(saved).unwrap();
    other.renew();
    let filter = other.shared.filter();
    assert_eq!(filter.mac, MAC, "as it is configured");
    // The driver that runs does not know it yet.
    assert_eq!(filter.former, Some(OTHER));
    let to = |address: [u8; 6]| {
        let mut start = [0; TAGGED_LEN];
        start[..6].copy_from_slice(&address);
        start
    };
    assert!(filter.wants(&to(OTHER)) && filter.wants(&to(MAC)));
    assert_eq!(other.save().unwrap().former, Some(OTHER));
    // Also where it is saved before it has run.
    let saved = other.save().unwrap();
    let (mut other, _peer, _) = device(1);
    other.restore(saved).unwrap();
    let features = rig.net.features();
    let (notifier, notices) = crate::testing::notices();
    other
        .start(Activation {
            features,
            memory: rig.memory.clone(),
            queues,
            notifier,
        })
        .unwrap();
    (rig.net, rig.notices) = (other, notices);
    let config = |rig: &Rig| rig.notices.recv_timeout(PATIENCE).unwrap() == Notice::Config;
    assert!(config(&rig));
    // What does not look at the link changes nothing.
    rig.net.read_config(0, &mut [0; 6]);
    rig.net.read_config(7, &mut [0; 1]);
    rig.net.read_config(u64::MAX, &mut [0; 1]);
    assert!(rig.notices.try_recv().is_err());
    assert!(rig.net.save().unwrap().blinks, "it has not been seen yet");
    assert_eq!(rig.status(), 2, "down, and to be announced");
    assert!(!rig.net.save().unwrap().blinks);
    assert!(config(&rig), "it is told to look again");
    assert_eq!(rig.status(), 3);
    assert!(rig.notices.try_recv().is_err());
    // Frames pass all the while, also to its address when it says that it has no others.
    assert!(rig.net.shared.link());
    assert_eq!(command(&mut rig, 1, 0, &table(&[], &[])), OK);
    assert!(rig.net.shared.filter().wants(&to(OTHER)));
    rig.stop();
    rig.net.reset();
    assert_eq!(rig.net.shared.filter().former, None);
}

#[test]
fn a_network_is_told_where_a_card_is_that_has_come_and_of_a_copy_it_is_not() {
    for copied in [false, true] {
        let mut rig = Rig::new();
        let queues = rig.stop();
        let (mut other, _peer, told) = device(1);
        other.restore(rig.net.save().unwrap()).unwrap();
        if copied {
            other.renew();
        }
        let features = rig.net.features();
        let start = |net: &mut Net, queues: Vec<ActiveQueue>| {
            let (notifier, _notices) = crate::testing::notices();
            let memory = rig.memory.clone();
            net.start(Activation {
                features,
                memory,
                queues,
                notifier,
            })
        };
        start(&mut other, queues).unwrap();
        let here = || {
            let told = told.lock().unwrap();
            told.iter()
                .filter(|told| told.ends_with(" is here"))
                .count()
        };
        assert_eq!(here(), usize::from(!copied));
        // A pause is no arrival.
        let stopped = other.stop(soon()).unwrap();
        let queues = stopped.into_iter().map(Driver::reactivate).collect();
        start(&mut other, queues).unwrap();
        assert_eq!(here(), usize::from(!copied));
    }
}

#[test]
fn state_of_before_there_were_links_that_blink_is_read() {
    let (mut net, _peer, _) = device(1);
    let saved = net.save().unwrap();
    let new = migration::Section::encode("net", &saved).unwrap();
    // The registers come first, and were all.
    let mut old = migration::Section { version: 1, ..new };
    assert_eq!(old.body.split_off(old.body.len() - 2), [0, 0]);
    let read: NetV2 = old.decode().unwrap();
    assert_eq!(read, saved);
    net.restore(read).unwrap();
    old.version = 3;
    assert!(old.decode::<NetV2>().is_err());
}

/// Something impossible in a saved state.
type Edit = fn(&mut NetV2);

#[test]
fn state_that_cannot_be_is_refused() {
    let (mut net, _peer, _) = device(2);
    let edits: [Edit; 7] = [
        |state| state.registers.pairs = 0,
        |state| state.registers.pairs = 3,
        |state| state.registers.mac = [1; 6],
        |state| state.registers.guest_offloads = 1 << 50,
        |state| state.registers.unicast = Some(vec![MAC; 65]),
        |state| state.registers.vlans = Some(vec![0; 63]),
        |state| state.former = Some([1; 6]),
    ];
    for edit in edits {
        let mut state = net.save().unwrap();
        edit(&mut state);
        assert!(net.restore(state).is_err());
    }
}
