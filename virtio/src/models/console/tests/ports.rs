//! Ports that come and go.

use serde_json::json;

use super::*;
use crate::models::console::spec::PORT_REMOVE;

/// Adds or removes a port, whose end is `peer`.
fn change(device: &mut Console, patch: Value, peer: Option<&Arc<Peer>>) -> Result<(), String> {
    let ends = peer.map(|peer| (Some("log"), Arc::clone(peer)));
    let host = Host(ends.into_iter().collect());
    let prepared = change::plan(patch, &host).and_then(|prepare| prepare());
    let changed = prepared.and_then(|prepared| device.reconfigure(prepared));
    changed
        .map(|how| assert_eq!(how, Reconfigured::Unseen))
        .map_err(|error| error.to_string())
}

fn add(device: &mut Console, peer: &Arc<Peer>) {
    change(device, json!({"add": "log"}), Some(peer)).unwrap();
}

fn remove(device: &mut Console, name: &str) {
    change(device, json!({"remove": name}), None).unwrap();
}

/// A device with one named port, 1, in use with room for another.
fn bench() -> Bench {
    let ends = vec![(None, Peer::new()), (Some("agent"), Peer::new())];
    let mut bench = Bench::new(device("agent", ends), 8, F_MULTIPORT);
    bench.take_into_use();
    bench
}

/// What a driver does with a port that it hears of.
fn take_up(bench: &mut Bench) {
    assert_eq!(bench.hear(), (2, PORT_ADD, 1, vec![]));
    bench.say(2, PORT_READY, 1);
    assert_eq!(bench.hear(), (2, PORT_NAME, 1, b"log".to_vec()));
    assert_eq!(bench.hear(), (2, PORT_OPEN, 1, vec![]));
    bench.say(2, PORT_OPEN, 1);
}

#[test]
fn a_port_comes_and_goes_and_comes_again_while_the_guest_runs() {
    let mut bench = bench();
    for round in 0..3 {
        let log = Peer::new();
        add(&mut bench.device, &log);
        take_up(&mut bench);
        bench.write(7, b"hello");
        assert_eq!(log.output(), b"hello", "{round}");
        bench.buffer(6, 0, 64);
        log.change(|far| far.input.extend(b"hi"));
        assert_eq!(bench.read(6, 0), b"hi");
        // A buffer that nothing comes for stays the driver's.
        bench.buffer(6, 1, 64);
        log.wait(|far| far.wants.0);
        remove(&mut bench.device, "log");
        assert!(!log.far.lock().unwrap().guest_open);
        assert_eq!(Arc::strong_count(&log), 1, "the end is open");
        assert_eq!(bench.hear(), (2, PORT_REMOVE, 1, vec![]));
        bench.write(7, b"too late");
        log.change(|far| far.input.extend(b"xx"));
        // As the driver takes its buffers out of the ring.
        bench.queues[6].take_back();
    }
    assert_eq!(
        bench.device.counters().unwrap().read()[2],
        ("dropped_bytes", 24)
    );
}

#[test]
fn what_a_port_that_goes_was_sending_comes_back_to_the_guest() {
    let mut bench = bench();
    let log = Peer::new();
    log.change(|far| far.room = 3);
    add(&mut bench.device, &log);
    take_up(&mut bench);
    bench.offer(7, 0, b"0123456789");
    bench.offer(7, 1, b"abc");
    log.wait(|far| far.wants.1);
    remove(&mut bench.device, "log");
    bench.returned(7);
    bench.returned(7);
    assert_eq!(bench.hear().1, PORT_REMOVE);
    assert_eq!(
        bench.device.counters().unwrap().read()[2],
        ("dropped_bytes", 10)
    );
}

#[test]
fn a_driver_that_does_not_listen_hears_of_a_port_once_and_of_its_end_not_at_all() {
    let mut bench = bench();
    add(&mut bench.device, &Peer::new());
    remove(&mut bench.device, "log");
    add(&mut bench.device, &Peer::new());
    take_up(&mut bench);
    // A new driver is told of what is there alone.
    remove(&mut bench.device, "log");
    bench.say(u32::MAX, DEVICE_READY, 1);
    assert_eq!(bench.hear(), (0, PORT_ADD, 1, vec![]));
    assert_eq!(bench.hear(), (1, PORT_ADD, 1, vec![]));
    add(&mut bench.device, &Peer::new());
    assert_eq!(bench.hear(), (2, PORT_ADD, 1, vec![]));
}

