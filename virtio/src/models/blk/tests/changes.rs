//! Limits, and what is changed of a device in use: limits and media.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::channel;
use std::time::Duration;

use serde_json::json;
use tempfile::NamedTempFile;

use super::configuration::context;
use super::*;
use crate::limit::{Bucket, Limiter, RateLimits};
use crate::models::BuildError;

fn reconfigure(blk: &mut dyn VirtioDevice, patch: Value) -> Result<Reconfigured, ReconfigureError> {
    let prepare = blk.prepare(patch, context())?;
    blk.reconfigure(prepare()?)
}

/// A device whose clock stands, and what its worker says of how long it sleeps.
struct Limited {
    rig: Rig,
    passed: Arc<AtomicU64>,
    sleeps: Receiver<Duration>,
}

impl Limited {
    fn new(limits: RateLimits) -> Self {
        let passed = Arc::new(AtomicU64::new(0));
        let (hands, origin) = (Arc::clone(&passed), Instant::now());
        let memory = memory();
        let (disk, calls) = disk(info(1024));
        let (sender, sleeps) = channel();
        *disk.0.sleeps.lock().unwrap() = Some(sender);
        let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings(1));
        blk.clock = Arc::new(move || origin + Duration::from_millis(hands.load(Ordering::SeqCst)));
        blk.throttle.own = Arc::new(Limiter::new(limits));
        let driver = Driver::new(&memory, 0, 16);
        let notices = start(&mut blk, ALL & !EVENT_IDX, &memory, vec![driver.activate()]);
        let rig = Rig {
            memory,
            disk,
            calls,
            blk,
            driver,
            notices,
        };
        Self {
            rig,
            passed,
            sleeps,
        }
    }

    /// The next time that the worker sleeps for a time, how long that is.
    fn sleep(&self) -> Duration {
        self.sleeps.recv_timeout(PATIENCE).unwrap()
    }

    /// Lets time pass and the worker see it.
    fn pass(&self, milliseconds: u64) {
        self.passed.fetch_add(milliseconds, Ordering::SeqCst);
        self.rig.disk.rouse();
    }

    /// Offers a read of one sector, with a place of its own for everything.
    fn offer(&mut self, sector: u64) -> u16 {
        let area = DATA + 0x1000 * sector;
        self.rig.header(area, IN, sector);
        let driver = &mut self.rig.driver;
        let head = driver.offer(&[
            (area, 16, false),
            (area + 512, 512, true),
            (area + 32, 1, true),
        ]);
        driver.kick();
        head
    }

    fn ended(&mut self, head: u16) {
        let (id, written) = self.rig.driver.wait(&self.rig.notices);
        assert_eq!((id, written), (u32::from(head), 513));
    }
}

fn bucket(size: u64, refill_time: u64) -> Option<Bucket> {
    Some(Bucket {
        size,
        one_time_burst: 0,
        refill_time,
    })
}

fn ops(size: u64, refill_time: u64) -> RateLimits {
    RateLimits {
        bandwidth: None,
        ops: bucket(size, refill_time),
    }
}

#[test]
fn a_request_over_the_limit_sleeps_until_it_may_go_and_those_behind_it_stay_in_order() {
    let mut limited = Limited::new(ops(2, 1000));
    for sector in [0, 1] {
        let head = limited.offer(sector);
        limited.ended(head);
    }
    let heads = [2, 3].map(|sector| limited.offer(sector));
    assert_eq!(limited.sleep(), Duration::from_millis(500));
    limited.pass(400);
    while limited.sleep() != Duration::from_millis(100) {}
    assert_eq!(limited.rig.calls().len(), 2);
    limited.pass(100);
    limited.ended(heads[0]);
    while limited.sleep() != Duration::from_millis(500) {}
    limited.pass(500);
    limited.ended(heads[1]);
    let offsets: Vec<_> = limited.rig.calls().into_iter().map(|call| call.1).collect();
    assert_eq!(offsets, [1024, 1536]);
}

