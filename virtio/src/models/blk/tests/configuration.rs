//! Configuration: of the device by its user, and of its registers by the driver.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use block::{Cache, Discard, DiskOptions};
use serde_json::{Map, Value, json};

use super::*;
use crate::limit::RateGroups;
use crate::models::{BuildContext, BuildError};
use crate::schema::FieldKind;

struct Files;

impl block::Opener for Files {
    fn open(&self, path: &Path, access: block::Access) -> std::io::Result<File> {
        File::options().read(true).write(access.write).open(path)
    }
}

pub(super) fn context() -> BuildContext {
    BuildContext {
        id: "disk0".to_owned(),
        networks: Arc::new(crate::testing::NoNetworks),
        opener: Arc::new(Files),
        cpus: 2,
        groups: RateGroups::default(),
        ports: Arc::new(crate::models::console::NoPorts),
        awaited: None,
    }
}

fn config(value: Value) -> BlkConfig {
    serde_json::from_value(value).unwrap()
}

fn space(blk: &Blk) -> Vec<u8> {
    let mut bytes = vec![0xff; 80];
    blk.read_config(0, &mut bytes);
    bytes
}

fn le(bytes: &[u8]) -> u64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(wide)
}

fn device(info: DiskInfo, queues: u16) -> Blk {
    let (disk, _calls) = disk(info);
    Blk::new("disk0", Arc::new(disk), settings(queues))
}

#[test]
fn the_configuration_space_is_laid_out_as_specified() {
    let mut facts = info(1024);
    facts.logical_block = 1024;
    facts.physical_block = 8192;
    let blk = device(facts, 3);
    let bytes = space(&blk);
    for (at, len, value) in [
        (0, 8, 1024),  // capacity
        (8, 4, 0),     // size_max
        (12, 4, 14),   // seg_max
        (16, 4, 0),    // geometry
        (20, 4, 1024), // blk_size
        (24, 1, 3),    // physical_block_exp
        (25, 1, 0),    // alignment_offset
        (26, 2, 8),    // min_io_size
        (28, 4, 0),    // opt_io_size
        (32, 1, 1),    // writeback
        (34, 2, 3),    // num_queues
        (36, 4, 1 << 22),
        (40, 4, 32),
        (44, 4, 16), // discard_sector_alignment
        (48, 4, 1 << 16),
        (52, 4, 32),
        (56, 1, 1), // write_zeroes_may_unmap
        (57, 8, 0),
        (65, 8, 0),
    ] {
        assert_eq!(le(&bytes[at..at + len]), value, "offset {at}");
    }
    let mut part = [0xff; 4];
    blk.read_config(20, &mut part);
    assert_eq!(part, 1024_u32.to_le_bytes());
    for offset in [71, 72, 4096, u64::MAX] {
        let mut past = [0xff; 4];
        blk.read_config(offset, &mut past);
        assert_eq!(past, [0; 4], "offset {offset}");
    }
}

#[test]
fn features_follow_the_disk() {
    let features = |info, queues| device(info, queues).identity().features;
    // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE
    let always = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11;
    let mut facts = info(8);
    assert_eq!(features(facts.clone(), 1), always | 1 << 13 | 1 << 14);
    assert_eq!(features(facts.clone(), 2), always | 3 << 13 | 1 << 12);
    facts.discard = false;
    assert_eq!(features(facts.clone(), 1), always | 1 << 14);
    facts.read_only = true;
    assert_eq!(features(facts, 1), always | 1 << 5);
}

#[test]
fn the_identity_is_a_disk_of_so_many_queues() {
    let identity = device(info(8), 3).identity();
    assert_eq!(identity.device_type, 2);
    assert_eq!(identity.queue_sizes, [16, 16, 16]);
    assert_eq!(identity.pci_class, [1, 0, 0]);
}

#[test]
fn writeback_is_the_drivers_only_if_it_accepted_the_field() {
    let mut blk = device(info(8), 1);
    let writeback = |blk: &Blk| space(blk)[32];
    blk.features_negotiated(bit(VIRTIO_BLK_F_FLUSH));
    blk.write_config(32, &[0]);
    assert_eq!(writeback(&blk), 1);
    blk.features_negotiated(ALL);
    blk.write_config(32, &[0]);
    assert_eq!(writeback(&blk), 0);
    blk.write_config(30, &[0, 0, 1, 0]);
    assert_eq!(writeback(&blk), 1);
    // Everything else is read-only.
    let before = space(&blk);
    for (offset, data) in [(0, &[0; 32][..]), (33, &[0; 47]), (u64::MAX, &[0])] {
        blk.write_config(offset, data);
    }
    assert_eq!(space(&blk), before);
}

