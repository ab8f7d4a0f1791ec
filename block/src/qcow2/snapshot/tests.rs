use std::sync::Arc;

use super::*;
use crate::image::Image;
use crate::qcow2::create::Preallocation;
use crate::qcow2::image::Settings;
use crate::qcow2::testing::Bench;

const SIZE: u64 = 4 << 20;

/// An image of 4 MiB named `image`, made by qemu-img.
fn made(options: &str) -> Option<(Bench, Qcow2)> {
    let bench = Bench::with_qemu()?;
    bench.line(&format!(
        "qemu-img create -q -f qcow2 -o {options} image 4M"
    ));
    let image = open(&bench, None);
    Some((bench, image))
}

fn open(bench: &Bench, snapshot: Option<&str>) -> Qcow2 {
    let storage = bench.storage("image");
    let mut header = Header::load(&storage).unwrap();
    if let Some(snapshot) = snapshot {
        look_at(&mut header, &storage, snapshot).unwrap();
    }
    let settings = Settings {
        read_only: snapshot.is_some(),
        sync: false,
        punch: true,
        cache: 1 << 20,
    };
    let data = header.has_data_file().then(|| bench.storage("data"));
    let data = data.map(|data| Arc::new(data) as Arc<dyn Storage>);
    Qcow2::open(header, Arc::new(storage), data, None, settings).unwrap()
}

fn new(name: &str) -> NewSnapshot<'_> {
    NewSnapshot {
        id: None,
        name,
        seconds: 1_700_000_000,
        nanoseconds: 7,
    }
}

fn byte(image: &Qcow2, offset: u64) -> u8 {
    let mut bytes = [0; 512];
    image.read(offset, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "torn");
    bytes[0]
}

fn sample(id: &str, name: &str) -> Snapshot {
    Snapshot {
        id: id.into(),
        name: name.into(),
        ..Snapshot::default()
    }
}

#[test]
fn an_id_goes_before_a_name() {
    let snapshots = [sample("7", "2"), sample("2", "seven"), sample("x", "seven")];
    let found = |text| find(&snapshots, text).map(|it| it.id().into_owned());
    assert_eq!(found("2").unwrap(), "2");
    assert_eq!(found("7").unwrap(), "7");
    assert_eq!(found("seven").unwrap(), "2");
    let missing = found("8");
    assert!(matches!(missing, Err(ChangeError::NoSnapshot(name)) if name == "8"));
}

#[test]
fn a_new_id_is_the_number_after_the_largest() {
    assert_eq!(unused_id(&[], None).unwrap(), "1");
    let snapshots = [sample("7", "a"), sample("x", "b"), sample("3", "c")];
    assert_eq!(unused_id(&snapshots, None).unwrap(), "8");
    assert_eq!(unused_id(&snapshots, Some("4")).unwrap(), "4");
    let full = [sample("18446744073709551615", "a"), sample("1", "b")];
    assert_eq!(unused_id(&full, None).unwrap(), "2");
    let taken = unused_id(&snapshots, Some("x"));
    assert!(matches!(taken, Err(ChangeError::SnapshotExists(id)) if id == "x"));
}

#[test]
fn a_disk_comes_back_with_its_size_and_what_was_written_since_is_gone() {
    let Some((bench, image)) = made("cluster_size=4096") else {
        return;
    };
    image.write(0, &[1; 512]).unwrap();
    assert_eq!(image.create_snapshot(new("one")).unwrap(), "1");
    image.write(0, &[2; 512]).unwrap();
    image.write(SIZE - 512, &[2; 512]).unwrap();
    image.resize(2 * SIZE, Preallocation::Off).unwrap();
    assert_eq!(image.create_snapshot(new("two")).unwrap(), "2");
    image.apply_snapshot("one").unwrap();
    assert_eq!(image.size(), SIZE);
    assert_eq!((byte(&image, 0), byte(&image, SIZE - 512)), (1, 0));
    image.write(512, &[3; 512]).unwrap();
    image.apply_snapshot("two").unwrap();
    assert_eq!(image.size(), 2 * SIZE);
    assert_eq!((byte(&image, 0), byte(&image, SIZE - 512)), (2, 2));
    assert_eq!(byte(&image, 512), 0);
    drop(image);
    assert_eq!(byte(&open(&bench, Some("1")), 0), 1);
    assert_eq!(bench.qemu_check("image"), 0);
    let list = bench.line("qemu-img snapshot -l image");
    assert!(list.contains("one") && list.contains("two"), "{list}");
}

