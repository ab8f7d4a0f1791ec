use super::*;
use crate::testing::{DATA, Driver, END, Notice, SEAM, memory, reset_reason, soon, start};
use serde_json::json;
use std::sync::Arc;

struct Files;

impl block::Opener for Files {
    fn open(&self, path: &std::path::Path, _access: block::Access) -> std::io::Result<File> {
        File::open(path)
    }
}

fn context() -> BuildContext {
    BuildContext {
        id: "rng0".to_owned(),
        networks: Arc::new(crate::testing::NoNetworks),
        opener: Arc::new(Files),
        cpus: 1,
        groups: crate::limit::RateGroups::default(),
        ports: Arc::new(crate::models::console::NoPorts),
    }
}

/// A device whose random bytes are all 0x5a, `len` of them.
fn device(len: u64) -> Rng {
    let mut file = tempfile::tempfile().unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0x5a), len), &mut file).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    Rng::new("rng0", file)
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
    assert_eq!(counted, [("requests", 1), ("bytes", 16), ("errors", 1)]);
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
    let config: RngConfig = serde_json::from_value(json!({})).unwrap();
    let Value::Object(object) = serde_json::to_value(config).unwrap() else {
        panic!("a struct is an object");
    };
    let names: Vec<_> = MODEL.fields.iter().map(|f| f.name).collect();
    assert_eq!(object.keys().map(String::as_str).collect::<Vec<_>>(), names);
    assert!(serde_json::from_value::<RngConfig>(json!({"colour": 1})).is_err());
}

#[test]
fn a_device_is_built_from_nothing_and_names_a_source_it_cannot_open() {
    let built = (MODEL.build)(json!({}), &context()).unwrap();
    assert_eq!(built.identity().device_type, 4);
    let missing = (MODEL.build)(json!({"src": "/nonexistent/entropy"}), &context());
    let error = missing.err().unwrap();
    assert!(error.to_string().contains("/nonexistent/entropy"), "{error}");
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
