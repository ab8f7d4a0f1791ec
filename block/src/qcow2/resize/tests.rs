use std::sync::Arc;

use super::*;
use crate::image::Image;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Backing, RawBacking, Settings};
use crate::qcow2::snapshot::NewSnapshot;
use crate::qcow2::testing::Bench;
use crate::raw::RawImage;
use crate::storage::Storage;

const MIB: u64 = 1 << 20;

fn made(options: &str, size: u64) -> Option<(Bench, Qcow2)> {
    let bench = Bench::with_qemu()?;
    let line = format!("qemu-img create -q -f qcow2 -o {options} image {size}");
    bench.line(&line);
    let image = open(&bench, None);
    Some((bench, image))
}

fn open(bench: &Bench, backing: Option<Backing>) -> Qcow2 {
    let storage = bench.storage("image");
    let header = Header::load(&storage).unwrap();
    let settings = Settings {
        read_only: false,
        sync: false,
        punch: true,
        cache: 1 << 20,
    };
    let data = header.has_data_file().then(|| bench.storage("data"));
    let data = data.map(|data| Arc::new(data) as Arc<dyn Storage>);
    Qcow2::open(header, Arc::new(storage), data, backing, settings).unwrap()
}

fn content(image: &Qcow2) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read(0, &mut bytes).unwrap();
    bytes
}

/// The runs of equal bytes: their byte and length.
fn runs(image: &Qcow2) -> Vec<(u8, u64)> {
    let mut runs: Vec<(u8, u64)> = Vec::new();
    for byte in content(image) {
        match runs.last_mut() {
            Some((last, count)) if *last == byte => *count += 1,
            _ => runs.push((byte, 1)),
        }
    }
    runs
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=64k,compat=0.10",
        "cluster_size=16k,extended_l2=on",
    ] {
        let Some((bench, image)) = made(options, 3 * MIB) else {
            return;
        };
        let size = MIB + 3 * 512;
        image.write(0, &vec![7; 3 << 20]).unwrap();
        image.resize(size, Preallocation::Off).unwrap();
        image.resize(4 * MIB, Preallocation::Off).unwrap();
        assert_eq!(runs(&image), [(7, size), (0, 4 * MIB - size)], "{options}");
        drop(image);
        assert_eq!(bench.qemu_check("image"), 0, "{options}");
    }
}

#[test]
fn a_smaller_disk_has_a_shorter_file_and_gives_its_tables_back() {
    let Some((bench, image)) = made("cluster_size=4096", 7 * MIB) else {
        return;
    };
    image.write(0, &vec![7; 7 << 20]).unwrap();
    image.resize(MIB, Preallocation::Off).unwrap();
    drop(image);
    let len = std::fs::metadata(bench.path("image")).unwrap().len();
    assert!(len < 2 * MIB, "{len} bytes");
    let header = Header::load(&bench.storage("image")).unwrap();
    assert_eq!((header.size, header.l1_entries), (MIB, 1));
    assert_eq!(bench.qemu_check("image"), 0);
}

#[test]
fn a_disk_that_grows_hides_what_a_longer_backing_file_has() {
    for options in [
        "cluster_size=64k",
        "cluster_size=4096,compat=0.10",
        "cluster_size=64k,extended_l2=on",
    ] {
        let Some((bench, image)) = made(options, MIB + 512) else {
            return;
        };
        drop(image);
        std::fs::write(bench.path("base"), vec![9; 3 << 20]).unwrap();
        let base: Arc<dyn Storage> = Arc::new(bench.storage("base"));
        let raw = RawImage::new(Arc::clone(&base), 3 * MIB, true, false);
        let backing = RawBacking {
            image: Box::new(raw),
            storage: base,
            size: 3 * MIB,
        };
        let image = open(&bench, Some(Backing::Raw(backing)));
        image.resize(4 * MIB, Preallocation::Off).unwrap();
        let expected = [(9, MIB + 512), (0, 3 * MIB - 512)];
        assert_eq!(runs(&image), expected, "{options}");
        drop(image);
        assert_eq!(bench.qemu_check("image"), 0, "{options}");
    }
}