#[test]
fn bytes_are_counted_for_what_moves_them_and_answers_from_the_device_are_free() {
    let mut limited = Limited::new(RateLimits {
        bandwidth: bucket(1024, 1024),
        ops: None,
    });
    let data = [(DATA, 1024, true)];
    assert_eq!(limited.rig.request(IN, 0, &data), (OK, 1025));
    assert_eq!(
        limited.rig.request(GET_ID, 0, &[(DATA, 20, true)]),
        (OK, 21)
    );
    // Out of range.
    assert_eq!(limited.rig.request(IN, 5000, &data), (IOERR, 1));
    let head = limited.offer(2);
    assert_eq!(limited.sleep(), Duration::from_millis(1));
    limited.pass(1);
    limited.ended(head);
}

#[test]
fn new_limits_reach_a_request_that_waits() {
    let mut limited = Limited::new(ops(1, 1_000_000));
    let first = limited.offer(0);
    limited.ended(first);
    let second = limited.offer(1);
    limited.sleep();
    let patch = json!({"limits": {"ops": {"size": 4, "refill_time": 1000}}});
    let changed = reconfigure(&mut limited.rig.blk, patch).unwrap();
    assert_eq!(changed, Reconfigured::Unseen);
    limited.ended(second);
    // None at all.
    let lifted = json!({"limits": {}});
    reconfigure(&mut limited.rig.blk, lifted).unwrap();
    for sector in 0..16 {
        let head = limited.offer(sector);
        limited.ended(head);
    }
}

#[test]
fn a_device_stops_with_a_request_that_waits_and_the_next_start_takes_it_first() {
    let mut limited = Limited::new(ops(1, 1000));
    let first = limited.offer(0);
    limited.ended(first);
    let heads = [1, 2].map(|sector| limited.offer(sector));
    limited.sleep();
    let rig = &mut limited.rig;
    let stopped = rig.blk.stop(soon()).unwrap().remove(0);
    assert_eq!(stopped.parked, [heads[0]]);
    let queue = Driver::reactivate(stopped);
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, vec![queue]);
    assert_eq!(limited.sleep(), Duration::from_millis(1000));
    limited.pass(1000);
    limited.ended(heads[0]);
    limited.pass(1000);
    limited.ended(heads[1]);
}

#[test]
fn a_queue_that_waits_does_not_hold_up_another_device_of_its_group() {
    let shared = Arc::new(Limiter::new(ops(2, 1_000_000)));
    let mut rigs = [(); 2].map(|()| {
        let mut limited = Limited::new(RateLimits::default());
        limited.rig.blk.stop(soon()).unwrap();
        limited.rig.blk.throttle.group = Some(Arc::clone(&shared));
        limited.rig.driver = Driver::new(&limited.rig.memory, 1, 16);
        let queue = limited.rig.driver.activate();
        let features = ALL & !EVENT_IDX;
        let rig = &mut limited.rig;
        rig.notices = start(&mut rig.blk, features, &rig.memory, vec![queue]);
        limited
    });
    let [a, b] = &mut rigs;
    a.rig.blk.throttle.own.set(ops(1, 1_000_000));
    let head = a.offer(0);
    a.ended(head);
    a.offer(1);
    a.sleep();
    let head = b.offer(0);
    b.ended(head);
    b.offer(1);
    b.sleep();
}

fn image(fill: u8, sectors: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let size = usize::try_from(sectors * 512).unwrap();
    std::fs::write(file.path(), vec![fill; size]).unwrap();
    file
}

/// A device on a file, in use.
struct OnFile {
    blk: Box<dyn VirtioDevice>,
    driver: Driver,
    notices: Receiver<Notice>,
}

impl OnFile {
    fn new(path: &Path, read_only: bool) -> Self {
        let config = json!({"path": path, "readonly": read_only, "num_queues": 1});
        let mut blk = (MODEL.build)(config, &context()).unwrap();
        let memory = memory();
        let driver = Driver::new(&memory, 0, 16);
        let notices = start(
            &mut *blk,
            ALL & !EVENT_IDX,
            &memory,
            vec![driver.activate()],
        );
        Self {
            blk,
            driver,
            notices,
        }
    }

