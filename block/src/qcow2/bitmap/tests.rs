use std::sync::Arc;

use super::*;
use crate::image::Image;
use crate::qcow2::create::Preallocation;
use crate::qcow2::image::Settings;
use crate::qcow2::testing::{Bench, Memory};

const SIZE: u64 = 4 << 20;
const UNIT: u64 = 64 << 10;

fn blank(options: &str) -> Option<Vec<u8>> {
    let bench = Bench::with_qemu()?;
    bench.line(&format!(
        "qemu-img create -q -f qcow2 -o {options} image 4M"
    ));
    Some(std::fs::read(bench.path("image")).unwrap())
}

fn open(storage: &Arc<Memory>) -> io::Result<Qcow2> {
    let storage = Arc::clone(storage) as Arc<dyn Storage>;
    let settings = Settings {
        read_only: false,
        sync: true,
        punch: true,
        cache: 1 << 20,
    };
    let header = Header::load(&*storage).unwrap();
    Qcow2::open(header, storage, None, None, settings)
}

fn made(options: &str) -> Option<(Arc<Memory>, Qcow2)> {
    let storage = Arc::new(Memory::new(blank(options)?));
    let image = open(&storage).unwrap();
    Some((storage, image))
}

/// What a bitmap of a closed image marks.
fn marked(storage: &Arc<Memory>, name: &str) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    let bits = open(storage).unwrap().bits_of(name).unwrap();
    bits.each_range(|offset, len| match all.last_mut() {
        Some((start, have)) if *start + *have == offset => *have += len,
        _ => all.push((offset, len)),
    });
    all
}

/// The flags of a bitmap on disk.
fn flags(storage: &Arc<Memory>, name: &str) -> u32 {
    let header = Header::load(&**storage).unwrap();
    let extension = header.consistent_bitmaps().unwrap();
    let mut list = bitmap_table::load_unchecked(&**storage, &extension).unwrap();
    find(&mut list, name).unwrap().flags
}

/// Changes a bitmap's entry in the directory; its length stays.
fn patch(storage: &Arc<Memory>, change: impl Fn(&mut Bitmap)) {
    let header = Header::load(&**storage).unwrap();
    let extension = header.consistent_bitmaps().unwrap();
    let mut list = bitmap_table::load_unchecked(&**storage, &extension).unwrap();
    change(&mut list[0]);
    let directory = bitmap_table::encode(&list).unwrap();
    assert_eq!(directory.len() as u64, extension.directory_size);
    storage
        .write_at(&directory, extension.directory_offset)
        .unwrap();
}

#[test]
fn every_kind_of_change_is_recorded_and_reading_is_not() {
    let Some((storage, image)) = made("cluster_size=64k") else {
        return;
    };
    // Zeros that are written where zeros are change nothing.
    image.write(3 * UNIT, &[1; 2 << 16]).unwrap();
    image.add_bitmap("live", None, true).unwrap();
    image.add_bitmap("idle", None, false).unwrap();
    let mut bytes = [0; 512];
    image.read(SIZE - 512, &mut bytes).unwrap();
    assert_eq!(flags(&storage, "live"), AUTO);
    image.write(0, &[1; 512]).unwrap();
    assert_eq!(flags(&storage, "live"), AUTO | IN_USE);
    assert_eq!(flags(&storage, "idle"), 0);
    image.write_zeroes(4 * UNIT - 1024, 2048, true).unwrap();
    image.discard(8 * UNIT, UNIT).unwrap();
    assert!(image.write_compressed(16 * UNIT, &[0; 1 << 16]).unwrap());
    image.close().unwrap();
    drop(image);
    assert_eq!(flags(&storage, "live"), AUTO);
    let units = [(0, 1), (3, 2), (8, 1), (16, 1)];
    let expected: Vec<_> = units.map(|(at, len)| (at * UNIT, len * UNIT)).into();
    assert_eq!(marked(&storage, "live"), expected);
    assert_eq!(marked(&storage, "idle"), []);
}

#[test]
fn a_disabled_bitmap_stays_as_it_is_until_it_is_enabled() {
    let Some((storage, image)) = made("cluster_size=4096") else {
        return;
    };
    image.add_bitmap("bits", Some(UNIT), true).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.enable_bitmap("bits", false).unwrap();
    image.write(UNIT, &[1; 512]).unwrap();
    image.enable_bitmap("bits", true).unwrap();
    image.write(2 * UNIT, &[1; 512]).unwrap();
    drop(image);
    assert_eq!(marked(&storage, "bits"), [(0, UNIT), (2 * UNIT, UNIT)]);
    let image = open(&storage).unwrap();
    image.clear_bitmap("bits").unwrap();
    image.write(3 * UNIT, &[1; 512]).unwrap();
    drop(image);
    assert_eq!(marked(&storage, "bits"), [(3 * UNIT, UNIT)]);
}

