//! What a device counts, and by which clock.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::*;

/// A device whose clock stands until it is set forward, in microseconds.
fn timed(features: u64) -> (Rig, Arc<AtomicU64>) {
    let passed = Arc::new(AtomicU64::new(0));
    let (hands, origin) = (Arc::clone(&passed), Instant::now());
    let clock: Clock =
        Arc::new(move || origin + Duration::from_micros(hands.load(Ordering::SeqCst)));
    (Rig::timed(info(64), features, 16, Some(clock)), passed)
}

fn counted(rig: &Rig) -> BTreeMap<&'static str, u64> {
    let counters = rig.blk.counters().unwrap().read();
    counters
        .into_iter()
        .filter(|(_, value)| *value > 0)
        .collect()
}

/// Does a request during which `micros` pass at the disk.
fn last(rig: &mut Rig, passed: &AtomicU64, micros: u64, kind: u32, data: &[Piece]) {
    rig.disk.close();
    rig.offer(kind, 0, data);
    rig.driver.kick();
    rig.call();
    passed.fetch_add(micros, Ordering::SeqCst);
    rig.disk.open();
    rig.driver.wait(&rig.notices);
}

#[test]
fn requests_are_counted_with_their_bytes_and_the_time_that_they_were_at_the_disk() {
    let (mut rig, passed) = timed(ALL & !EVENT_IDX);
    let none = counted(&rig);
    last(&mut rig, &passed, 300, IN, &[(DATA, 1024, true)]);
    last(&mut rig, &passed, 100, IN, &[(DATA, 512, true)]);
    last(&mut rig, &passed, 4000, OUT, &[(DATA, 512, false)]);
    rig.request(FLUSH, 0, &[]);
    rig.segment(DATA, 0, 1, 0);
    rig.segment(DATA + 16, 1, 1, 0);
    rig.request(DISCARD, 0, &[(DATA, 32, false)]);
    rig.request(ZEROES, 0, &[(DATA, 32, false)]);
    // Answered without the disk: not counted.
    rig.request(GET_ID, 0, &[(DATA, 20, true)]);
    let mut expected = none;
    expected.extend([
        ("read_ops", 2),
        ("read_bytes", 1536),
        ("read_latency_min", 100),
        ("read_latency_max", 300),
        ("read_latency_avg", 200),
        ("read_time_us", 400),
        ("write_ops", 1),
        ("write_bytes", 512),
        ("write_latency_min", 4000),
        ("write_latency_max", 4000),
        ("write_latency_avg", 4000),
        ("write_time_us", 4000),
        ("flush_ops", 1),
        ("discard_ops", 1),
        ("write_zeroes_ops", 1),
    ]);
    assert_eq!(counted(&rig), expected);
}

#[test]
fn what_fails_counts_as_an_error_and_as_nothing_else() {
    let (mut rig, _) = timed(ALL & !EVENT_IDX);
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    assert_eq!(rig.request(IN, 0, &[(DATA, 512, true)]).0, IOERR);
    // Past the end, and of no kind: the disk never hears of them.
    assert_eq!(rig.request(IN, 64, &[(DATA, 512, true)]).0, IOERR);
    assert_eq!(rig.request(2, 0, &[]).0, UNSUPP);
    let counted = counted(&rig);
    assert_eq!(counted["errors"], 3);
    assert!(!counted.contains_key("read_ops"), "{counted:?}");
}

#[test]
fn a_write_that_is_made_durable_is_one_write_with_all_of_its_time() {
    let (mut rig, passed) = timed(0);
    rig.disk.close();
    rig.offer(OUT, 0, &[(DATA, 512, false)]);
    rig.driver.kick();
    rig.call();
    passed.fetch_add(100, Ordering::SeqCst);
    rig.disk.open();
    rig.driver.wait(&rig.notices);
    let counted = counted(&rig);
    assert_eq!(counted["write_ops"], 1);
    assert!(counted["write_latency_max"] >= 100);
    assert!(!counted.contains_key("flush_ops"), "{counted:?}");
}

#[test]
fn counts_go_on_over_a_stop_and_a_reset() {
    let mut rig = Rig::new();
    rig.request(IN, 0, &[(DATA, 512, true)]);
    let stopped = rig.blk.stop(soon()).unwrap();
    rig.blk.reset();
    assert_eq!(counted(&rig)["read_ops"], 1);
    let queues = stopped.into_iter().map(ActiveQueue::from).collect();
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, queues);
    rig.request(IN, 0, &[(DATA, 512, true)]);
    assert_eq!(counted(&rig)["read_ops"], 2);
}
