use super::*;
use crate::limit::Bucket;
use crate::testing::{DATA, Driver, END, Notice, SEAM, memory, reset_reason, soon, start};
use serde_json::json;
use std::sync::Mutex;

struct Files;

impl block::Opener for Files {
    fn open(&self, path: &std::path::Path, _access: block::Access) -> std::io::Result<File> {
        File::open(path)
    }
}

#[test]
fn limits_that_are_changed_hold_at_once_and_for_the_request_that_waits() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let (clock, _now) = clock();
    let limits = RateLimits {
        bandwidth: None,
        ops: Some(a_second(1, 0)),
    };
    let mut rng = limited(1 << 20, limits, clock);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    for n in 0..2 {
        driver.offer(&[(DATA + n, 1, true)]);
    }
    driver.kick_and_wait();
    driver.wait(&notices);
    assert_eq!(driver.used_index(), 1);
    // No time passes: only the change lets the second go.
    change(&mut rng, json!({ "limits": {} }));
    driver.wait(&notices);
    assert_eq!(driver.used_index(), 2);
    change(&mut rng, json!({ "limits": limits }));
    for n in 0..2 {
        driver.offer(&[(DATA + n, 1, true)]);
    }
    driver.kick_and_wait();
    driver.wait(&notices);
    assert_eq!(driver.used_index(), 3);
    for wrong in [
        json!({}),
        json!({ "limits": null }),
        json!({ "limits": {}, "src": "/" }),
    ] {
        assert!(rng.prepare(wrong.clone(), context()).is_err(), "{wrong}");
    }
    assert_eq!(rng.stop(soon()).unwrap()[0].parked.len(), 1);
}

fn change(rng: &mut Rng, patch: Value) {
    let prepared = rng.prepare(patch, context()).unwrap()().unwrap();
    assert!(matches!(
        rng.reconfigure(prepared),
        Ok(Reconfigured::Unseen)
    ));
}

fn context() -> BuildContext {
    BuildContext {
        id: "rng0".to_owned(),
        networks: Arc::new(crate::testing::NoNetworks),
        opener: Arc::new(Files),
        cpus: 1,
        groups: limit::RateGroups::default(),
        ports: Arc::new(crate::models::console::NoPorts),
        awaited: None,
    }
}

/// A device whose random bytes are all 0x5a, `len` of them.
fn device(len: u64) -> Rng {
    limited(len, RateLimits::default(), Arc::new(Instant::now))
}

fn limited(len: u64, limits: RateLimits, clock: Clock) -> Rng {
    let mut file = tempfile::tempfile().unwrap();
    std::io::copy(
        &mut std::io::Read::take(std::io::repeat(0x5a), len),
        &mut file,
    )
    .unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    Rng::new("rng0", file, limits, clock)
}

/// A limit of so many bytes or requests each second.
fn a_second(size: u64, one_time_burst: u64) -> Bucket {
    Bucket {
        size,
        one_time_burst,
        refill_time: 1000,
    }
}

/// A clock, and what moves it.
fn clock() -> (Clock, Arc<Mutex<Instant>>) {
    let now = Arc::new(Mutex::new(Instant::now()));
    let shown = Arc::clone(&now);
    (Arc::new(move || *shown.lock().unwrap()), now)
}

