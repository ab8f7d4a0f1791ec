//! Copies of frames, and how they are switched.

use std::fs;
use std::path::Path;

use super::*;
use crate::models::BuildError;

/// Bytes of a capture's head, and in front of each of its frames.
const HEAD: usize = 24;
const RECORD: usize = 16;

/// The frames in a capture.
fn captured(path: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    let mut rest = &bytes[HEAD..];
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let len = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        frames.push(rest[RECORD..RECORD + len].to_vec());
        rest = &rest[RECORD + len..];
    }
    frames
}

#[test]
fn frames_of_both_directions_are_copied_while_the_mirror_is_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcap");
    let mut rig = Rig::new();
    let exchange = |rig: &mut Rig, len: usize| {
        rig.post(DATA, 80);
        rig.post(DATA + 0x1000, 2000);
        let down = frame(MAC, len);
        rig.peer.send(&down).unwrap();
        while returned(&mut rig.rx, &rig.notices).1 == 80 {}
        let up = frame(OTHER, len + 1);
        rig.tx.put_bytes(DATA + 0x2000, &up);
        let (first, second) = (50, u32::try_from(up.len()).unwrap() - 50);
        rig.transmit(&[
            (DATA + 0x2000, first, false),
            (DATA + 0x2000 + 50, second, false),
        ]);
        assert_eq!(rig.arrived(), up);
        returned(&mut rig.tx, &rig.notices);
        [down, up].map(|frame| frame[HEADER_LEN..].to_vec())
    };
    exchange(&mut rig, 100);
    assert_eq!(
        rig.change(json!({ "mirror": { "file": path } })),
        Reconfigured::Unseen
    );
    // A turn that had begun may end without it.
    rig.tx.kick_and_wait();
    let copied = exchange(&mut rig, 200);
    rig.change(json!({ "mirror": {} }));
    rig.tx.kick_and_wait();
    exchange(&mut rig, 300);
    assert_eq!(captured(&path), copied);
    let counters = rig.counters();
    assert_eq!(
        [
            counters["rx_frames"],
            counters["tx_frames"],
            counters["mirror_frames"],
            counters["mirror_dropped"]
        ],
        [3, 3, 2, 0]
    );
}

#[test]
fn what_the_guest_does_not_get_is_not_copied_and_a_full_capture_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcap");
    let mut rig = Rig::new();
    rig.change(json!({ "mirror": { "file": path, "size": 262_144 }, "link": "down" }));
    rig.tx.kick_and_wait();
    rig.post(DATA, 60_000);
    rig.peer.send(&frame(MAC, 100)).unwrap();
    let patience = soon();
    while rig.counters()["rx_dropped"] == 0 {
        assert!(Instant::now() < patience);
        std::thread::yield_now();
    }
    rig.change(json!({ "link": "up" }));
    for at in 0..6 {
        if at > 0 {
            rig.post(DATA, 60_000);
        }
        rig.peer.send(&frame(MAC, 50_000 + at)).unwrap();
        returned(&mut rig.rx, &rig.notices);
    }
    rig.change(json!({ "mirror": {} }));
    let lens: Vec<_> = captured(&path).iter().map(Vec::len).collect();
    assert_eq!(lens, [50_000, 50_001, 50_002, 50_003, 50_004]);
    let counters = rig.counters();
    assert_eq!(
        (counters["mirror_frames"], counters["mirror_dropped"]),
        (5, 1)
    );
}

#[test]
fn a_mirror_that_makes_no_sense_or_cannot_be_had_changes_nothing() {
    let rig = Rig::new();
    let plan = |patch: Value| change::plan(patch, context(), false).map(drop);
    let refused = plan(json!({ "mirror": { "tap": "a", "file": "/a" } })).unwrap_err();
    let ReconfigureError::Value(BuildError::Field { field, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(field, "mirror_file");
    assert!(plan(json!({ "mirror": { "path": "/a" } })).is_err());
    let patch = json!({ "mirror": { "tap": "a" } });
    let opened = change::plan(patch, context(), false).unwrap()();
    assert!(matches!(opened, Err(ReconfigureError::Value(_))));
    drop(rig);
}