#[test]
fn deleting_a_snapshot_gives_its_space_back_and_spares_what_others_share() {
    let Some((bench, image)) = made("cluster_size=64k") else {
        return;
    };
    image.write(0, &[1; 1 << 20]).unwrap();
    image.create_snapshot(new("one")).unwrap();
    image.write(0, &[2; 1 << 20]).unwrap();
    image.create_snapshot(new("two")).unwrap();
    image.write(1 << 20, &[3; 1 << 20]).unwrap();
    image.flush().unwrap();
    let before = image.high_water();
    image.delete_snapshot("one").unwrap();
    // What it alone held has room for as much again.
    image.write(2 << 20, &[4; 1 << 20]).unwrap();
    image.flush().unwrap();
    assert!(image.high_water() < before + (256 << 10));
    let gone = image.delete_snapshot("one");
    assert!(matches!(gone, Err(ChangeError::NoSnapshot(_))));
    let found: Vec<u8> = (0..4).map(|at| byte(&image, at << 20)).collect();
    assert_eq!(found, [2, 3, 4, 0]);
    drop(image);
    let two = open(&bench, Some("two"));
    assert_eq!((byte(&two, 0), byte(&two, 1 << 20)), (2, 0));
    assert_eq!(bench.qemu_check("image"), 0);
}

#[test]
fn refcounts_that_cannot_count_more_refuse_a_snapshot_and_nothing_has_changed() {
    let Some((bench, image)) = made("cluster_size=4096,refcount_bits=1") else {
        return;
    };
    image.write(0, &[1; 8192]).unwrap();
    image.flush().unwrap();
    let before = std::fs::read(bench.path("image")).unwrap();
    let refused = image.create_snapshot(new("one"));
    assert!(matches!(
        refused,
        Err(ChangeError::RefcountFull {
            count: 1,
            bits: 1,
            ..
        })
    ));
    image.close().unwrap();
    assert!(std::fs::read(bench.path("image")).unwrap() == before);
}

#[test]
fn an_image_with_a_data_file_has_no_snapshots() {
    let Some((_bench, image)) = made("data_file=data") else {
        return;
    };
    let refused = image.create_snapshot(new("one"));
    assert!(matches!(refused, Err(ChangeError::DataFile)));
}

#[test]
fn requests_under_way_keep_a_change_out() {
    let Some((_bench, image)) = made("cluster_size=64k") else {
        return;
    };
    let mut pins = image.pins();
    let epoch = pins.enter();
    let refused = image.create_snapshot(new("one"));
    assert!(matches!(refused, Err(ChangeError::Busy)));
    pins.leave(epoch);
    assert_eq!(image.create_snapshot(new("one")).unwrap(), "1");
}

#[test]
fn a_table_that_is_shared_and_not_counted_keeps_its_snapshot_from_being_deleted() {
    let Some((bench, image)) = made("cluster_size=64k") else {
        return;
    };
    image.write(0, &[7; 1 << 16]).unwrap();
    image.create_snapshot(new("one")).unwrap();
    image.create_snapshot(new("two")).unwrap();
    drop(image);
    let header = Header::load(&bench.storage("image")).unwrap();
    let word = |at: u64| super::super::fields::u64_at(&bench.bytes("image", at, 8), 0);
    let table = word(header.l1_offset) & super::super::entry::OFFSET;
    let block = word(header.reftable_offset);
    // The L2 table counts for one of the three that have it.
    let refcount = block + (table >> 16) * 2;
    assert_eq!(bench.bytes("image", refcount, 2), [0, 3]);
    bench.poke("image", refcount, &[0, 1]);
    let image = open(&bench, None);
    let refused = image.delete_snapshot("one");
    assert!(
        matches!(refused, Err(ChangeError::Corrupt(_))),
        "{refused:?}"
    );
    assert!(image.is_corrupt());
    assert_eq!(byte(&image, 0), 7);
    drop(image);
    let listed = snapshot_table::load(&bench.storage("image"), &header).unwrap();
    assert_eq!(listed.len(), 2, "nothing was deleted");
    let repaired =
        crate::qcow2::repair::repair(&bench.storage("image"), crate::Repair::All, &mut |_| ());
    assert_eq!(repaired.unwrap().corruptions, 0);
    let image = open(&bench, None);
    image.delete_snapshot("one").unwrap();
    image.delete_snapshot("two").unwrap();
    assert_eq!(byte(&image, 0), 7);
    drop(image);
    assert_eq!(bench.qemu_check("image"), 0);
}