#[test]
fn new_bytes_are_allocated_as_asked() {
    for how in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        let Some((bench, image)) = made("cluster_size=64k", MIB) else {
            return;
        };
        image.resize(9 * MIB, how).unwrap();
        let extent = image.extent(MIB, 8 * MIB).unwrap();
        assert!(
            matches!(extent.kept, crate::Kept::Data { host: Some(_) }),
            "{extent:?}"
        );
        assert_eq!(runs(&image), [(0, 9 * MIB)]);
        drop(image);
        let file = std::fs::metadata(bench.path("image")).unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file) * 512;
        assert_eq!(blocks >= 8 * MIB, how != Preallocation::Metadata, "{how:?}");
        assert_eq!(bench.qemu_check("image"), 0, "{how:?}");
    }
}

#[test]
fn a_raw_data_file_has_the_size_of_its_disk() {
    let Some((bench, image)) = made("data_file=data,data_file_raw=on", MIB) else {
        return;
    };
    image.write(0, &vec![7; 1 << 20]).unwrap();
    for size in [3 * MIB, MIB / 2, 2 * MIB] {
        image.resize(size, Preallocation::Off).unwrap();
        image.flush().unwrap();
        let data = std::fs::read(bench.path("data")).unwrap();
        assert!(data == content(&image), "{size}");
    }
    assert_eq!(runs(&image), [(7, MIB / 2), (0, 3 * MIB / 2)]);
    drop(image);
    assert_eq!(bench.qemu_check("image"), 0);
}

#[test]
fn sizes_that_cannot_be_are_refused_and_nothing_has_changed() {
    let Some((bench, image)) = made("cluster_size=512", MIB) else {
        return;
    };
    let before = std::fs::read(bench.path("image")).unwrap();
    let resize = |size| image.resize(size, Preallocation::Off);
    assert!(matches!(resize(1000), Err(ChangeError::Unaligned(1000))));
    // 32 MiB of L1 table, with 32 KiB of disk for each entry.
    let most = (32 << 20) / 8 * (32 << 10);
    let size = most + 512;
    let refused = resize(size);
    assert!(matches!(refused, Err(ChangeError::TooLarge { size: s, .. }) if s == size));
    image.close().unwrap();
    assert!(std::fs::read(bench.path("image")).unwrap() == before);
}

#[test]
fn a_version_2_image_with_snapshots_keeps_its_size() {
    let Some((_bench, image)) = made("compat=0.10", MIB) else {
        return;
    };
    let new = NewSnapshot {
        id: None,
        name: "one",
        seconds: 0,
        nanoseconds: 0,
    };
    image.create_snapshot(new).unwrap();
    let refused = image.resize(2 * MIB, Preallocation::Off);
    assert!(matches!(refused, Err(ChangeError::NeedsVersion3(_))));
    image.delete_snapshot("one").unwrap();
    image.resize(2 * MIB, Preallocation::Off).unwrap();
    assert_eq!(image.size(), 2 * MIB);
}

#[test]
fn shrinking_wants_the_image_to_itself_and_growing_does_not() {
    let Some((_bench, image)) = made("cluster_size=64k", 2 * MIB) else {
        return;
    };
    image.write(0, &vec![7; 2 << 20]).unwrap();
    let mut pins = image.pins();
    let epoch = pins.enter();
    let refused = image.resize(MIB, Preallocation::Off);
    assert!(matches!(refused, Err(ChangeError::Busy)));
    assert_eq!(runs(&image), [(7, 2 * MIB)]);
    image.resize(3 * MIB, Preallocation::Off).unwrap();
    pins.leave(epoch);
    image.resize(MIB, Preallocation::Off).unwrap();
    assert_eq!(runs(&image), [(7, MIB)]);
}