#[test]
fn ports_keep_their_numbers_in_a_saved_state_and_one_that_goes_is_still_told_of() {
    let ends = vec![(None, Peer::new())];
    let mut bench = Bench::new(device("a:b:c", ends), 10, F_MULTIPORT);
    bench.say(u32::MAX, DEVICE_READY, 1);
    for port in 0..4 {
        assert_eq!(bench.hear(), (port, PORT_ADD, 1, vec![]));
    }
    remove(&mut bench.device, "a");
    assert_eq!(bench.hear(), (1, PORT_REMOVE, 1, vec![]));
    let queues = bench.device.stop(soon()).unwrap();
    remove(&mut bench.device, "b");
    let saved = bench.device.save().unwrap();
    let numbers: Vec<_> = saved
        .ports
        .iter()
        .map(|p| (p.number, p.tell_remove))
        .collect();
    assert_eq!(numbers, [(0, false), (2, true), (3, false)]);
    let log = Peer::new();
    let mut other = device(
        "c",
        vec![(None, Peer::new()), (Some("c"), Arc::clone(&log))],
    );
    other.restore(saved).unwrap();
    assert_eq!(other.save().unwrap(), bench.device.save().unwrap());
    bench.device = other;
    bench.restart(
        queues.into_iter().map(ActiveQueue::from).collect(),
        F_MULTIPORT,
    );
    assert_eq!(bench.hear(), (2, PORT_REMOVE, 1, vec![]));
    bench.say(3, PORT_READY, 1);
    assert_eq!(bench.hear(), (3, PORT_NAME, 1, b"c".to_vec()));
    assert_eq!(bench.hear(), (3, PORT_OPEN, 1, vec![]));
    bench.write(9, b"there");
    assert_eq!(log.output(), b"there");
}

#[test]
fn a_state_with_impossible_ports_is_refused() {
    let edits: [fn(&mut ConsoleV1); 5] = [
        |s| s.ports[1].number = 8,
        |s| s.ports[1].number = 0,
        |s| s.ports[1].number = u32::MAX,
        |s| s.ports[1].name = None,
        |s| s.ports.swap_remove(1).number = 0,
    ];
    for (number, edit) in edits.iter().enumerate() {
        let mut saved = device("agent", vec![]).save().unwrap();
        edit(&mut saved);
        let mut other = device("agent", vec![]);
        assert!(other.restore(saved).is_err(), "edit {number}");
        assert_eq!(
            other.save().unwrap(),
            device("agent", vec![]).save().unwrap()
        );
    }
}

#[test]
fn ports_that_cannot_be_had_are_refused_with_the_mend() {
    let mut full = device("1:2:3:4:5:6:7", vec![]);
    for (patch, part) in [
        (json!({"add": "log"}), "room for 8 ports: remove one first"),
        (json!({"add": "3"}), "there is a port '3' already"),
        (json!({"add": "a/b"}), "'a/b' is no name"),
        (json!({"remove": "log"}), "there is no port 'log'"),
        (json!({"drop": "log"}), "another shape"),
    ] {
        let refused = change(&mut full, patch, None).unwrap_err();
        assert!(refused.contains(part), "{refused}");
    }
    let refused = change(&mut device("", vec![]), json!({"add": "log"}), None);
    assert!(
        refused
            .unwrap_err()
            .contains("--virtio-console max_ports=8")
    );
    let roomy = |max_ports, ports: &str| {
        let config = ConsoleConfig {
            console: true,
            ports: ports.to_owned(),
            max_ports: Some(max_ports),
        };
        let made = Console::new("x", &config, Arc::new(NoPorts));
        made.map(|device| device.identity().queue_sizes.len())
            .map_err(|error| error.to_string())
    };
    assert_eq!(roomy(1, ""), Ok(2));
    assert_eq!(roomy(3, "a"), Ok(8));
    for (count, ports) in [(0, ""), (2, "a:b"), (32, ""), (u64::MAX, "")] {
        assert!(
            roomy(count, ports).unwrap_err().contains("to 31"),
            "{count}"
        );
    }
}