#[test]
fn writeback_begins_as_0_without_flushes_and_a_reset_restores_it() {
    let mut blk = device(info(8), 1);
    blk.features_negotiated(bit(VIRTIO_BLK_F_CONFIG_WCE));
    assert_eq!(space(&blk)[32], 0);
    blk.reset();
    assert_eq!(space(&blk)[32], 1);
    // What was accepted before is not now.
    blk.write_config(32, &[0]);
    assert_eq!(space(&blk)[32], 1);
}

#[test]
fn a_write_through_disk_shows_it_and_is_not_flushed_again() {
    let memory = memory();
    let (disk, calls) = disk(info(8));
    let mut settings = settings(1);
    settings.write_through = true;
    let mut blk = Blk::new("disk0", Arc::new(disk), settings);
    assert_eq!(space(&blk)[32], 0);
    let mut driver = Driver::new(&memory, 0, 16);
    let notices = start(&mut blk, 0, &memory, vec![driver.activate()]);
    driver.put(HEADER, OUT);
    driver.offer(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
    driver.kick();
    driver.wait(&notices);
    assert_eq!(driver.get::<u8>(STATUS), OK);
    assert_eq!(calls.try_iter().collect::<Vec<_>>(), [(Op::Write, 0, 512)]);
}

#[test]
fn registers_survive_a_save_and_a_restore() {
    let mut blk = device(info(8), 1);
    blk.features_negotiated(ALL);
    blk.write_config(32, &[0]);
    let section = blk.save_section("disk0").unwrap();
    let mut other = device(info(8), 1);
    other.restore_section(&section).unwrap();
    assert_eq!(space(&other), space(&blk));
    assert_eq!(other.save_section("disk0").unwrap(), section);
}

#[test]
fn saved_registers_of_another_disk_and_damaged_ones_are_refused() {
    let section = device(info(8), 1).save_section("disk0").unwrap();
    let refused = device(info(9), 1).restore_section(&section);
    let reason = refused.unwrap_err().to_string();
    assert!(
        reason.contains("9 sectors") && reason.contains('8'),
        "{reason}"
    );
    let mut blk = device(info(8), 1);
    for len in 0..section.body.len() {
        let mut cut = section.clone();
        cut.body.truncate(len);
        assert!(blk.restore_section(&cut).is_err(), "{len} bytes");
    }
    let mut damaged = section;
    *damaged.body.last_mut().unwrap() = 2;
    assert!(blk.restore_section(&damaged).is_err());
}

/// A value that a field of this kind takes.
fn sample(name: &str, kind: FieldKind) -> Vec<Value> {
    match kind {
        FieldKind::Switch => vec![json!(true), json!(false)],
        FieldKind::Bytes | FieldKind::Number => vec![json!(4)],
        FieldKind::Text | FieldKind::Path => vec![json!(name)],
        FieldKind::Ipv4 => vec![json!("10.0.0.1")],
        FieldKind::Choice(words) => words.iter().map(|w| json!(w)).collect(),
    }
}

#[test]
fn the_table_of_fields_and_the_struct_agree() {
    let mut full = Map::new();
    for field in MODEL.fields {
        for value in sample(field.name, field.kind) {
            let mut object = Map::from_iter([("path".to_owned(), json!("/a"))]);
            object.insert(field.name.to_owned(), value.clone());
            full.insert(field.name.to_owned(), value);
            let parsed = serde_json::from_value::<BlkConfig>(Value::Object(object));
            assert!(parsed.is_ok(), "{}: {parsed:?}", field.name);
        }
        let required = serde_json::from_value::<BlkConfig>(json!({})).is_err();
        assert!(required && field.required == (field.name == "path"));
    }
    let everything = config(Value::Object(full.clone()));
    let Value::Object(back) = serde_json::to_value(everything).unwrap() else {
        panic!("a struct is an object");
    };
    assert_eq!(back, full);
    let unknown = json!({"path": "/a", "colour": "red"});
    assert!(serde_json::from_value::<BlkConfig>(unknown).is_err());
}

#[test]
fn defaults_are_a_plain_cached_disk_with_a_queue_for_each_cpu() {
    let config = config(json!({"path": "/a"}));
    let queues = |cpus| config.settings(cpus).unwrap().num_queues;
    assert_eq!([0, 1, 2, 4, 64].map(queues), [1, 1, 2, 4, 4]);
    let options = config.image_options();
    let expected = DiskOptions {
        discard: Discard::Unmap,
        ..DiskOptions::default()
    };
    assert_eq!(options.disk, expected);
    assert_eq!(options.backing, block::BackingPolicy::Directory);
    assert_eq!(options.cache_size, None);
    let settings = config.settings(1).unwrap();
    assert_eq!((settings.queue_size, settings.serial), (256, [0; 20]));
    assert!(!settings.write_through);
}

#[test]
fn every_field_reaches_the_disk_or_the_device() {
    let config = config(json!({
        "path": "/a", "readonly": true, "format": "raw", "direct": true, "lock": false, "lease": "/lease",
        "cache": "writethrough", "discard": "ignore", "serial": "01234567890123456789",
        "num_queues": 256, "queue_size": 32768, "aio": "io_uring",
        "backing": "any", "l2_cache_size": 1_u64 << 20, "rerror": "stop", "werror": "ignore",
        "detect_zeroes": "unmap",
    }));
    let expected = DiskOptions {
        read_only: true,
        cache: Cache::Writethrough,
        direct: Some(true),
        aio: block::Aio::IoUring,
        discard: Discard::Ignore,
        format: Some(block::Format::Raw),
        lock: false,
        lease: Some("/lease".into()),
        detect_zeroes: block::DetectZeroes::Unmap,
    };
    let options = config.image_options();
    assert_eq!(options.disk, expected);
    assert_eq!(options.backing, block::BackingPolicy::Any);
    assert_eq!(options.cache_size, Some(1 << 20));
    let settings = config.settings(1).unwrap();
    assert_eq!((settings.num_queues, settings.queue_size), (256, 32768));
    assert_eq!(&settings.serial, b"01234567890123456789");
    assert!(settings.write_through);
    assert_eq!(settings.rerror, OnReadError::Stop);
    assert_eq!(settings.werror, OnWriteError::Ignore);
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    let cases = [
        ("num_queues", json!(0)),
        ("num_queues", json!(257)),
        ("num_queues", json!(u64::MAX)),
        ("queue_size", json!(0)),
        ("queue_size", json!(2)),
        ("queue_size", json!(100)),
        ("queue_size", json!(65536)),
        ("serial", json!("012345678901234567890")),
        ("serial", json!("a\0b")),
    ];
    for (name, value) in cases {
        let built = (MODEL.build)(json!({"path": "/a", name: value}), &context());
        match built.err() {
            Some(BuildError::Field { field, reason }) => {
                assert_eq!(field, name);
                assert!(!reason.is_empty());
            }
            other => panic!("{name}={value}: {other:?}"),
        }
    }
}

#[test]
fn a_disk_that_cannot_be_opened_is_named() {
    let built = (MODEL.build)(json!({"path": "/nonexistent/disk.raw"}), &context());
    let Some(error @ BuildError::Backend(_)) = built.err() else {
        panic!("it was built");
    };
    assert!(
        error.to_string().contains("/nonexistent/disk.raw"),
        "{error}"
    );
}

#[test]
fn the_uri_of_an_export_is_no_path() {
    for (uri, reason) in [
        ("nbd://h/x", "connections are not allowed here"),
        ("nbd+unix:///x", "it names no socket"),
        ("nbds://h/x", "TLS is not built in yet"),
    ] {
        let built = (MODEL.build)(json!({"path": uri}), &context());
        let Some(BuildError::Backend(error)) = built.err() else {
            panic!("it was built");
        };
        assert!(error.to_string().contains(uri), "{error}");
        let source = error.source().unwrap().to_string();
        assert!(source.contains(reason), "{source}");
    }
}

/// A raw image, through the registry, on either engine.
#[test]
fn a_raw_image_is_written_flushed_and_read_back() {
    for aio in ["io_uring", "threads"] {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let config = json!({"path": image.path(), "aio": aio, "num_queues": 1});
        let mut blk = (MODEL.build)(config, &context()).unwrap();
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 64);
        let notices = start(
            &mut *blk,
            ALL & !EVENT_IDX,
            &memory,
            vec![driver.activate()],
        );
        let mut request = |kind: u32, sector: u64, data: &[Piece]| {
            driver.put(HEADER, kind);
            driver.put(HEADER + 8, sector);
            driver.put(STATUS, UNSET);
            let mut pieces = vec![(HEADER, 16, false)];
            pieces.extend(data);
            pieces.push((STATUS, 1, true));
            driver.offer(&pieces);
            driver.kick();
            driver.wait(&notices);
            assert_eq!(driver.get::<u8>(STATUS), OK, "type {kind} by {aio}");
        };
        let view = memory.memory();
        let pattern: Vec<u8> = (0..8192_u32).map(|i| i.to_le_bytes()[1] | 1).collect();
        vm_memory::Bytes::write_slice(&*view, &pattern, vm_memory::GuestAddress(SEAM - 4096))
            .unwrap();
        request(OUT, 8, &[(SEAM - 4096, 8192, false)]);
        request(FLUSH, 0, &[]);
        request(IN, 8, &[(DATA, 4096, true), (DATA + 0x3000, 4096, true)]);
        assert_eq!(driver.bytes(DATA, 4096), pattern[..4096]);
        assert_eq!(driver.bytes(DATA + 0x3000, 4096), pattern[4096..]);
        assert_eq!(blk.stop(soon()).unwrap().len(), 1);
        let mut bytes = Vec::new();
        image.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes[4096..4096 + 8192], pattern);
    }
}
