//! What belongs to every model beside its file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use virtio::models::MODELS;

use crate::driver::Driver;
use crate::requests::exercise;
use crate::rig::Rig;
use crate::subjects::{Subject, all};

/// One line for each model that does not have it.
fn report(rule: &str, lacks: impl Fn(&Subject) -> bool) {
    let subjects = all();
    let mut lacking = Vec::new();
    for model in MODELS {
        let subject = subjects.iter().find(|subject| subject.name == model.kind);
        if subject.is_none_or(&lacks) {
            lacking.push(model.kind);
        }
    }
    assert!(lacking.is_empty(), "{rule}: {lacking:?}");
}

#[test]
fn every_model_is_in_the_conformance_and_hostile_suites() {
    report("add it to subjects.rs", |_| false);
}

/// What moves when a device is asked for everything that it does ([`exercise`]), by kind.
const MOVING: &[(&str, &[&str])] = &[
    (
        "balloon",
        &[
            "inflated_pages",
            "deflated_pages",
            "ignored_pages",
            "hinted_bytes",
            "statistics_updates",
        ],
    ),
    (
        "blk",
        &[
            "read_bytes",
            "read_ops",
            "read_latency_min",
            "read_latency_max",
            "read_latency_avg",
            "write_bytes",
            "write_ops",
            "write_latency_min",
            "write_latency_max",
            "write_latency_avg",
            "flush_ops",
            "discard_ops",
            "write_zeroes_ops",
            "errors",
        ],
    ),
    (
        "console",
        &[
            "tx_bytes",
            "rx_bytes",
            "dropped_bytes",
            "control_messages",
            "control_errors",
        ],
    ),
    ("fs", &["requests"]),
    (
        "input",
        &["reports", "lost_reports", "bad_buffers", "status_events"],
    ),
    (
        "mem",
        &[
            "plugged_bytes",
            "plugged_blocks",
            "unplugged_blocks",
            "refused_requests",
            "invalid_requests",
        ],
    ),
    (
        "net",
        &[
            "rx_bytes",
            "rx_frames",
            "rx_dropped",
            "rx_errors",
            "tx_bytes",
            "tx_frames",
            "tx_errors",
        ],
    ),
    ("rng", &["requests", "bytes", "errors"]),
    ("vhost-user-blk", &["requests"]),
    ("vhost-user-net", &["requests"]),
    (
        "vsock",
        &[
            "tx_packets",
            "tx_bytes",
            "rx_packets",
            "errors",
            "connected",
            "refused",
            "connections",
        ],
    ),
];

/// What stands still then, because it is of the host's faults, of limits, of time that is too short to show, of servers
/// that have something to say, or of memory that can be given back, neither of which is here.
const STILL: &[(&str, &[&str])] = &[
    (
        "balloon",
        &["discarded_bytes", "reported_bytes", "discard_errors"],
    ),
    ("blk", &["read_time_us", "write_time_us"]),
    ("fs", &["peer_connected", "peer_losses"]),
    ("mem", &["host_errors"]),
    ("net", &["tx_dropped", "mirror_frames", "mirror_dropped"]),
    ("rng", &["limited"]),
    ("vhost-user-blk", &["peer_connected", "peer_losses"]),
    ("vhost-user-net", &["peer_connected", "peer_losses"]),
    ("vsock", &["rx_bytes"]),
];

fn named(table: &[(&str, &[&'static str])], kind: &str) -> BTreeSet<&'static str> {
    let found = table.iter().find(|(of, _)| *of == kind);
    found
        .map(|(_, names)| names.iter().copied().collect())
        .unwrap_or_default()
}

#[test]
fn every_model_counts_what_it_does() {
    for model in MODELS {
        let subject = Subject::model(model);
        let kind = subject.name;
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        let rings = driver.boot();
        let before: BTreeMap<_, _> = rig.device.counters().into_iter().collect();
        let mut listed = named(MOVING, kind);
        listed.extend(named(STILL, kind));
        let there: BTreeSet<_> = before.keys().copied().collect();
        assert_eq!(there, listed, "{kind}: name it in MOVING");
        exercise(kind, &rig, &driver, &rings);
        assert!(!rig.device.needs_reset(), "{kind}: {:?}", rig.events.take());
        rig.settle();
        rig.stop();
        let after = rig.device.counters().into_iter();
        let moved = after.filter(|(name, value)| before[name] != *value);
        let moved: BTreeSet<_> = moved.map(|(name, _)| name).collect();
        let lacking: Vec<_> = named(MOVING, kind).difference(&moved).copied().collect();
        assert!(lacking.is_empty(), "{kind} does not count {lacking:?}");
    }
}

#[test]
fn directories_alone_do_not_go_to_another_host_with_their_guest() {
    for model in MODELS {
        let subject = Subject::model(model);
        let rig = Rig::new(&subject);
        let bound = rig.device.bound_here().is_some();
        assert_eq!(bound, subject.name == "fs", "{}", subject.name);
    }
}

#[test]
fn every_model_saves_a_section_of_its_own_that_can_be_put_back() {
    report(
        "its section is not named virtio-KIND, or is refused",
        |subject| {
            let rig = Rig::new(subject);
            Driver::probe(&rig).boot();
            rig.stop();
            let saved = rig.save();
            let schema = format!("virtio-{}", subject.name);
            let own = saved.sections().iter().any(|s| s.schema == schema);
            !own || rig.successor(subject).save() != saved
        },
    );
}

#[test]
fn every_model_has_a_fuzz_target() {
    let makefile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Makefile");
    let makefile = fs::read_to_string(makefile).unwrap();
    let words: Vec<&str> = makefile.split_whitespace().collect();
    report("add virtio/KIND to FUZZED in the Makefile", |subject| {
        let target = format!("virtio/{}", subject.name);
        !words.contains(&target.as_str())
    });
}