#[test]
fn a_guest_gets_as_many_bytes_as_its_limit_and_burst_allow() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let (clock, now) = clock();
    let limits = RateLimits {
        bandwidth: Some(a_second(100, 50)),
        ops: None,
    };
    let mut rng = limited(1 << 20, limits, clock);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    // What is asked for is spent, also where it is more than the bucket holds.
    for len in [50, 60, 90] {
        driver.offer(&[(DATA, len, true)]);
        driver.kick();
        assert_eq!(driver.wait(&notices).1, len);
    }
    // The bucket owes 50 bytes: half a second, and something for the first byte.
    driver.offer(&[(DATA, 1, true)]);
    driver.kick_and_wait();
    *now.lock().unwrap() += Duration::from_millis(509);
    driver.kick_and_wait();
    let stopped = rng.stop(soon()).unwrap();
    assert_eq!(driver.used_index(), 3);
    assert_eq!(stopped[0].parked.len(), 1);
    let queues = stopped.into_iter().map(Driver::reactivate).collect();
    let notices = start(&mut rng, 0, &memory, queues);
    *now.lock().unwrap() += Duration::from_millis(1);
    driver.kick();
    assert_eq!(driver.wait(&notices).1, 1);
    let counted = rng.counters().unwrap().read();
    assert_eq!(counted[..2], [("requests", 4), ("bytes", 201)]);
    assert!(counted[3].1 > 0);
}

#[test]
fn a_guest_makes_as_many_requests_as_its_limit_allows_in_an_hour() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 64);
    let (clock, now) = clock();
    let limits = RateLimits {
        bandwidth: Some(a_second(1 << 20, 0)),
        ops: Some(a_second(2, 0)),
    };
    let mut rng = limited(1 << 20, limits, clock);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    for n in 0..64 {
        driver.offer(&[(DATA + n, 1, true)]);
    }
    for round in 0..32 {
        driver.kick();
        for _ in 0..2 {
            driver.wait(&notices);
        }
        assert_eq!(driver.used_index(), 2 * (round + 1));
        *now.lock().unwrap() += Duration::from_secs(1);
    }
}

#[test]
fn half_a_limit_is_refused() {
    for (config, part) in [
        (json!({"bw_size": 1}), "bw_refill_time"),
        (json!({"bw_refill_time": 1}), "bw_size"),
        (
            json!({"ops_size": 1, "ops_refill_time": 0}),
            "ops_refill_time",
        ),
    ] {
        let refused = (MODEL.build)(config, &context()).err().unwrap();
        assert!(refused.to_string().starts_with(part), "{refused}");
    }
    let limits = RateLimits {
        bandwidth: Some(a_second(100, 7)),
        ops: Some(a_second(3, 0)),
    };
    let config = RngConfig::new(PathBuf::from("/dev/urandom"), limits);
    assert_eq!(config.rate_limits().unwrap(), limits);
}

#[test]
fn buffers_are_filled_across_descriptors_and_regions() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let mut rng = device(1 << 20);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    let head = driver.offer(&[(DATA, 5, true), (SEAM - 3, 7, true)]);
    driver.kick();
    assert_eq!(driver.wait(&notices), (head.into(), 12));
    assert_eq!(driver.bytes(DATA, 6), [0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0]);
    assert_eq!(
        driver.bytes(SEAM - 4, 9),
        [0, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0]
    );
}

#[test]
fn a_request_gets_64_kib_at_most() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let mut rng = device(1 << 20);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    driver.offer(&[(DATA, 0xf000, true), (DATA + 0xf000, 0xf000, true)]);
    driver.kick();
    assert_eq!(driver.wait(&notices).1, 0x1_0000);
    assert_eq!(driver.bytes(DATA + 0xffff, 2), [0x5a, 0]);
}

#[test]
fn what_cannot_be_filled_comes_back_empty() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let mut rng = device(1 << 20);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    let cases: [&[(u64, u32, bool)]; 4] = [
        &[(DATA, 16, false)],
        &[(DATA, 0, true)],
        &[(END, 16, true)],
        &[(u64::MAX - 3, 16, true)],
    ];
    for pieces in cases {
        let head = driver.offer(pieces);
        driver.kick();
        assert_eq!(driver.wait(&notices), (head.into(), 0), "{pieces:?}");
    }
    assert_eq!(driver.bytes(DATA, 16), [0; 16]);
    // It is not the source that failed.
    assert!(!rng.service.told.load(Ordering::Relaxed));
}