    /// The first byte of a sector, or the status of a read that failed.
    fn read(&mut self, sector: u64) -> Result<u8, u8> {
        let driver = &mut self.driver;
        driver.put(HEADER, u64::from(IN));
        driver.put(HEADER + 8, sector);
        driver.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        driver.kick();
        driver.wait(&self.notices);
        match driver.get::<u8>(STATUS) {
            OK => Ok(driver.get(DATA)),
            status => Err(status),
        }
    }

    fn sectors(&self) -> u64 {
        let mut bytes = [0; 8];
        self.blk.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn insert(&mut self, path: &Path) -> Result<Reconfigured, ReconfigureError> {
        reconfigure(&mut *self.blk, json!({ "path": path }))
    }
}

#[test]
fn a_read_only_device_gets_another_medium_while_it_is_in_use() {
    let (first, second) = (image(1, 8), image(2, 24));
    let mut device = OnFile::new(first.path(), true);
    assert_eq!(device.read(0), Ok(1));
    assert_eq!(device.read(8), Err(IOERR));
    assert_eq!(device.insert(second.path()).unwrap(), Reconfigured::Seen);
    assert_eq!(device.sectors(), 24);
    assert_eq!(device.read(8), Ok(2));
    assert_eq!(device.insert(first.path()).unwrap(), Reconfigured::Seen);
    assert_eq!(device.read(0), Ok(1));
    assert_eq!(device.read(8), Err(IOERR));
    // One that is not in use, too.
    device.blk.stop(soon()).unwrap();
    device.insert(second.path()).unwrap();
    assert_eq!(device.sectors(), 24);
    assert!(device.blk.stop(soon()).unwrap().is_empty());
}

#[test]
fn a_medium_that_cannot_be_used_leaves_the_one_before() {
    let (first, foreign) = (image(1, 8), image(2, 8));
    std::fs::write(foreign.path(), b"QFI\xfb and so on").unwrap();
    let mut device = OnFile::new(first.path(), true);
    for path in [Path::new("/does/not/exist"), foreign.path(), Path::new("")] {
        let refused = device.insert(path);
        let value = matches!(
            refused,
            Err(ReconfigureError::Value(BuildError::Backend(_)))
        );
        assert!(value, "{refused:?}");
        assert_eq!(device.read(0), Ok(1));
    }
    let own = image(1, 8);
    let mut writable = OnFile::new(own.path(), false);
    let refused = writable.insert(foreign.path()).unwrap_err();
    assert!(refused.to_string().contains("readonly=on"), "{refused}");
    assert_eq!(writable.read(0), Ok(1));
}

#[test]
fn what_cannot_be_changed_is_refused() {
    let mut rig = Rig::new();
    for patch in [
        json!({"x": 1}),
        json!({"limits": {"x": 1}}),
        json!(7),
        json!(null),
    ] {
        let refused = reconfigure(&mut rig.blk, patch.clone());
        assert!(
            matches!(refused, Err(ReconfigureError::Shape(_))),
            "{patch}"
        );
    }
    let fixed = reconfigure(&mut rig.blk, json!({"path": "/a"}));
    assert!(matches!(fixed, Err(ReconfigureError::Fixed)));
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn limits_are_configured_whole_and_groups_are_there() {
    let image = image(0, 8);
    let build = |more: Value| {
        let mut config = json!({"path": image.path(), "readonly": true});
        let map = config.as_object_mut().unwrap();
        map.extend(more.as_object().unwrap().clone());
        (MODEL.build)(config, &context()).map(drop)
    };
    build(json!({"bw_size": 1, "bw_refill_time": 1, "ops_size": 1, "ops_refill_time": 1})).unwrap();
    build(json!({"ops_size": 1, "ops_refill_time": 1, "ops_one_time_burst": 1})).unwrap();
    for (more, named) in [
        (json!({"bw_size": 1}), "bw_refill_time"),
        (json!({"bw_refill_time": 1}), "bw_size"),
        (json!({"ops_one_time_burst": 1}), "ops_size"),
        (json!({"rate_limit_group": "g"}), "rate_limit_group"),
    ] {
        let refused = build(more).unwrap_err();
        assert!(
            matches!(&refused, BuildError::Field { field, .. } if *field == named),
            "{refused}"
        );
    }
}