#[test]
fn a_bitmap_goes_with_the_size_of_its_disk() {
    let Some((storage, image)) = made("cluster_size=512") else {
        return;
    };
    image.add_bitmap("live", Some(512), true).unwrap();
    image.write(SIZE - 1024, &[1; 1024]).unwrap();
    image.enable_bitmap("live", false).unwrap();
    image.add_bitmap("more", Some(512), true).unwrap();
    image.resize(SIZE - 512, Preallocation::Off).unwrap();
    image.resize(2 * SIZE, Preallocation::Off).unwrap();
    image.write(2 * SIZE - 512, &[1; 512]).unwrap();
    drop(image);
    assert_eq!(marked(&storage, "live"), [(SIZE - 1024, 512)]);
    assert!(marked(&storage, "more").contains(&(2 * SIZE - 512, 512)));
}

#[test]
fn bitmaps_are_merged_across_granularities_and_images() {
    let (Some((storage, image)), Some((_, other))) =
        (made("cluster_size=4096"), made("cluster_size=64k"))
    else {
        return;
    };
    image.add_bitmap("fine", Some(512), true).unwrap();
    image.write(UNIT, &[1; 512]).unwrap();
    image.add_bitmap("coarse", Some(UNIT), false).unwrap();
    image.merge_bitmap("coarse", None, "fine").unwrap();
    other.add_bitmap("theirs", Some(4096), true).unwrap();
    other.write(2 * UNIT, &[1; 512]).unwrap();
    other.enable_bitmap("theirs", false).unwrap();
    image.merge_bitmap("fine", Some(&other), "theirs").unwrap();
    other.resize(2 * SIZE, Preallocation::Off).unwrap();
    let refused = image.merge_bitmap("fine", Some(&other), "theirs");
    assert!(matches!(
        refused,
        Err(ChangeError::DiskSizes { from, to: SIZE }) if from == 2 * SIZE
    ));
    drop(image);
    assert_eq!(marked(&storage, "coarse"), [(UNIT, UNIT)]);
    assert_eq!(marked(&storage, "fine"), [(UNIT, 512), (2 * UNIT, 4096)]);
}

#[test]
fn a_bitmap_that_was_not_saved_can_only_be_removed() {
    let Some((storage, image)) = made("cluster_size=64k") else {
        return;
    };
    image.add_bitmap("bits", None, true).unwrap();
    drop(image);
    patch(&storage, |bitmap| bitmap.flags |= IN_USE);
    let image = open(&storage).unwrap();
    image.write(0, &[1; 512]).unwrap();
    let refused = |result: Result<(), ChangeError>| {
        assert!(matches!(result, Err(ChangeError::Inconsistent(name)) if name == "bits"));
    };
    refused(image.clear_bitmap("bits"));
    refused(image.enable_bitmap("bits", false));
    refused(image.merge_bitmap("bits", None, "bits"));
    image.close().unwrap();
    assert_eq!(flags(&storage, "bits"), AUTO | IN_USE);
    image.remove_bitmap("bits").unwrap();
    let header = Header::load(&*storage).unwrap();
    assert!(header.bitmaps.is_none() && header.autoclear & BITMAPS == 0);
}

#[test]
fn names_and_granularities_that_cannot_be_are_refused() {
    let Some((_, image)) = made("cluster_size=64k") else {
        return;
    };
    for granularity in [0, 256, 513, 4 << 30] {
        let refused = image.add_bitmap("bits", Some(granularity), true);
        assert!(matches!(refused, Err(ChangeError::Granularity(g)) if g == granularity));
    }
    for name in [String::new(), "x".repeat(1024)] {
        let refused = image.add_bitmap(&name, None, true);
        assert!(matches!(refused, Err(ChangeError::Bitmaps(_))));
    }
    image.add_bitmap("bits", Some(2 << 30), true).unwrap();
    let refused = image.add_bitmap("bits", None, true);
    assert!(matches!(refused, Err(ChangeError::BitmapExists(_))));
    let refused = image.remove_bitmap("other");
    assert!(matches!(refused, Err(ChangeError::NoBitmap(_))));
}

#[test]
fn a_version_2_image_has_no_bitmaps() {
    let Some((_, image)) = made("compat=0.10") else {
        return;
    };
    let refused = image.add_bitmap("bits", None, true);
    assert!(matches!(refused, Err(ChangeError::NeedsVersion3(_))));
}

#[test]
fn a_table_that_cannot_be_is_no_reason_to_write_without_recording() {
    let Some((storage, image)) = made("cluster_size=64k") else {
        return;
    };
    image.add_bitmap("bits", None, true).unwrap();
    drop(image);
    patch(&storage, |bitmap| bitmap.table_offset += 1 << 40);
    assert_eq!(
        open(&storage).unwrap_err().kind(),
        io::ErrorKind::InvalidData
    );
}