#[test]
fn a_source_that_ends_ends_the_request_short() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let mut rng = device(24);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    driver.offer(&[(DATA, 16, true), (DATA + 16, 16, true)]);
    driver.kick();
    assert_eq!(driver.wait(&notices).1, 16);
    let counted = rng.counters().unwrap().read();
    assert_eq!(
        counted,
        [
            ("requests", 1),
            ("bytes", 16),
            ("errors", 1),
            ("limited", 0)
        ]
    );
    assert!(rng.service.told.load(Ordering::Relaxed));
}

#[test]
fn a_loop_of_descriptors_marks_the_device_broken_and_it_can_be_stopped() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let mut rng = device(1 << 20);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    driver.describe(driver.table(), 0, DATA, 1, 3, 0);
    driver.offer_head(0);
    driver.kick();
    assert!(reset_reason(&notices).contains("loops"));
    let stopped = rng.stop(soon()).unwrap();
    assert_eq!(stopped.len(), 1);
    assert_eq!(driver.used_index(), 0);
}

#[test]
fn a_stopped_queue_goes_on_where_it_was_with_parked_chains_first() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let mut rng = device(1 << 20);
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    driver.offer(&[(DATA, 4, true)]);
    driver.kick();
    driver.wait(&notices);
    let mut stopped = rng.stop(soon()).unwrap();
    assert!(rng.stop(soon()).unwrap().is_empty());
    // The worker is gone: nobody is left to send more.
    assert!(notices.iter().all(|n| n == Notice::Queue(0)));

    let mut queue = Driver::reactivate(stopped.remove(0));
    queue.parked = vec![driver.chain(&[(DATA + 8, 4, true)])];
    let parked = queue.parked[0];
    let fresh = driver.offer(&[(DATA + 16, 4, true)]);
    let notices = start(&mut rng, 0, &memory, vec![queue]);
    assert_eq!(driver.wait(&notices), (parked.into(), 4));
    assert_eq!(driver.wait(&notices), (fresh.into(), 4));
    let stopped = rng.stop(soon()).unwrap();
    assert!(stopped[0].parked.is_empty());
}

#[test]
fn a_flood_of_requests_is_interrupted_once_for_each_batch() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 64);
    let mut rng = device(1 << 20);
    for i in 0..64 {
        driver.offer(&[(DATA + i * 4, 4, true)]);
    }
    let notices = start(&mut rng, 0, &memory, vec![driver.activate()]);
    assert_eq!(notices.recv(), Ok(Notice::Queue(0)));
    for _ in 0..64 {
        assert!(driver.returned().is_some());
    }
    rng.stop(soon()).unwrap();
    assert_eq!(notices.iter().count(), 0);
}

#[test]
fn the_table_of_fields_and_the_struct_agree() {
    let bucket = Some(a_second(1, 1));
    let limits = RateLimits {
        bandwidth: bucket,
        ops: bucket,
    };
    let config = RngConfig::new(default_source(), limits);
    let Value::Object(object) = serde_json::to_value(config).unwrap() else {
        panic!("a struct is an object");
    };
    let mut names: Vec<_> = MODEL.fields.iter().map(|f| f.name).collect();
    names.sort_unstable();
    let mut keys: Vec<_> = object.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, names);
    assert!(serde_json::from_value::<RngConfig>(json!({"colour": 1})).is_err());
}

#[test]
fn a_device_is_built_from_nothing_and_names_a_source_it_cannot_open() {
    let built = (MODEL.build)(json!({}), &context()).unwrap();
    assert_eq!(built.identity().device_type, 4);
    let missing = (MODEL.build)(json!({"src": "/nonexistent/entropy"}), &context());
    let error = missing.err().unwrap();
    assert!(
        error.to_string().contains("/nonexistent/entropy"),
        "{error}"
    );
}

#[test]
fn saved_state_is_empty_and_strict() {
    use migration::DynSnapshot;
    let mut rng = device(0);
    let mut section = rng.save_section("rng0").unwrap();
    rng.restore_section(&section).unwrap();
    section.body.push(0);
    assert!(rng.restore_section(&section).is_err());
}
